"""Right Grams whose tokens are weighted, each from a calibration pass of its own over the same sequences.

``router``: ``G[e] = Σ g_t² x xᵀ · n / Σ g_t²``, g the router's weight; the same of h for down. ``gradient``:
``G[e] = Σ ‖δ_t‖² x xᵀ · n / Σ ‖δ_t‖²``, δ the loss gradient at the projection's output: with ``B = Σ δδᵀ`` the first step
towards the Kronecker product nearest to ``Σ δδᵀ ⊗ xxᵀ``. Both keep the sum of the weights at n, so that the shrinkage and
the ranks read them like plain Grams. Cost: one more forward pass, or forward and backward; nothing more is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from benchmarks.quality.beyond.pipeline import compress_stored, diagonal
from benchmarks.study import Calibration, Method
from d2moe_ext.adapters import ExpertsView, find_experts
from d2moe_ext.calibration import (
    CalibrationStats,
    LayerStats,
    _Accumulators,
    _BackwardPass,
    _ForwardPass,
    _frozen,
    _run_backward,
    _run_forward,
    _silent,
    sequences_of,
)

Weighting = Literal["router", "gradient"]


class WeightedGrams:
    """``Σ w x xᵀ`` and ``Σ w`` of each expert and projection of one layer."""

    def __init__(self, stats: LayerStats) -> None:
        self.sums = {"gate_up": torch.zeros_like(stats.gram_gate_up), "down": torch.zeros_like(stats.gram_down)}
        self.mass = {name: torch.zeros(len(stats.tokens), dtype=torch.float64) for name in self.sums}

    def add(self, name: str, expert: int, x: Tensor, weight: Tensor) -> None:
        """Add ``x [n, in]``, weighted by ``weight [n]``, at least 0."""
        rows = x.double() * weight.double().sqrt()[:, None]
        self.sums[name][expert] += rows.T @ rows
        self.mass[name][expert] += weight.double().sum()

    def taken(self, stats: LayerStats) -> LayerStats:
        """The statistics with these Grams, each scaled to a mean weight of 1; where no weight came, the plain ones."""
        changed = {}
        for name, plain in (("gate_up", stats.gram_gate_up), ("down", stats.gram_down)):
            mass = self.mass[name]
            scale = torch.where(mass > 0, stats.tokens / torch.where(mass > 0, mass, 1.0), 0.0)[:, None, None]
            changed[name] = torch.where(mass[:, None, None] > 0, self.sums[name] * scale, plain)
        return replace(stats, gram_gate_up=changed["gate_up"], gram_down=changed["down"])


class _RouterPass(_ForwardPass):
    """Weighs each token by the square of its router's weight."""

    def __init__(self, view: ExpertsView, stats: LayerStats, grams: WeightedGrams) -> None:
        super().__init__(view, replace(stats, down_energy=torch.zeros_like(stats.down_energy)))
        self.grams = grams

    def _expert(self, expert: int, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        view = self.view
        activated = view.apply_gate(linear(x, view.gate_up_weight(expert), view.gate_up_bias(expert)))
        result = view.post_expert_norm(linear(activated, view.down_weight(expert), view.down_bias(expert)))
        self.grams.add("gate_up", expert, x, weight.square())
        self.grams.add("down", expert, activated, weight.square())
        return activated, result.float() * weight.float()[:, None]

    def finish(self) -> None:
        """Nothing: the plain statistics were checked when they were taken."""


class _GradientPass(_BackwardPass):
    """Weighs each token by the squared norm of its loss gradient."""

    def __init__(self, view: ExpertsView, stats: LayerStats, grams: WeightedGrams) -> None:
        super().__init__(view, replace(stats, left_gram={}), "frequency", None, _Accumulators(None))
        self.grams = grams

    def _observe(self, name: str, expert: int) -> Callable[[Tensor, Tensor], None]:
        return lambda x, delta: self.grams.add(name, expert, x, delta.square().sum(1))


def weighted_stats(
    model: PreTrainedModel, batches: list[Tensor], stats: CalibrationStats, weighting: Weighting
) -> CalibrationStats:
    """``stats`` with weighted right Grams."""
    views, stacks = find_experts(model), sequences_of(batches)
    grams = {view.name: WeightedGrams(stats.layers[view.name]) for view in views}
    with _frozen(model):
        if weighting == "router":
            _run_forward(model, [_RouterPass(v, stats.layers[v.name], grams[v.name]) for v in views], stacks, _silent)
        else:
            _run_backward(model, [_GradientPass(v, stats.layers[v.name], grams[v.name]) for v in views], stacks, _silent)
    return replace(stats, layers={name: grams[name].taken(layer) for name, layer in stats.layers.items()})


def weighted_method(weighting: Weighting, **options: Any) -> Method:
    """The default on weighted right Grams and diagonal left ones."""

    def method(model: PreTrainedModel, calibration: Calibration, ratio: float) -> int:
        stats = weighted_stats(model, calibration.batches, diagonal(calibration.stats), weighting)
        return compress_stored(model, stats, ratio, **options)

    return method
