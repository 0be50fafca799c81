"""Every contender on every shape, dtype and number of tokens: groups that fit into memory, each with transformers' own."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.layer.fill import from_plan, plain_experts
from benchmarks.layer.shapes import VARIANTS, Variant, layer_plan, layer_view, spec_of, top_k_of
from d2moe_ext.bench.contenders import Contender, compressed_contenders, make_inputs, plain_contenders
from d2moe_ext.bench.layer import Setting, measure_cell
from d2moe_ext.bench.machine import available_memory

TOKENS = (1, 8, 64, 512, 2048)
# The paper's loop takes longest of all; once with long factors and once with few columns shows what it costs.
LOOPS = (("performance", 0.4), ("throughput", 0.6))
# Of the memory at hand; the rest is for activations and gathered weights.
_MEMORY_SHARE = 0.75
_UNKNOWN_MEMORY = 16 * 2**30


@dataclass(frozen=True)
class Sweep:
    """What to measure.

    Attributes:
        shapes, dtypes, tokens: every combination is a cell.
        contenders: parts of names; empty for all contenders.
        memory: bytes that weights may take at once; None: three quarters of what is free.
    """

    shapes: Sequence[str]
    dtypes: Sequence[str]
    tokens: Sequence[int]
    contenders: Sequence[str] = ()
    memory: int | None = None

    def wants(self, name: str) -> bool:
        """Whether a contender is among those asked for."""
        return not self.contenders or any(part in name for part in self.contenders)


def measure_sweep(sweep: Sweep, setting: Setting, progress: Callable[[str], None]) -> Iterator[list[dict[str, Any]]]:
    """The rows of one cell after another.

    Args:
        sweep: what to measure.
        setting: what floors are measured with, rounds and the cache flush.
        progress: called with a line before each cell.
    """
    for shape in sweep.shapes:
        for dtype in sweep.dtypes:
            yield from _measure_layer(sweep, shape, dtype, setting, progress)
            gc.collect()


def _measure_layer(
    sweep: Sweep, shape: str, dtype: str, setting: Setting, progress: Callable[[str], None]
) -> Iterator[list[dict[str, Any]]]:
    memory = sweep.memory or int(_MEMORY_SHARE * (available_memory() or _UNKNOWN_MEMORY))
    view = plain_experts(layer_view(shape), getattr(torch, dtype))
    plain = [c for c in plain_contenders(view) if sweep.wants(c.name)]
    wanted = [variant for variant in VARIANTS if any(map(sweep.wants, _names(variant)))]
    for group, variants in enumerate(groups_of(shape, wanted, getattr(torch, dtype).itemsize, memory)):
        contenders = plain + [c for variant in variants for c in variant_contenders(shape, variant, dtype)]
        contenders = [c for c in contenders if sweep.wants(c.name)]
        for tokens in sweep.tokens:
            progress(f"{shape}, {dtype}, {tokens} tokens: {len(contenders)} contenders")
            inputs = make_inputs(view.layout, top_k_of(shape), tokens, getattr(torch, dtype))
            rows = measure_cell(contenders, inputs, setting)
            yield [{"shape": shape, "group": group} | row | origin(row["layer"]) for row in rows]
        del contenders


def groups_of(shape: str, variants: Sequence[Variant], element_size: int, memory: int) -> list[list[Variant]]:
    """Compressed layers that are held beside the plain one at the same time; at least one a group, however large."""
    left = memory - shape_bytes(shape, element_size)
    groups: list[list[Variant]] = [[]]
    taken = 0
    for variant in variants:
        size = variant_bytes(shape, variant, element_size)
        if groups[-1] and taken + size > left:
            groups.append([])
            taken = 0
        groups[-1].append(variant)
        taken += size
    return groups


def shape_bytes(shape: str, element_size: int) -> int:
    """Of the plain layer's weights."""
    return layer_plan(shape, *VARIANTS[0]).shapes.weight_parameters * element_size


def variant_bytes(shape: str, variant: Variant, element_size: int) -> int:
    """Of a compressed layer's weights, its bases once as they are stored and once as the operators read them."""
    plan = layer_plan(shape, *variant)
    return (2 * plan.base_elements + plan.delta_elements) * element_size


def _names(variant: Variant) -> list[str]:
    layer = f"{variant[0]} {variant[1]}"
    return [layer, f"{layer}, dynamic", f"{layer}, loop"]


def variant_contenders(shape: str, variant: Variant, dtype: str, device: str = "cpu") -> list[Contender]:
    """Everyone who computes one compressed layer, in memory and filled."""
    plan = layer_plan(shape, *variant)
    module = from_plan(plan, spec_of(plan, layer_view(shape)), getattr(torch, dtype), device)
    return compressed_contenders(module, f"{variant[0]} {variant[1]}", loop=variant in LOOPS)


def origin(layer: str) -> dict[str, Any]:
    """Preset and ratio of a row's layer."""
    preset, _, ratio = layer.partition(" ")
    return {"preset": preset, "ratio": float(ratio)} if ratio else {"preset": None, "ratio": None}
