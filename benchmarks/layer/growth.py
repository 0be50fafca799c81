"""How the operators' time grows with tokens, experts, rank and kept columns, each swept with the rest fixed.

Time and floor are fitted to ``c · size^a`` by least squares on logarithms. A cost that the floor does not have (a loop over
experts that no token reached, a product that is not blocked) shows as a larger exponent than the floor's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import transformers
from rich.console import Group, RenderableType
from rich.text import Text

from benchmarks.layer.fill import compressed_experts, plain_experts
from d2moe_ext.adapters import ExpertsView, find_experts
from d2moe_ext.bench.contenders import Contender, compressed_contenders, make_inputs, plain_contenders
from d2moe_ext.bench.layer import Setting, measure_cell
from d2moe_ext.experts import D2MoEExperts
from d2moe_ext.report import plain_table
from d2moe_ext.report_bench import floors_line
from d2moe_ext.spec import DeltaSpec, ExpertsSpec, GroupSpec

TOLERATED = 0.1


@dataclass(frozen=True)
class Size:
    """A layer and a number of tokens; the defaults are what stays fixed. ``kept`` is a share of the base's columns."""

    tokens: int = 64
    experts: int = 64
    rank: int = 128
    kept: float = 0.75
    hidden_size: int = 2048
    intermediate_size: int = 1408
    top_k: int = 6


START = Size()
SWEEPS: dict[str, tuple[float, ...]] = {
    "tokens": (1, 4, 16, 64, 256, 1024),
    "experts": (8, 16, 32, 64, 128),
    "rank": (32, 64, 128, 256, 512),
    "kept": (0.25, 0.5, 0.75, 1.0),
}
# An uncompressed layer has neither ranks nor columns to keep.
PLAIN_SWEEPS = ("tokens", "experts")


def measure_growth(
    dtypes: Sequence[str],
    setting: Setting,
    progress: Callable[[str], None],
    start: Size | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """A row for every point of every sweep, compressed and plain.

    Args:
        dtypes: each is swept.
        setting: what floors are measured with, rounds and the cache flush.
        progress: called with a line before each point.
        start: what stays fixed; None: :data:`START`.
    """
    for dtype in dtypes:
        for swept, values in SWEEPS.items():
            for value in values:
                size = replace(start or START, **{swept: value})
                progress(f"growth with {swept}, {dtype}: {value:g}")
                contenders = _contenders(size, getattr(torch, dtype), plain=swept in PLAIN_SWEEPS)
                layout = _view(size).layout
                inputs = make_inputs(layout, size.top_k, size.tokens, getattr(torch, dtype))
                about = {"shape": "growth", "swept": swept, "value": value} | asdict(size)
                yield [about | row for row in measure_cell(contenders, inputs, setting)]


def _view(size: Size) -> ExpertsView:
    config = transformers.Qwen2MoeConfig(
        vocab_size=8,
        hidden_size=size.hidden_size,
        moe_intermediate_size=size.intermediate_size,
        num_experts=size.experts,
        num_hidden_layers=1,
    )
    with torch.device("meta"):
        return find_experts(transformers.AutoModelForCausalLM.from_config(config))[0]


def _contenders(size: Size, dtype: torch.dtype, plain: bool) -> list[Contender]:
    view = _view(size)
    found = compressed_contenders(_compressed(size, view, dtype), "compressed")
    if plain:
        found += plain_contenders(plain_experts(view, dtype))
    return [c for c in found if c.kind == "native"]


def _compressed(size: Size, view: ExpertsView, dtype: torch.dtype) -> D2MoEExperts:
    groups = [
        GroupSpec(1, max(1, round(size.kept * n)), max(1, round(size.kept * n)))
        for n in (size.hidden_size, size.intermediate_size)
    ]
    rows = size.experts * size.rank
    names = ("gate", "up", "down")
    spec = ExpertsSpec(view.layout, groups[0], groups[1], {name: DeltaSpec(rows, rows) for name in names})
    return compressed_experts(spec, {name: [size.rank] * size.experts for name in names}, dtype)


def exponents(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every sweep in ``rows``: the exponents of time and floor, and whether the first exceeds the second by too much."""
    sweeps: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["median_ms"] is not None:
            sweeps.setdefault((row["dtype"], row["contender"], row["swept"]), []).append(row)
    fitted = []
    for (dtype, contender, swept), points in sweeps.items():
        if len({row["value"] for row in points}) < 2:
            continue
        values = [row["value"] for row in points]
        time, floor = (slope(values, [row[key] for row in points]) for key in ("median_ms", "floor_ms"))
        about = {"dtype": dtype, "contender": contender, "swept": swept, "points": points}
        fitted.append(about | {"time": time, "floor": floor, "flagged": time > floor + TOLERATED})
    return fitted


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent a of the least-squares fit of ``values`` to ``c · sizes^a``."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread


def growth_tables(record: dict[str, Any]) -> RenderableType:
    """What ``--growth`` prints."""
    table = plain_table("Exponents", ("layer", "dtype", "swept", "from-to", "ms", "time", "floor", ""))
    for fit in exponents(record["rows"]):
        first, last = fit["points"][0], fit["points"][-1]
        table.add_row(
            fit["contender"],
            fit["dtype"],
            fit["swept"],
            f"{first['value']:g}-{last['value']:g}",
            f"{first['median_ms']:.2f}-{last['median_ms']:.2f}",
            f"{fit['time']:.2f}",
            f"{fit['floor']:.2f}",
            f"exceeds the floor's by more than {TOLERATED:g}" if fit["flagged"] else "",
        )
    return Group(Text(floors_line(record)), Text(), table)
