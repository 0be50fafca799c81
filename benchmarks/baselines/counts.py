"""How many whole experts a budget of bytes holds, and which layers they go to."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.baselines.routing import routed_parameters
from benchmarks.study import Calibration, byte_budget, model_parameters
from d2moe_ext.adapters import ExpertsView
from d2moe_ext.evaluate import perplexity

# Of the calibration text, what is read to choose between ways to spread experts over the layers.
CHOICE_TOKENS = 4096


def experts_within(model: nn.Module, views: Sequence[ExpertsView], budget: int, router_rows: bool, index_bytes: int = 0) -> int:
    """How many experts of all layers together fit into ``budget`` bytes beside the rest of the model.

    Args:
        router_rows: an expert that goes takes its row of the router along.
        index_bytes: what the method stores besides floats.

    Raises:
        ValueError: the layers' experts are of unlike size, or the rest of the model alone is larger.
    """
    costs = {routed_parameters(view) + router_rows * view.layout.hidden_size for view in views}
    if len(costs) != 1:
        raise ValueError(f"baselines: every layer's experts must have the same size, got {sorted(costs)} parameters.")
    cost = costs.pop()
    total = sum(view.layout.num_experts for view in views)
    rest = 2 * (model_parameters(model) - total * cost) + index_bytes
    if budget < rest:
        raise ValueError(f"baselines: the budget must hold the model without its experts, {rest} bytes, got {budget}.")
    return min(total, (budget - rest) // (2 * cost))


def spread(losses: Sequence[Sequence[float]], total: int, uniform: bool = False) -> list[int]:
    """The number of experts each layer keeps: the counts that sum to ``total`` at the least summed loss.

    Args:
        losses: per layer, the loss of keeping 0, 1, ..., E experts.
        total: the sum of the counts.
        uniform: counts may differ by one only.

    Returns:
        One count per layer, found exactly, by dynamic programming over the layers.
    """
    low = total // len(losses) if uniform else 0
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for layer in losses:
        high = min(low + 1, len(layer) - 1) if uniform else len(layer) - 1
        following: dict[int, tuple[float, list[int]]] = {}
        for used, (loss, counts) in best.items():
            for count in range(low, high + 1):
                candidate = (loss + layer[count], [*counts, count])
                key = used + count
                if key <= total and (key not in following or candidate < following[key]):
                    following[key] = candidate
        best = following
    return best[total][1]


def choose_counts(
    model: PreTrainedModel,
    calibration: Calibration,
    losses: Sequence[Sequence[float]],
    total: int,
    apply: Callable[[PreTrainedModel, list[int]], None],
) -> list[int]:
    """The number of experts each layer keeps, ``total`` in all, where a paper's equal numbers leave a remainder or do badly.

    Three ways are tried: as equal as can be, by the summed losses as they are, and by the losses relative to each layer's own.
    The one with the lowest perplexity on the first calibration tokens is taken. (On the shipped model, at ratios 0.4, 0.6 and
    0.75, it also had the lowest on selection text for NAEE, REAP and HC-SMoE; none of the three ways always had.)

    Args:
        losses: per layer, the loss of keeping 0, 1, ..., E experts; infinite where none may not be.
        apply: compresses a copy of ``model`` by the counts it is given.
    """
    scales = [layer[0] if math.isfinite(layer[0]) else layer[1] for layer in losses]
    relative = [[loss / max(scale, 1e-30) for loss in layer] for layer, scale in zip(losses, scales, strict=True)]
    candidates = [spread(relative, total, uniform=True), spread(relative, total), spread(losses, total)]
    distinct = [counts for place, counts in enumerate(candidates) if counts not in candidates[:place]]
    if len(distinct) == 1:
        return distinct[0]
    window = calibration.batches[0].shape[1]
    text = torch.cat([batch.flatten() for batch in calibration.batches])[:CHOICE_TOKENS]
    measured = []
    for counts in distinct:
        trial = copy.deepcopy(model)
        apply(trial, counts)
        measured.append((perplexity(trial, text, window=window).perplexity, counts))
    return min(measured)[1]


def budget_of(model: nn.Module, ratio: float) -> int:
    """``byte_budget``, after refusing a ratio that no method can mean.

    Raises:
        ValueError: ``ratio`` outside 0 <= ratio < 1.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"baselines: ratio must lie in 0 <= ratio < 1, got {ratio}.")
    return byte_budget(model, ratio)
