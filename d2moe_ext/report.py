"""Tables for a terminal, from the same dictionaries that ``--json`` prints. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")
_COUNT_UNITS = ("", "k", "M", "G", "T")


def _scaled(value: float, units: Sequence[str]) -> str:
    """Three digits and a unit, each 1000 of the one before."""
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value /= 1000
        power += 1
    digits = max(0, 3 - len(str(int(abs(value))))) if power else 0
    return f"{value:.{digits}f} {units[power]}".rstrip()


def human_bytes(value: float) -> str:
    """``14200000`` as ``14.2 MB``."""
    return _scaled(value, _BYTE_UNITS)


def human_count(value: float) -> str:
    """``6350000`` as ``6.35 M``."""
    return _scaled(value, _COUNT_UNITS)


def rank_range(ranks: Sequence[int]) -> str:
    """The ranks of a layer's experts: one number, or the least and the greatest."""
    least, greatest = min(ranks), max(ranks)
    return str(least) if least == greatest else f"{least}-{greatest}"


def plain_table(title: str, columns: Iterable[str]) -> Table:
    """A table whose first column is text and whose others are numbers."""
    # As wide as its title at least, which rich would wrap instead.
    width = len(title)
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False, min_width=width)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _before_after(title: str, plan: dict[str, Any]) -> Table:
    table = plain_table(title, ("", "before", "after", "after / before"))
    rows = (
        ("parameters stored", "total_parameters", "stored_parameters", human_count),
        ("parameters active per token", "active_parameters_before", "active_parameters_after", human_count),
        ("FLOPs per token", "flops_per_token_before", "flops_per_token_after", human_count),
        ("bytes read per token", "bytes_per_token_before", "bytes_per_token_after", human_bytes),
        ("bytes on disk, planned", "bytes_before", "bytes_after", human_bytes),
    )
    for label, before, after, human in rows:
        share = plan[after] / plan[before]
        table.add_row(label, human(plan[before]), human(plan[after]), f"{share:.3f}")
    return table


def _layer_table(layers: Sequence[dict[str, Any]]) -> Table:
    """Columns kept and multiplied, and ranks, a row per run of equal layers."""
    projections = list(layers[0]["ranks"])
    table = plain_table("Layers", ("layer", "gate/up columns", "down columns", *(f"{name} ranks" for name in projections)))
    groups: list[tuple[list[str], list[str]]] = []
    for layer in layers:
        cells = [f"{layer[f'{group}_kept']} stored, {layer[f'{group}_keep']} used" for group in ("gate_up", "down")]
        cells += [rank_range(layer["ranks"][name]) for name in projections]
        if groups and groups[-1][1] == cells:
            groups[-1][0].append(layer["name"])
        else:
            groups.append(([layer["name"]], cells))
    for names, cells in groups:
        label = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]} ({len(names)} layers)"
        table.add_row(label, *cells)
    return table


def plan_tables(plan: dict[str, Any], title: str) -> RenderableType:
    """What ``d2moe plan`` prints, from ``CompressionPlan.to_dict()``."""
    shares = Text(
        f"Ratio {plan['ratio']:.4f}: {plan['total_parameters']:,} parameters become {plan['compressed_parameters']:,}; "
        f"the deltas keep {100 * plan['delta_share']:.2f} % of their elements."
    )
    return Group(_before_after(title, plan), shares, Text(), _layer_table(plan["layers"]))


def compression_tables(record: dict[str, Any], out: str) -> RenderableType:
    """What ``d2moe compress`` prints, from the report it also writes beside the model."""
    plan = record["plan"]
    on_disk = record["bytes_on_disk"]
    difference = 100 * (on_disk / plan["bytes_after"] - 1)
    lines = [f"Ratio {plan['ratio']:.4f}; {human_bytes(on_disk)} on disk, {difference:+.2f} % from the plan: {out}"]
    lines += [
        f"Raised ridge {entry['ridge']:.0e}: {entry['projection']} of expert {entry['expert']} in {entry['layer']}"
        for entry in record["raised_ridges"]
    ]
    return Group(
        _before_after(record["model"], plan),
        _layer_table(plan["layers"]),
        _error_table(record["deltas"]),
        Text("\n".join(lines)),
    )


