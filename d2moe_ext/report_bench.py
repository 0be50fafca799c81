"""Tables of measured times for a terminal, from the same dictionaries that ``--json`` prints. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from d2moe_ext.report import human_bytes, human_count, plain_table

COLUMNS = ("contender", "ms", "quartiles", "× best HF", "bytes", "FLOPs", "floor ms", "floor / time")


def bench_tables(record: dict[str, Any]) -> RenderableType:
    """What ``d2moe bench`` and the layer benchmark print: the floors, and a table for each layer, dtype and size."""
    parts: list[RenderableType] = [Text(floors_line(record)), Text()]
    for title, rows in by_cell(record["rows"]).items():
        table = plain_table(title, COLUMNS)
        for row in rows:
            table.add_row(*cells(row))
        parts.append(table)
        parts += [Text(f"{row['contender']}: {row['note']}") for row in rows if row["note"]]
    return Group(*parts)


def by_cell(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows that belong in one table, by its title."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        tokens = f"{row['tokens']:,} token" + ("s" if row["tokens"] != 1 else "")
        group = f", group {row['group']}" if row.get("group") else ""
        tables.setdefault(f"{row['shape']}, {row['dtype']}, {tokens}{group}", []).append(row)
    return tables


def cells(row: dict[str, Any]) -> list[str]:
    """One row under :data:`COLUMNS`; a dash where it was not timed."""
    cost = [human_bytes(row["bytes"]), human_count(row["flops"]), f"{row['floor_ms']:.3f}"]
    if row["median_ms"] is None:
        return [row["contender"], "–", "–", "–", *cost, "–"]
    speed = "–" if row["speed_over_hf"] is None else f"{row['speed_over_hf']:.2f}"
    spread = f"{row['low_ms']:.3f}–{row['high_ms']:.3f}"
    return [row["contender"], f"{row['median_ms']:.3f}", spread, speed, *cost, f"{row['share_of_floor']:.2f}"]


def floors_line(record: dict[str, Any]) -> str:
    """The floors at the start, in one sentence; each row has those of its own rounds."""
    floors = record["floors"]
    rates = "; ".join(f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in floors["rates"].items())
    return (
        f"{record['machine']}. Memory read at {floors['bandwidth'] / 1e9:.1f} GB/s ({floors['bandwidth_by']}); "
        f"matrix products at {rates}; both are measured again beside the contenders."
    )
