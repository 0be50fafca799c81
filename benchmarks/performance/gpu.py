"""The page's sections on GPUs: what was checked and measured on each, or that nothing was so far."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.performance.claims import counted
from benchmarks.performance.gpu_claims import layer_verdicts, operator_aim
from benchmarks.performance.gpu_parts import part_sections
from benchmarks.performance.records import GPU_BENCH, GPU_CHECK, Row
from benchmarks.performance.tables import digits, first_line, layer_cell, remarks, table, verdicts_table
from d2moe_ext import ops
from tools.gpu_verdicts import GROUPS, NO_KERNEL, PASSED

Record = dict[str, Any]
_BUILT = "built and loaded, not yet run"
_NOTHING_YET = """## On a GPU

No GPU was at hand so far: none of this has run on one. `make cuda-build-check` compiles for sm_80 and sm_90, loads what came
of it and looks for spilled registers; `make cuda-emulated-check` runs the kernels on a CPU, thread after thread, through the
operators' tests, which says nothing of their speed, of memory order, or of what cuBLAS and cuSOLVER answer. `make gpu-check`
and `make gpu-bench` have not run either.

"""
_CHECKED = """`make gpu-check` built the extension for this GPU, ran the tests that need one, and called every operator on
small inputs under `compute-sanitizer`."""
_MEASURED = """`make gpu-bench` held everything against what the GPU did at best in the same run. Times are medians of CUDA
events with a cold L2 cache. A contender in a graph and a single operator are queued behind other work, so that the GPU's own
time is left; for everything else the GPU waits, and launching counts."""
_LAYERS = """A cell gives the median time in ms, the ratio to the best of transformers' contenders (above 1 is faster; the
median over rounds in which both ran), and the floor's share of the time. The floor is the time in which the bytes of the second
table could be moved and its FLOPs done at the ceilings. Claims take the faster of a graph and none, of transformers' contenders
too."""


def gpu_section(records: Sequence[Record], notes: Path) -> str:
    """All that is known of GPUs.

    Args:
        records: as :func:`benchmarks.performance.records.read_gpu_records` gives them.
        notes: the folder of the notes; ``gpu.md`` is added where there is one.
    """
    if not records:
        lines = [[name, _BUILT] for name in sorted(ops.__all__)]
        return _NOTHING_YET + table(["operator", "CUDA kernel"], lines, "---")
    sections = ["## On a GPU"]
    names = dict.fromkeys(record["gpu"]["name"] for record in records)
    for name in names:
        found = {record["kind"]: record for record in records if record["gpu"]["name"] == name}
        if GPU_CHECK in found:
            sections += _check(found[GPU_CHECK])
        if GPU_BENCH in found:
            sections += _bench(found[GPU_BENCH])
    note = notes / "gpu.md"
    return "\n\n".join([*sections, *([note.read_text(encoding="utf-8").strip()] if note.is_file() else [])])


def _origin(record: Record) -> str:
    gpu, versions = record["gpu"], ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    about = f"compute capability {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, driver {gpu['driver']}"
    return f"- commit {record['commit'][:10]}, {record['date']}\n- {gpu['name']}: {about}\n- {versions}"


def _check(record: Record) -> list[str]:
    """Operators, then every step that is not an operator's tests."""
    heading = f"### Checked on {record['gpu']['name']}"
    operators = table(
        ["operator", "CUDA kernel, on small inputs", "tests"], [_checked(record, n) for n in sorted(ops.__all__)], "---"
    )
    of_operators = {f"tests: {group}" for group, operators in GROUPS.items() if operators}
    others = [step for step in record["steps"] if step["name"] not in of_operators]
    lines = [[step["name"], PASSED if step["passed"] else "**failed**", first_line(step["detail"])] for step in others]
    steps = table(["step", "", ""], lines, "---")
    sections = [heading, _CHECKED, _origin(record), operators, steps]
    if not record["complete"]:
        sections.append("**The check did not come to its end.**")
    return sections


