"""REAP: drop the experts that add least to their layer's output while they are at work.

Lasby et al. (Cerebras), "REAP the Experts: Why Pruning Prevails for One-Shot MoE compression", 2025 (arXiv
2510.13999): the saliency of an expert is the mean, over the tokens routed to it, of the router's weight times the norm
of its output. One-shot, without fine-tuning, in the paper as here.

The paper prunes the same share of every layer; here that is one of three ways to spread the experts that stay, and the best on
calibration text is taken (:func:`benchmarks.baselines.counts.choose_counts`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.baselines.counts import budget_of, choose_counts, experts_within
from benchmarks.baselines.outputs import dense_weights, expert_outputs
from benchmarks.baselines.routing import keep_experts, round_as_stored
from benchmarks.study import Calibration, LayerInputs, model_parameters
from d2moe_ext.adapters import ExpertsView, find_experts


@torch.no_grad()
def saliency(view: ExpertsView, inputs: LayerInputs) -> Tensor:
    """``[E]``: mean of ``g·‖f_e(x)‖₂`` over an expert's tokens; 0 for an expert that no token reached."""
    norms = expert_outputs(view, inputs.hidden_states).norm(dim=2).T
    weights = dense_weights(inputs.top_k_index, inputs.top_k_weights, view.layout.num_experts)
    return (weights * norms).sum(0) / (weights != 0).sum(0).clamp_min(1)


def _losses(descending: Tensor) -> list[float]:
    """The summed saliency of what goes where 0, 1, ..., E experts stay."""
    return [float(descending[count:].sum()) for count in range(len(descending) + 1)]


def reap(model: PreTrainedModel, calibration: Calibration, ratio: float) -> int:
    """Drop the experts of the lowest saliency, in place.

    Returns:
        Stored bytes of the whole model.

    Raises:
        ValueError: a ratio out of range or out of reach, or a router of another kind.
    """
    budget = budget_of(model, ratio)
    views = find_experts(model)
    round_as_stored(model)
    total = experts_within(model, views, budget, router_rows=True)
    scores = [saliency(view, calibration.inputs[view.name]) for view in views]
    orders = [score.argsort(descending=True, stable=True) for score in scores]
    losses = [_losses(score[order]) for score, order in zip(scores, orders, strict=True)]

    def prune(changed: PreTrainedModel, counts: list[int]) -> None:
        for view, order, count in zip(find_experts(changed), orders, counts, strict=True):
            keep_experts(view, order[:count].tolist())

    prune(model, choose_counts(model, calibration, losses, total, prune))
    return 2 * model_parameters(model)
