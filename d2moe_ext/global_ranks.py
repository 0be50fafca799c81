"""Ranks chosen over the whole model at once (design section 2.5, two-sided).

With two-sided whitening the loss that rank step i of expert e saves is about ``σ_i²``, comparable across
experts, projections and layers: so steps are bought greedily by what they save per parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from d2moe_ext.budget import LANDING_SHARE, CompressionPlan, delta_budget, rank_step


def _step_bounds(longest: int, finer: int = 1) -> list[int]:
    """Rank after each step: 8, 16, …, 64, 80, 96, …, the last one cut at ``longest``; ``finer`` divides the steps."""
    bounds = [0]
    while bounds[-1] < longest:
        bounds.append(min(bounds[-1] + rank_step(bounds[-1]) // finer, longest))
    return bounds


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
    budget = delta_budget(plan.model, plan.config, bare)
    density, cost, step_owner = [], [], []
    for index, layer in enumerate(bare):
        for name, (out, inp) in layer.shapes.delta_shapes(layer.joint).items():
            bounds = _step_bounds(min(out, inp), finer)
            for expert, values in enumerate(savings[index][name]):
                total = np.concatenate([[0.0], np.cumsum(values)])
                for low, high in pairwise(bounds):
                    price = (high - low) * (out + inp)
                    density.append((total[high] - total[low]) / price)
                    cost.append(price)
                    step_owner.append((index, name, expert, low, high))
    ranks = [{n: list(r) for n, r in layer.ranks.items()} for layer in bare]
    spent = 0
    # A stable sort keeps an expert's own steps in order where savings tie.
    for position in np.argsort(-np.asarray(density), kind="stable"):
        index, name, expert, low, high = step_owner[position]
        if ranks[index][name][expert] == low and spent + cost[position] <= budget:
            ranks[index][name][expert] = high
            spent += cost[position]
    layers = tuple(replace(layer, ranks=r) for layer, r in zip(bare, ranks, strict=True))
    return replace(plan, layers=layers)