def _checked(record: Record, operator: str) -> list[str]:
    kernel = record["operators"].get(operator, "not run")
    (group,) = [name for name, operators in GROUPS.items() if operator in operators]
    outcomes = [test["outcome"] for test in record["tests"] if test["group"] == group]
    counts = [f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(outcomes)]
    step = next((step for step in record["steps"] if step["name"] == f"tests: {group}"), None)
    verdict = ", ".join(counts) or "none"
    if step is None or not step["passed"]:
        verdict = f"**{verdict}: {'not run' if step is None else 'failed'}**"
    return [operator, "not written" if kernel == NO_KERNEL else first_line(kernel), verdict]


def _bench(record: Record) -> list[str]:
    rows: list[Row] = record["rows"]
    sections = [f"### Measured on {record['gpu']['name']}", _MEASURED, _origin(record)]
    sections += [_ceilings(row) for row in rows if row["table"] == "ceilings"]
    operators = [row for row in rows if row["table"] == "operator"]
    if operators:
        sections.append(_operator_table(operators))
    sections += part_sections(rows)
    layers = [row for row in rows if row["table"] == "layer"]
    failed = [f"- {row['job']}: {first_line(row['note'])}" for row in layers if "contender" not in row]
    layers = [row for row in layers if "contender" in row]
    if layers:
        sections += [verdicts_table(layer_verdicts(layers)), _LAYERS]
        for shape in dict.fromkeys(row["shape"] for row in layers):
            sections += _layer_tables(shape, [row for row in layers if row["shape"] == shape])
    return [*sections, *(["\n".join(failed)] if failed else [])]


def _ceilings(row: Row) -> str:
    rates = "; ".join(f"{row[dtype] / 1e12:,.0f} TFLOP/s in {dtype}" for dtype in ("bfloat16", "float32"))
    return (
        f"Ceilings of that run: {row['copy'] / 1e9:,.0f} GB/s copied, bytes read and written; "
        f"{row['read'] / 1e9:,.0f} GB/s read ({row['read_by']}); products at {rates}."
    )


def _operator_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if "operator" not in row:
            lines.append([row["job"].removeprefix("operator, "), "–", "–", "–", first_line(row["note"])])
            continue
        aim, holds = operator_aim(row)
        verdict = first_line(row["note"]) if row["note"] else "holds" if holds else "**does not hold**"
        time = "–" if row["median_ms"] is None else digits(row["median_ms"])
        lines.append([f"{row['operator']}, {row['case']}", time, _reached(row), aim, verdict])
    return table(["operator", "ms", "reached", "aim", ""], lines, "---")


def _reached(row: Row) -> str:
    if row["median_ms"] is None:
        return "–"
    if row.get("speedup") is not None:
        return f"{row['speedup']:.1f} times as fast as the loop, error {row['error_over_best']:.4f} times the best"
    if row["share"] is None:
        return f"{1e3 * row['median_ms']:.1f} µs"
    of = {"copy": "the copy bandwidth"}.get(row["ceiling"], f"the rate of products in {row['ceiling']}")
    return f"{row['share']:.0%} of {of}"


def _layer_tables(shape: str, rows: list[Row]) -> list[str]:
    tokens = sorted({row["tokens"] for row in rows})
    head = [counted(count) for count in tokens]
    by_name = {(row["contender"], row["tokens"]): row for row in rows}
    names = dict.fromkeys(row["contender"] for row in rows)
    times = [[name, *(layer_cell(by_name.get((name, count))) for count in tokens)] for name in names]
    costs = {(_layer_of(row), row["tokens"]): f"{row['bytes'] / 1e6:,.0f} · {digits(row['flops'] / 1e9)}" for row in rows}
    layers = dict.fromkeys(_layer_of(row) for row in rows)
    least = [[layer, *(costs.get((layer, count), "–") for count in tokens)] for layer in layers]
    return [
        f"#### {shape}, {rows[0]['dtype']}\n\n{table(['contender', *head], times)}{remarks(rows)}",
        table(["must move MB · multiply GFLOP", *head], least),
    ]


def _layer_of(row: Row) -> str:
    return f"{row['layer']}, dynamic" if row["dynamic"] else row["layer"]
