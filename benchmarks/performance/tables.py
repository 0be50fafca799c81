"""Pieces that the page's sections are made of: Markdown tables and what stands in their cells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.performance.claims import Verdict, counted
from benchmarks.performance.records import Row


def table(head: Sequence[str], lines: Iterable[Sequence[str]], rule: str = "---:") -> str:
    """A Markdown table; ``rule`` aligns all columns but the first."""
    rules = ["---", *[rule] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rules, *lines))


def digits(value: float) -> str:
    """Three digits, more before the point where there are."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def verdicts_table(verdicts: Iterable[Verdict]) -> str:
    """A line for each claim."""
    lines = [
        [verdict.claim, verdict.shape, verdict.numbers, "holds" if verdict.holds else "**does not hold**"]
        for verdict in verdicts
    ]
    return table(["claim", "shape", "rows that reach it; the farthest", ""], lines, "---")


def layer_cell(row: Row | None) -> str:
    """Milliseconds, ratio to the best of transformers' contenders, share of the floor."""
    if row is None or row["median_ms"] is None:
        return "–"
    speed = "–" if row["speed_over_hf"] is None else f"{row['speed_over_hf']:.2f}×"
    return f"{digits(row['median_ms'])} · {speed} · {row['share_of_floor']:.2f}"


def remarks(rows: list[Row]) -> str:
    """Why cells are empty."""
    notes = dict.fromkeys(f"- {row['contender']}, {counted(row['tokens'])}: {row['note']}" for row in rows if row["note"])
    return "\n\n" + "\n".join(notes) if notes else ""


def first_line(text: str) -> str:
    """Of a note, as a table's cell may hold it."""
    return text.partition("\n")[0].replace("|", "\\|")
