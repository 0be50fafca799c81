"""Common to both mergers: a group of experts becomes one, and the router's choices of any of them go there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.baselines.routing import keep_experts, projections, router_of, write_projection
from benchmarks.study import model_parameters, stored
from d2moe_ext.adapters import ExpertsView


def index_bytes(views: Sequence[ExpertsView]) -> int:
    """What the map from the router's experts to the stored ones takes: an int32 per expert."""
    return 4 * sum(view.layout.num_experts for view in views)


def frequency_weights(tokens: Tensor) -> Tensor:
    """``[n]``, summing to 1: the share of each expert in its group's tokens; equal where no token reached the group."""
    counts = tokens.double()
    return counts / counts.sum() if bool(counts.sum() > 0) else torch.full_like(counts, 1 / len(counts))


def biases(view: ExpertsView, expert: int) -> list[Tensor]:
    """The expert's biases, of gate_up and down; none where the model has none."""
    return [bias for bias in (view.gate_up_bias(expert), view.down_bias(expert)) if bias is not None]


@torch.no_grad()
def merge_group(view: ExpertsView, members: Sequence[int], shares: Tensor, orders: Sequence[Tensor] | None = None) -> None:
    """Write the weighted mean of ``members`` into each of them: the layer then computes what one stored expert would.

    Both slots of a token may lead to the merged expert; its output then counts with the sum of both weights, as it
    does where an index maps them to one stored expert.

    Args:
        shares: ``[n]``, summing to 1.
        orders: per member ``[I]``: which of its neurons stands at each place of the merged expert; None: as they are.
    """
    if len(members) < 2:
        return
    for name in projections(view):
        mean = sum(
            share * _ordered(view, name, expert, None if orders is None else orders[place]).double()
            for place, (expert, share) in enumerate(zip(members, shares, strict=True))
        )
        for expert in members:
            write_projection(view, name, expert, stored(mean.float()))
    for group in zip(*(biases(view, expert) for expert in members), strict=True):
        mean = stored((torch.stack(group).double() * shares[:, None]).sum(0).float())
        for bias in group:
            bias.copy_(mean)


def _ordered(view: ExpertsView, name: str, expert: int, order: Tensor | None) -> Tensor:
    """A projection with its expert's neurons put in order: rows of gate and up, columns of down."""
    weight = (view.down_weight if name == "down" else view.gate_up_weight)(expert)[projections(view)[name]]
    if order is None:
        return weight
    return weight[:, order] if name == "down" else weight[order]


@torch.no_grad()
def drop_layers(views: Sequence[ExpertsView], energies: Sequence[float], total: int) -> list[ExpertsView]:
    """Where the budget holds fewer experts than there are layers, the layers that put out least lose theirs.

    Args:
        energies: per layer, the mean squared norm of its routed output.
        total: how many experts the budget holds.

    Returns:
        The layers that keep at least one expert.
    """
    order = sorted(range(len(views)), key=lambda index: (-energies[index], index))
    for index in order[total:]:
        keep_experts(views[index], [])
    return [views[index] for index in sorted(order[:total])]


def merged_bytes(model: nn.Module, groups: dict[str, list[list[int]]], views: Sequence[ExpertsView]) -> int:
    """Stored bytes of a model whose experts are merged in ``groups``: each group's weights once, and the index."""
    spare = 0
    for view in views:
        per_expert = sum(parameter.numel() for parameter in view.parameters()) // view.layout.num_experts
        spare += per_expert * (view.layout.num_experts - len(groups[view.name]))
    return 2 * (model_parameters(model) - spare) + index_bytes(views)


def check_routers(views: Sequence[ExpertsView]) -> None:
    """Refuse a model whose routers are of another kind before anything is changed."""
    for view in views:
        router_of(view)
