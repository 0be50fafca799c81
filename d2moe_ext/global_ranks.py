"""Ranks chosen over the whole model at once (design section 2.5, two-sided).

With two-sided whitening the loss that rank step i of expert e saves is about ``σ_i²``, comparable across
experts, projections and layers: so steps are bought greedily by what they save per parameter. Greedy buying needs that
savings per parameter fall from step to step. A further rank of gauge-fixed factors costs less than the one before it, so
steps are joined until they do; what is left over at the end buys single steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from d2moe_ext.budget import LANDING_SHARE, CompressionPlan, LayerPlan, delta_budget, rank_step
from d2moe_ext.factor_cost import Purse


def _step_bounds(longest: int, finer: int = 1) -> list[int]:
    """Rank after each step: 8, 16, …, 64, 80, 96, …, the last one cut at ``longest``; ``finer`` divides the steps."""
    bounds = [0]
    while bounds[-1] < longest:
        bounds.append(min(bounds[-1] + rank_step(bounds[-1]) // finer, longest))
    return bounds


def concave_points(prices: Sequence[float], savings: Sequence[float]) -> list[int]:
    """Which points lie on the upper concave hull: between them the saving per price falls, as greedy buying needs.

    Args:
        prices: ascending.
        savings: one for each price, ascending too.

    Returns:
        Their places, the first and the last among them.
    """
    hull: list[int] = []
    for point in range(len(prices)):
        while len(hull) > 1:
            first, last = hull[-2], hull[-1]
            before = (savings[last] - savings[first]) * (prices[point] - prices[first])
            if before >= (savings[point] - savings[first]) * (prices[last] - prices[first]):
                break
            hull.pop()
        hull.append(point)
    return hull


@dataclass(frozen=True)
class _Step:
    """Raise one delta's rank from ``low`` to ``high``."""

    layer: int
    name: str
    expert: int
    low: int
    high: int
    density: float


def choose_global_ranks(plan: CompressionPlan, savings: Sequence[Mapping[str, Sequence[np.ndarray]]]) -> CompressionPlan:
    """The plan with its ranks chosen by greatest saving per parameter.

    Args:
        plan: columns and budget; its ranks are replaced.
        savings: per layer and projection, for each expert the array ``σ_i²``, descending,
            ``min(out, in)`` long.
    """
    finer = 1
    while True:
        chosen = _greedy_ranks(plan, savings, finer)
        target = (1 - plan.config.ratio) * plan.model.total_parameters
        # As for uniform ranks: only models far smaller than any real one need a finer step than the kernels' own.
        if chosen.compressed_parameters >= (1 - LANDING_SHARE) * target or finer == 8:
            return chosen
        finer *= 2


def _greedy_ranks(plan: CompressionPlan, savings: Sequence[Mapping[str, Sequence[np.ndarray]]], finer: int) -> CompressionPlan:
    bare = [replace(layer, ranks={n: [0] * len(r) for n, r in layer.ranks.items()}) for layer in plan.layers]
    purse = Purse(delta_budget(plan.model, plan.config, bare))
    joined, single = _steps(bare, savings, finer)
    for steps in (joined, single):
        # A stable sort keeps an expert's own steps in order where savings tie.
        for step in sorted(steps, key=lambda step: -step.density):
            ranks = bare[step.layer].ranks[step.name]
            cost = bare[step.layer].factor_costs[step.name]
            if ranks[step.expert] == step.low and purse.buy((step.layer, step.name), cost, step.low, step.high):
                ranks[step.expert] = step.high
    return replace(plan, layers=tuple(bare))


def _steps(
    layers: Sequence[LayerPlan], savings: Sequence[Mapping[str, Sequence[np.ndarray]]], finer: int
) -> tuple[list[_Step], list[_Step]]:
    """Every delta's steps joined until their savings per parameter fall, and its single steps."""
    joined: list[_Step] = []
    single: list[_Step] = []
    for index, layer in enumerate(layers):
        for name, cost in layer.factor_costs.items():
            bounds = _step_bounds(cost.longest, finer)
            prices = [cost.of(bound) for bound in bounds]
            for expert, values in enumerate(savings[index][name]):
                total = np.concatenate([[0.0], np.cumsum(values)])[bounds].tolist()
                for points, steps in ((concave_points(prices, total), joined), (range(len(bounds)), single)):
                    for a, b in pairwise(points):
                        density = (total[b] - total[a]) / (prices[b] - prices[a])
                        steps.append(_Step(index, name, expert, bounds[a], bounds[b], density))
    return joined, single
