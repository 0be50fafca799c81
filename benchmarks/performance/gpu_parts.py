"""The page's tables of a forward's parts on a GPU, and of what its profiles say holds it."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.performance.claims import counted
from benchmarks.performance.gpu_claims import part_verdicts
from benchmarks.performance.kernel_names import short_names
from benchmarks.performance.records import Row
from benchmarks.performance.tables import digits, first_line, table, verdicts_table

# Of a forward: kernels that take less everywhere share a line.
_LEAST_SHARE = 0.01
_PARTS = """A forward's parts: in calls in which little else runs, timed in a graph, or as kernels of a whole forward. *Own
kernels* are the part's alone, as the profiler saw them in a process of its own; the call around them runs what stands below the
table, too. Shares are of the rate of bfloat16 products for low-rank products, of the bandwidth for everything else; one above
100 % found in the cache what a kernel before had written. A floor is the time for a call's bytes and FLOPs at the ceilings."""
_PROFILES = """What the profile says holds it: for each kernel its runs in a forward, the median of their microseconds together,
and their share of what all kernels take. The first line has that sum, and the time from the first kernel's start to the last
one's end; where the second is longer, the GPU waits for launches, which take longer under the profiler than without."""


def part_sections(rows: list[Row]) -> list[str]:
    """Claims, the table of parts, and a table for each profiled layer; nothing where nothing was measured."""
    parts = [row for row in rows if row["table"] == "part"]
    profiles = [row for row in rows if row["table"] == "profile"]
    measured, profiled = [row for row in parts if "part" in row], [row for row in profiles if "shape" in row]
    sections = []
    if measured:
        sections += [verdicts_table(part_verdicts(measured, profiled)), _PARTS, _part_table(measured) + _remarks(measured)]
    seen = [row for row in profiled if row["note"] is None]
    if seen:
        sections.append(_PROFILES)
        names = short_names(sorted({kernel["name"] for row in seen for kernel in row["kernels"]}))
        for shape, layer in dict.fromkeys((row["shape"], row["layer"]) for row in seen):
            sections.append(_profile_table([row for row in seen if (row["shape"], row["layer"]) == (shape, layer)], names))
    failed = [row for row in parts if "part" not in row] + [row for row in profiles if row["note"]]
    notes = dict.fromkeys(f"- {_place(row)}: {first_line(row['note'])}" for row in failed)
    return [*sections, *(["\n".join(notes)] if notes else [])]


def _place(row: Row) -> str:
    place = [row["job"], row.get("layer"), counted(row["tokens"]) if row.get("tokens") else None]
    return ", ".join(filter(None, place))


def _part_table(rows: list[Row]) -> str:
    head = ["part", "of", "floor, µs", "whole call, µs", "of the ceiling", "own kernels, µs", "of the ceiling"]
    return table(head, [_part_line(row) for row in rows], "---")


def _part_line(row: Row) -> list[str]:
    where = (row["shape"], row["layer"], counted(row["tokens"]) if row["layer"] else row["case"])
    own = _microseconds(row["own_us"])
    if row["own_each_us"] and len(row["own_each_us"]) > 1:
        own += " = " + " + ".join(map(digits, row["own_each_us"]))
    times = [
        _microseconds(row["floor_us"]),
        _microseconds(row["call_us"]),
        _share(row["call_share"]),
        own,
        _share(row["own_share"]),
    ]
    return [row["part"], ", ".join(filter(None, where)), *times]


def _microseconds(value: float | None) -> str:
    return "–" if value is None else digits(value)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _remarks(rows: list[Row]) -> str:
    """What else calls run, and why cells are empty."""
    contains = [(row["part"], row["contains"]) for row in rows if row["contains"]]
    lines = [f"- {part}: the call runs also {what}." for part, what in contains]
    for row in rows:
        place = ", ".join(filter(None, (row["part"], row["shape"], row["layer"], row["case"])))
        lines += [f"- {place}: {first_line(row[note])}" for note in ("note", "own_note") if row[note]]
    return "\n\n" + "\n".join(dict.fromkeys(lines)) if lines else ""


def _profile_table(rows: list[Row], names: dict[str, str]) -> str:
    """One layer's forwards side by side; kernels in the order of their largest share."""
    rows = sorted(rows, key=lambda row: row["tokens"])
    cells = [{names[kernel["name"]]: kernel for kernel in row["kernels"]} for row in rows]
    largest = {name: max(cell[name]["share"] for cell in cells if name in cell) for name in dict.fromkeys(_all(cells))}
    shown = sorted((name for name in largest if largest[name] >= _LEAST_SHARE), key=lambda name: -largest[name])
    lines = [["all kernels", *(f"{digits(row['busy_us'])} of {digits(row['span_us'])}" for row in rows)]]
    lines += [[f"`{name}`", *(_kernel_cell([cell[name]] if name in cell else []) for cell in cells)] for name in shown]
    rest = [[kernel for name, kernel in cell.items() if name not in shown] for cell in cells]
    if any(rest):
        lines.append(["others", *map(_kernel_cell, rest)])
    title = f"#### {rows[0]['shape']}, {rows[0]['layer']}: kernels of a forward"
    return f"{title}\n\n{table(['runs · µs · share', *(counted(row['tokens']) for row in rows)], lines)}"


def _all(cells: Iterable[dict[str, Row]]) -> Iterable[str]:
    return (name for cell in cells for name in cell)


def _kernel_cell(kernels: list[Row]) -> str:
    if not kernels:
        return "–"
    runs, time, share = (sum(kernel[field] for kernel in kernels) for field in ("calls", "us", "share"))
    return f"{runs:g} · {digits(time)} · {share:.0%}"