def _error_table(deltas: dict[str, dict[str, dict[str, list[float]]]]) -> Table:
    """What truncation left out of the deltas, in the norm they were whitened with: the mean over a layer's experts."""
    projections = list(next(iter(deltas.values())))
    table = plain_table("Relative error of the deltas", ("layer", *projections))
    for layer, entries in deltas.items():
        means = [sum(entries[name]["relative_error"]) / len(entries[name]["relative_error"]) for name in projections]
        table.add_row(layer, *(f"{mean:.3f}" for mean in means))
    return table


def evaluation_table(record: dict[str, Any]) -> RenderableType:
    """What ``d2moe eval`` prints."""
    table = plain_table("Perplexity", ("", "value"))
    table.add_row("perplexity", f"{record['perplexity']:.4f}")
    table.add_row("tokens scored", f"{record['tokens']:,}")
    table.add_row("window and stride", f"{record['seqlen']}, {record['stride']}")
    table.add_row("dynamic pruning", "on" if record["dynamic_pruning"] else "off")
    table.add_row("native operators", "yes" if record["native_operators"] else "no")
    table.add_row("seconds", f"{record['seconds']:.1f}")
    return table


def task_table(record: dict[str, Any]) -> RenderableType:
    """What ``d2moe eval --tasks`` prints."""
    table = plain_table("Tasks", ("task", "metric", "value", "stderr", "examples", "few-shot"))
    for score in record["scores"]:
        stderr = "" if score["stderr"] is None else f"{score['stderr']:.4f}"
        counts = ("" if score[key] is None else f"{score[key]:,}" for key in ("examples", "num_fewshot"))
        table.add_row(score["task"], score["metric"], f"{score['value']:.4f}", stderr, *counts)
    notes = (
        f"Dynamic pruning {'on' if record['dynamic_pruning'] else 'off'}, batch size {record['batch_size']}; native operators: "
        f"{'yes' if record['native_operators'] else 'no'}; {record['seconds']:.1f} s."
    )
    return Group(table, Text(notes))


def inspection_tables(record: dict[str, Any], title: str) -> RenderableType:
    """What ``d2moe inspect`` prints."""
    summary = plain_table(title, ("", "value"))
    summary.add_row("format version", str(record["format_version"]))
    summary.add_row("parameters stored", human_count(record["parameters"]))
    summary.add_row("bytes on disk", human_bytes(record["bytes_on_disk"]))
    for name, value in record["compression"].items():
        summary.add_row(name, str(value))
    sizes = plain_table("Sizes", ("layer", "experts", "bases", "parameters", "bytes"))
    for layer in record["layers"]:
        numbers = (
            str(layer["num_experts"]),
            str(layer["num_bases"]),
            human_count(layer["parameters"]),
            human_bytes(layer["bytes"]),
        )
        sizes.add_row(layer["name"], *numbers)
    return Group(summary, sizes, _layer_table(record["layers"]))


def demo_tables(result: dict[str, Any]) -> RenderableType:
    """What ``d2moe demo`` prints: one row a model, then a passage from each that was asked for one."""
    table = plain_table(
        "Before and after compression",
        ("model", "parameters", "bytes on disk", "bytes planned", "perplexity", "prefill tok/s", "generate tok/s"),
    )
    for row in result["rows"]:
        speeds = ["" if row[key] is None else f"{row[key]:,.0f}" for key in ("prefill", "generate")]
        sizes = (f"{row[key]:,}" for key in ("parameters", "bytes_on_disk", "bytes_planned"))
        table.add_row(row["label"], *sizes, f"{row['perplexity']:.3f}", *speeds)
    notes = Text(
        f"Perplexity over {result['tokens']:,} held-out tokens in windows of {result['window']}; compressed models "
        f"with dynamic pruning where the preset has it. Calibrated on {result['calibration_tokens']:,} tokens. Speed at "
        f"batch 1: the uncompressed model as transformers runs it, compressed ones through patch_model. "
        f"{result['seconds']:.0f} s in all."
    )
    passages = [
        Panel(Text.assemble((row["prompt"], "dim"), row["passage"]), title=row["label"], title_align="left")
        for row in result["rows"]
        if row["passage"] is not None
    ]
    return Group(table, notes, Text(), *passages)
