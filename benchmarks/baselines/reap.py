"""REAP: drop the experts that add least to their layer's output while they are at work.

Lasby et al. (Cerebras), "REAP the Experts: Why Pruning Prevails for One-Shot MoE compression", 2025 (arXiv
2510.13999): the saliency of an expert is the mean, over the tokens routed to it, of the router's weight times the norm
of its output. One-shot, without fine-tuning, in the paper as here.

The paper prunes the same share of every layer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.baselines.counts import budget_of, experts_within, spread
from benchmarks.baselines.outputs import dense_weights, expert_outputs
from benchmarks.baselines.routing import keep_experts, round_as_stored
from benchmarks.study import Calibration, LayerInputs, model_parameters
from d2moe_ext.adapters import ExpertsView, find_experts

UNIFORM = True


@torch.no_grad()
def saliency(view: ExpertsView, inputs: LayerInputs) -> Tensor:
    """``[E]``: mean of ``g·‖f_e(x)‖₂`` over an expert's tokens; 0 for an expert that no token reached."""
    norms = expert_outputs(view, inputs.hidden_states).norm(dim=2).T
    weights = dense_weights(inputs.top_k_index, inputs.top_k_weights, view.layout.num_experts)
    return (weights * norms).sum(0) / (weights != 0).sum(0).clamp_min(1)


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
    losses = []
    for score, order in zip(scores, orders, strict=True):
        kept = torch.cat([score.new_zeros(1), score[order].cumsum(0)])
        losses.append((1 - kept / kept[-1].clamp_min(1e-30)).tolist())
    for view, order, count in zip(views, orders, spread(losses, total, UNIFORM), strict=True):
        keep_experts(view, order[:count].tolist())
    return 2 * model_parameters(model)
