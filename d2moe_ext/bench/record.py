"""What stands around the rows of a measurement: machine, command, date, versions, floors."""

from __future__ import annotations

import datetime
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from d2moe_ext._version import __version__
from d2moe_ext.bench.floors import Floors
from d2moe_ext.bench.machine import describe_machine


def make_record(kind: str, rows: Sequence[dict[str, Any]], floors: Floors | None, command: str) -> dict[str, Any]:
    """What ``--json`` prints: strict JSON.

    Args:
        kind: what the rows are of: ``layer``, ``growth``, ``model`` or ``checkpoint``.
        rows: one a contender and size.
        floors: that the rows were held against; None where they were held against none.
        command: as :func:`shown_command` gives it.
    """
    return {
        "kind": kind,
        "machine": describe_machine(),
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": {"d2moe_ext": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        **({} if floors is None else {"floors": floors.to_dict()}),
        "rows": list(rows),
    }


def write_record(path: Path | None, record: dict[str, Any]) -> None:
    """Write a record to a file, whose folder may be new; None writes nothing."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def shown_command(program: str, arguments: Sequence[str]) -> str:
    """A command as it was given, with paths outside the current folder by their last name alone, in ``NAME=PATH`` too."""
    words = program.split()
    for word in arguments:
        use, separator, value = word.rpartition("=")
        words.append(use + separator + _shown(value))
    return shlex.join(words)


def _shown(word: str) -> str:
    path = Path(word)
    if not path.is_absolute() and ".." not in path.parts:
        return word
    resolved = path.resolve()
    return resolved.relative_to(Path.cwd()).as_posix() if resolved.is_relative_to(Path.cwd()) else resolved.name
