"""A laboratory on a tiny random Mixtral, and rows made by hand."""

from __future__ import annotations

from pathlib import Path

import cli_helpers

from benchmarks.quality.results import UNCOMPRESSED, Key, Results, Row, Sizes
from benchmarks.quality.runner import Laboratory
from benchmarks.study import Method

SIZES = Sizes(samples=4, seqlen=32, tokens=128, window=32)


def write_texts(folder: Path) -> dict[str, str]:
    """One text per use, all different; enough tokens for :data:`SIZES`."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {}
    for number, use in enumerate(("calibration", "selection", "test", "out")):
        lines = [line.replace("word", f"word{number}") for line in cli_helpers.TEXT.splitlines()]
        texts[use] = str(folder / f"{use}.txt")
        Path(texts[use]).write_text("\n".join(lines[number:]))
    return texts


def laboratory(model: Path, folder: Path, methods: dict[str, Method], *judges: str) -> Laboratory:
    judged_by = judges or ("selection",)
    return Laboratory(model, write_texts(folder / "texts"), judged_by, SIZES, methods, Results(folder / "results"), "a command")


def key(model: str, method: str, ratio: float = 0.6, seed: int = 0, **changes: object) -> Key:
    fields = {
        "model": model,
        "weights": "w",
        "method": method,
        "version": 1,
        "ratio": ratio,
        "seed": seed,
        "samples": SIZES.samples,
        "seqlen": SIZES.seqlen,
        "source": "calibration",
        "judge": "selection",
        "text_calibration": "c",
        "text_in": "i",
        "text_out": "o",
        "tokens": SIZES.tokens,
        "window": SIZES.window,
    }
    return Key(**(fields | changes))


def row(row_key: Key, rise_in: float = 0.0, rise_out: float = 0.0, failure: str | None = None) -> Row:
    measured = failure is None
    return Row(
        key=row_key,
        perplexity_in=10.0 if measured else None,
        perplexity_out=20.0 if measured else None,
        rise_in=rise_in if measured else None,
        rise_out=rise_out if measured else None,
        bytes=1_234_000 if measured else None,
        budget=1_235_000,
        seconds=2.0 if measured else None,
        memory=3_000_000 if measured else None,
        failure=failure,
        command="a command",
        date="2026-01-02",
        package="0",
        torch="2",
        machine="a machine",
    )


def plain_row(model: str) -> Row:
    return row(key(model, UNCOMPRESSED, ratio=0.0, samples=0, seqlen=0, text_calibration=""))
