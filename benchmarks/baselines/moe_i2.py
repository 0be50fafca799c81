"""MoE-I²: whole experts go first, then what stays is truncated, important experts less.

Yang et al., "MoE-I²: Compressing Mixture of Experts Models through Inter-Expert Pruning and Intra-Expert Low-Rank
Decomposition", Findings of EMNLP 2024 (arXiv 2411.01016).

Stage 1. An expert's importance is what its layer's output loses when the expert is removed. Important layers lose fewer
experts, and in each the set of experts to keep is the one with the least loss of the layer's output: the paper finds it by a
genetic search; with 8 experts all sets are tried. The paper then chooses among several good sets of neighbouring layers by
their joint output; here each layer takes its best set, and how many each layer loses is chosen by these losses on
calibration text (:func:`benchmarks.baselines.counts.choose_counts`).

Stage 2. The experts that stay are truncated to ranks that grow with their importance. The paper truncates plainly and then
fine-tunes with LoRA; nothing is trained here, so the truncation is whitened with the expert's Gram, which needs no training
to be of use.

The split of the budget: the paper prunes 25 % of the experts and then removes 40 % of what stays, so that 45 % are left.
For other budgets, a share ``x`` of the experts' parameters is split alike in logarithms: ``x ** PRUNING_SHARE`` of the experts
stay. On selection text at ratios 0.4 and 0.6, exponents from 0 (no pruning) to 1 (only pruning) did not do better by more than
0.2 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from benchmarks.baselines.counts import budget_of, choose_counts
from benchmarks.baselines.naee import best_subsets
from benchmarks.baselines.outputs import SubsetLoss
from benchmarks.baselines.ranks import Matrix, ranks_within, truncate
from benchmarks.baselines.routing import (
    keep_experts,
    projection_weight,
    projections,
    round_as_stored,
    routed_parameters,
)
from benchmarks.study import Calibration, model_parameters
from d2moe_ext.adapters import ExpertsView, find_experts

PRUNING_SHARE = math.log(0.75) / math.log(0.45)

# Ranks in a layer go as (importance / the layer's mean + SMOOTHING) ** EXPONENT, so that an expert that is hardly missed
# keeps some rank.
SMOOTHING = 0.3
EXPONENT = 1.0


def importance(loss: SubsetLoss) -> list[float]:
    """Per expert, the loss of the layer's output when that expert alone is removed."""
    everyone = range(loss.num_experts)
    return [loss([other for other in everyone if other != expert]) for expert in everyone]


def rank_weights(scores: Sequence[float]) -> list[float]:
    """What the experts' ranks are proportional to, averaging 1 over the layer."""
    mean = max(sum(scores) / max(len(scores), 1), 1e-30)
    raw = [(score / mean + SMOOTHING) ** EXPONENT for score in scores]
    return [value * len(raw) / sum(raw) for value in raw]


def experts_to_keep(share: float, num_experts: int) -> int:
    """How many of ``num_experts`` stage 1 leaves where ``share`` of their parameters stays in the end."""
    return min(math.ceil(max(share, 0.0) ** PRUNING_SHARE * num_experts), num_experts)


@dataclass(frozen=True)
class _Kept:
    """A layer after stage 1: its surviving experts and their importance."""

    view: ExpertsView
    experts: tuple[int, ...]
    scores: list[float]

    def matrices(self) -> list[tuple[int, str, Matrix]]:
        """Expert, projection and the matrix to truncate."""
        return [
            (expert, name, Matrix(*projection_weight(self.view, name, expert).shape, weight))
            for expert, weight in zip(self.experts, rank_weights(self.scores), strict=True)
            for name in projections(self.view)
        ]


def prune_layers(model: PreTrainedModel, views: Sequence[ExpertsView], calibration: Calibration, total: int) -> list[_Kept]:
    """Stage 1: which experts stay, ``total`` of them over all layers. Nothing is changed yet."""
    losses = [SubsetLoss(view, calibration.inputs[view.name]) for view in views]
    best = [best_subsets(loss) for loss in losses]

    def prune(changed: PreTrainedModel, counts: list[int]) -> None:
        for view, layer, count in zip(find_experts(changed), best, counts, strict=True):
            keep_experts(view, layer[count][1])

    counts = choose_counts(model, calibration, [[loss for loss, _ in layer] for layer in best], total, prune)
    kept = []
    for view, loss, layer, count in zip(views, losses, best, counts, strict=True):
        scores = importance(loss)
        experts = layer[count][1]
        kept.append(_Kept(view, experts, [scores[expert] for expert in experts]))
    return kept


def moe_i2(model: PreTrainedModel, calibration: Calibration, ratio: float) -> int:
    """Drop the least important experts, then truncate the others by their importance, in place.

    Returns:
        Stored bytes of the whole model.

    Raises:
        ValueError: a ratio out of range or out of reach, or a router of another kind.
    """
    budget = budget_of(model, ratio) // 2
    views = find_experts(model)
    round_as_stored(model)
    available = sum(view.layout.num_experts * routed_parameters(view) for view in views)
    share = 1 - (model_parameters(model) - budget) / available
    layers = prune_layers(model, views, calibration, experts_to_keep(share, sum(view.layout.num_experts for view in views)))
    places = [(layer, expert, name, matrix) for layer in layers for expert, name, matrix in layer.matrices()]
    matrices = [matrix for *_, matrix in places]
    dense = sum(matrix.rows * matrix.columns for matrix in matrices)
    gone = sum(
        (layer.view.layout.num_experts - len(layer.experts)) * (routed_parameters(layer.view) + layer.view.layout.hidden_size)
        for layer in layers
    )
    rest = model_parameters(model) - gone - dense
    ranks = ranks_within(matrices, budget - rest)
    chosen = {(layer.view.name, e, name): rank for (layer, e, name, _), rank in zip(places, ranks, strict=True)}
    for layer in layers:
        view = layer.view
        for expert in layer.experts:
            wanted = {name: chosen[view.name, expert, name] for name in projections(view)}
            truncate(view, calibration.stats.layers[view.name], expert, wanted)
        keep_experts(view, layer.experts)
    return 2 * (rest + sum(matrix.cost(rank) for matrix, rank in zip(matrices, ranks, strict=True)))
