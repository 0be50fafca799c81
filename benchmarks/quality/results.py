"""What was measured, one JSON line per row, appended as soon as it is known so that an interrupted study resumes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

UNCOMPRESSED = "uncompressed"
Source = Literal["calibration", "out"]


@dataclass(frozen=True)
class Sizes:
    """How much is read: calibration windows of ``seqlen`` tokens, and the judging texts' first ``tokens`` in windows."""

    samples: int = 64
    seqlen: int = 256
    tokens: int = 16384
    window: int = 256


@dataclass(frozen=True)
class Key:
    """What a row is a measurement of: two rows with the same key measure the same thing.

    Attributes:
        model: the name of its directory.
        weights: the first digits of a hash of its configuration and weights.
        method: its name; ``uncompressed`` for the model as it is.
        version: of the method's code, set by hand.
        ratio: parameters removed as a share of the whole model's.
        seed: chose the calibration windows.
        samples: calibration windows of ``seqlen`` tokens.
        source: calibrated on the calibration text, or on the calibration third of the text from out of the domain.
        judge: the use of the judging texts, ``selection`` or ``test``.
        text_calibration: names and hashes of the texts.
        tokens: first tokens of each judging text that were read, in windows of ``window``.
    """

    model: str
    weights: str
    method: str
    version: int
    ratio: float
    seed: int
    samples: int
    seqlen: int
    source: Source
    judge: str
    text_calibration: str
    text_in: str
    text_out: str
    tokens: int
    window: int


@dataclass(frozen=True)
class Row:
    """A measurement, or the sentence with which it failed.

    Attributes:
        perplexity_in: in the domain; ``perplexity_out``: out of it. None where the row failed.
        rise_in: natural logarithm of the perplexity over the uncompressed model's.
        bytes: stored, of the whole model, without file headers.
        budget: the most that they may be at this ratio.
        seconds: of compression, without the shared calibration.
        memory: bytes by which the process's resident memory rose at its peak during compression, None where the system
            does not tell.
        failure: the sentence, None where the row was measured.
        command: how the row was run, files by name only.
    """

    key: Key
    perplexity_in: float | None
    perplexity_out: float | None
    rise_in: float | None
    rise_out: float | None
    bytes: int | None
    budget: int
    seconds: float | None
    memory: int | None
    failure: str | None
    command: str
    date: str
    package: str
    torch: str
    machine: str

    def to_json(self) -> str:
        record = asdict(self)
        return json.dumps(record.pop("key") | record, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Row:
        record = json.loads(line)
        key = Key(**{field.name: record.pop(field.name) for field in fields(Key)})
        return cls(key=key, **record)


class Results:
    """The rows of a folder, one file per model. Of rows with the same key the last one counts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[Key, Row] = {}
        for path in sorted(folder.glob("*.jsonl")):
            self._read(path)

    def _read(self, path: Path) -> None:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = Row.from_json(line)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"--results must hold rows of a study, got line {number} of {path.name}: {error!r}."
                ) from error
            self.rows[row.key] = row

    def append(self, row: Row) -> None:
        """Keep a row and write it to the model's file at once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{row.key.model}.jsonl").open("a", encoding="utf-8") as file:
            file.write(row.to_json() + "\n")
        self.rows[row.key] = row

    def has(self, key: Key, retry_failed: bool = False) -> bool:
        """Whether the row is there already; a failed one counts unless it is to be tried again."""
        row = self.rows.get(key)
        return row is not None and not (retry_failed and row.failure is not None)

    def judged_by(self, judge: str) -> list[Row]:
        return [row for row in self.rows.values() if row.key.judge == judge]
