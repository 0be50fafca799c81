"""One MoE layer at the shapes of published models: everybody in one process, on the same inputs, with a cold L2 cache.

Contenders are those of the CPU's table (:mod:`benchmarks.layer.sweep`) without the preset ``quality``; with few tokens,
``batched_mm`` and this package's operators also in a CUDA graph. A row holds what the forward must read, write and multiply,
and the least time for that at the run's own ceilings.
"""

from __future__ import annotations

import gc
from typing import Any

import torch

from benchmarks.gpu.ceilings import floors_from
from benchmarks.gpu.timing import Stopwatch
from benchmarks.layer.fill import plain_experts
from benchmarks.layer.shapes import SHAPES, VARIANTS, layer_view, top_k_of
from benchmarks.layer.sweep import origin, variant_contenders
from d2moe_ext.adapters import ExpertsLayout
from d2moe_ext.bench.contenders import Contender, Routed, make_inputs, plain_contenders
from d2moe_ext.bench.layer import Setting, measure_cell
from d2moe_ext.bench.timing import Budget

KIND = "layer"
DTYPE = "bfloat16"
TOKENS = (1, 16, 64, 512, 4096)
GRAPH_TOKENS = (1, 64)
FIRST_SHAPES, FIRST_TOKENS = ("Mixtral-8x7B", "Qwen3-30B-A3B"), (1, 64, 4096)
PRESETS = ("performance", "throughput")
BUDGET = Budget(repeats=60, seconds=2.0, least=9)
# Of the GPU's memory, for the weights that batched_mm gathers.
GATHERED_SHARE = 0.25
# A layer in a graph and one without are two ways of the same contender: what pruning saves shows within each way alone.
_ONLY_ON_CPU = ("saved_ms", "threads")

Cell = tuple[str, int]


def cells() -> list[Cell]:
    """Shapes and numbers of tokens, those that say most first."""
    first = [(shape, tokens) for shape in FIRST_SHAPES for tokens in FIRST_TOKENS]
    shapes = [*FIRST_SHAPES, *(shape for shape in SHAPES if shape not in FIRST_SHAPES)]
    return first + [(shape, tokens) for shape in shapes for tokens in TOKENS if (shape, tokens) not in first]


class Layers:
    """The layers of one shape at a time, kept on the device from cell to cell."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch
        self._shape: str | None = None
        self._contenders: list[Contender] = []
        self._layout: ExpertsLayout | None = None

    @torch.no_grad()
    def measure(self, cell: Cell, ceilings: dict[str, Any]) -> list[dict[str, Any]]:
        """A row for every contender.

        Args:
            cell: shape and tokens.
            ceilings: what floors are made of.
        """
        shape, tokens = cell
        self._make(shape)
        assert self._layout is not None  # _make
        watch = self._watch
        inputs = make_inputs(self._layout, top_k_of(shape), tokens, getattr(torch, DTYPE), device=watch.device)
        setting = Setting(floors_from(ceilings), BUDGET, watch.flush, watch.contender_seconds, failures_are_rows=True)
        found = measure_cell([*self._contenders, *self._in_graphs(inputs)], inputs, setting)
        rows = [{"shape": shape} | row | origin(row["layer"]) for row in found]
        self._release()
        return [{name: value for name, value in row.items() if name not in _ONLY_ON_CPU} for row in rows]

    def _in_graphs(self, inputs: tuple[Routed, ...]) -> list[Contender]:
        if inputs[0].hidden_states.shape[0] not in GRAPH_TOKENS:
            return []
        some = [c for c in self._contenders if c.kind == "native" or c.name == "batched_mm"]
        return [self._watch.graphed(c, inputs) for c in some]

    def _make(self, shape: str) -> None:
        if self._shape == shape:
            return
        self.free()
        device = self._watch.device
        view = plain_experts(layer_view(shape), getattr(torch, DTYPE), device)
        contenders = plain_contenders(view, int(GATHERED_SHARE * self._watch.memory))
        for variant in VARIANTS:
            if variant[0] in PRESETS:
                contenders += variant_contenders(shape, variant, DTYPE, device)
        self._shape, self._layout, self._contenders = shape, view.layout, contenders

    def free(self) -> None:
        """Let go of the layers that are held."""
        self._shape, self._layout, self._contenders = None, None, []
        self._release()

    def _release(self) -> None:
        """Give back the memory of what is gone, a graph's among it: a later graph cannot take it over."""
        gc.collect()
        if self._watch.device == "cuda":
            torch.cuda.empty_cache()
