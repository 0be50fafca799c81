"""Common surgery on an MoE layer: dropping experts with their router rows, and writing other weights in their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.study import stored
from d2moe_ext.adapters import ExpertsView, FusedExperts


class NoExperts(nn.Module):
    """Stands where a layer has lost all its routed experts: they add nothing to the residual stream."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Zeros like ``hidden_states [T, H]``."""
        return torch.zeros_like(hidden_states)


def router_of(view: ExpertsView) -> Any:
    """The layer's router: a module beside the experts that holds ``weight [E, H]``, ``top_k`` and nothing else.

    Such routers (Mixtral's, Qwen-MoE's, OLMoE's) return ``(logits, top_k_weights, top_k_index)`` and keep working when
    rows are taken from their weight.

    Raises:
        ValueError: the layer's router is of another kind: with a bias, with groups of experts, or no such module.
    """
    shape = (view.layout.num_experts, view.layout.hidden_size)
    for child in view.block.children():
        own = {name: tuple(tensor.shape) for name, tensor in child.state_dict().items()}
        if own == {"weight": shape} and hasattr(child, "top_k") and getattr(child, "topk_method", "greedy") == "greedy":
            return child
    raise ValueError(
        f"baselines: the router of {view.name} must hold nothing but weight {list(shape)} and route by top_k, "
        f"got none in {type(view.block).__name__}."
    )


def _fused(view: ExpertsView) -> FusedExperts:
    if not isinstance(view, FusedExperts):
        raise ValueError(f"baselines: the experts of {view.name} must be stacked in one module, got {type(view).__name__}.")
    return view


def projections(view: ExpertsView) -> dict[str, slice]:
    """The rows that each projection takes in its group: ``gate`` and ``up`` (or ``up`` alone) of gate_up, ``down``."""
    layout, inter = view.layout, view.layout.intermediate_size
    if not layout.gated:
        return {"up": slice(None), "down": slice(None)}
    if layout.interleaved:
        return {"gate": slice(0, None, 2), "up": slice(1, None, 2), "down": slice(None)}
    return {"gate": slice(0, inter), "up": slice(inter, None), "down": slice(None)}


def projection_weight(view: ExpertsView, name: str, expert: int) -> Tensor:
    """``[out, in]``: one projection of one expert, a view of the model's own parameter."""
    weight = view.down_weight(expert) if name == "down" else view.gate_up_weight(expert)
    return weight[projections(view)[name]]


@torch.no_grad()
def write_projection(view: ExpertsView, name: str, expert: int, weight: Tensor) -> None:
    """Put ``weight [out, in]`` (already rounded as it is stored) in the place of one projection of one expert.

    Raises:
        ValueError: experts that are not one stacked module.
    """
    projection_weight(_fused(view), name, expert).copy_(weight)


@torch.no_grad()
def round_as_stored(model: nn.Module) -> None:
    """Round every parameter to what a bfloat16 file gives back."""
    for parameter in model.parameters():
        parameter.copy_(stored(parameter))


@torch.no_grad()
def keep_experts(view: ExpertsView, kept: Sequence[int]) -> None:
    """Drop all experts but ``kept``, and their rows of the router.

    The router's softmax then runs over the kept experts alone. Where fewer are kept than a token had, ``top_k`` falls
    to their number; where none is, the layer's routed experts add nothing. The view describes the layer as it was.

    Raises:
        ValueError: a router or experts of a kind that is not known.
    """
    router, fused = router_of(view), _fused(view)
    rows = torch.tensor(sorted(kept), dtype=torch.int64, device=router.weight.device)
    router.weight = nn.Parameter(router.weight[rows].clone(), requires_grad=router.weight.requires_grad)
    router.num_experts = len(rows)
    if isinstance(router, nn.Linear):
        router.out_features = len(rows)
    router.top_k = min(router.top_k, len(rows))
    if not len(rows):
        view.replace(NoExperts())
        return
    for name, weight in fused.stacked_weights().items():
        setattr(fused.module, name, nn.Parameter(weight[rows].clone(), requires_grad=weight.requires_grad))
    fused.module.num_experts = len(rows)


def routed_parameters(view: ExpertsView) -> int:
    """Parameters of one expert, biases included."""
    return sum(parameter.numel() for parameter in view.parameters()) // view.layout.num_experts
