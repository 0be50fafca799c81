"""Reads saved results, one record a file: what ``bench_layer`` and ``bench_model`` wrote, and what was found on GPUs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
LAYER, GROWTH, MODEL = "layer", "growth", "model"
_ENTRIES = ("machine", "command", "date", "rows")
GPU_CHECK, GPU_BENCH = "gpu-check", "gpu-bench"
_GPU_COMMON = ("date", "commit", "gpu", "versions")
_GPU_ENTRIES = {
    GPU_CHECK: (*_GPU_COMMON, "operators", "steps", "tests", "complete"),
    GPU_BENCH: (*_GPU_COMMON, "rows"),
}


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Every ``*.json`` of a folder, by name. A record that does not say its kind is one of whole models.

    Raises:
        ValueError: a file is no such record, or two of them measured the same cell.
    """
    records = []
    for file in sorted(folder.glob("*.json")):
        record = _read_json(file)
        _check_entries(file, record, _ENTRIES)
        records.append({"kind": MODEL} | record)
    _check_cells(rows_of(records, LAYER))
    return records


def read_gpu_records(folder: Path) -> list[dict[str, Any]]:
    """What ``make gpu-check`` and ``make gpu-bench`` wrote, by file name; nothing where there is no folder.

    Raises:
        ValueError: a file is no such record.
    """
    records = []
    for file in sorted(folder.glob("gpu-*.json")):
        record = _read_json(file)
        kind = record.get("kind") if isinstance(record, dict) else None
        if kind not in _GPU_ENTRIES:
            raise ValueError(f"{file.name} must be of the kind {' or '.join(_GPU_ENTRIES)}, got {kind!r}.")
        _check_entries(file, record, _GPU_ENTRIES[kind])
        records.append(record)
    return records


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file.name} must be JSON, got {error}.") from None


def _check_entries(file: Path, record: Any, entries: tuple[str, ...]) -> None:
    missing = [name for name in entries if not isinstance(record, dict) or name not in record]
    if missing:
        raise ValueError(f"{file.name} must have the entries {', '.join(entries)}, got none of the name {missing[0]}.")


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
