"""Reads saved results: what ``bench_layer`` and ``bench_model`` wrote, one record a file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
LAYER, GROWTH, MODEL = "layer", "growth", "model"
_ENTRIES = ("machine", "command", "date", "rows")


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Every ``*.json`` of a folder, by name. A record that does not say its kind is one of whole models.

    Raises:
        ValueError: a file is no such record, or two of them measured the same cell.
    """
    records = []
    for file in sorted(folder.glob("*.json")):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file.name} must be JSON, got {error}.") from None
        missing = [name for name in _ENTRIES if not isinstance(record, dict) or name not in record]
        if missing:
            raise ValueError(f"{file.name} must have the entries {', '.join(_ENTRIES)}, got none of the name {missing[0]}.")
        records.append({"kind": MODEL} | record)
    _check_cells(rows_of(records, LAYER))
    return records


def rows_of(records: Iterable[dict[str, Any]], kind: str) -> list[Row]:
    """The rows of all records of a kind."""
    return [row for record in records if record["kind"] == kind for row in record["rows"]]


def _check_cells(rows: list[Row]) -> None:
    seen = set()
    for row in rows:
        cell = tuple(row[key] for key in ("shape", "dtype", "tokens", "contender", "group"))
        if cell in seen:
            raise ValueError(f"Results must hold every cell once, got {', '.join(map(str, cell[:4]))} twice.")
        seen.add(cell)
