"""Common to both mergers: a group of experts becomes one, and the router's choices of any of them go there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from benchmarks.baselines.routing import (
    keep_experts,
    projection_weight,
    projections,
    routed_parameters,
    router_of,
    write_projection,
)
from benchmarks.study import model_parameters, stored
from d2moe_ext.adapters import ExpertsView


def index_bytes(views: Sequence[ExpertsView]) -> int:
    """What the map from the router's experts to the stored ones takes: an int32 per expert."""
    return 4 * sum(view.layout.num_experts for view in views)


def frequency_weights(tokens: Tensor) -> Tensor:
    """``[n]``, summing to 1: the share of each expert in its group's tokens; equal where no token reached the group."""
    counts = tokens.double()
    return counts / counts.sum() if bool(counts.sum() > 0) else torch.full_like(counts, 1 / len(counts))


@torch.no_grad()
def merge_group(view: ExpertsView, members: Sequence[int], shares: Tensor, align: bool) -> None:
    """Write the weighted mean of ``members`` into each of them: the layer then computes what one stored expert would.

    Both slots of a token may lead to the merged expert; its output then counts with the sum of both weights, as it
    does where an index maps them to one stored expert.

    Args:
        members: the first one leads the group.
        shares: ``[n]``, summing to 1.
        align: match the members' neurons to the leader's first.
    """
    if len(members) < 2:
        return
    orders = [matching_order(view, expert, members[0]) if align else slice(None) for expert in members]
    for name in projections(view):
        mean = sum(
            share * _ordered(view, name, expert, order).double()
            for expert, share, order in zip(members, shares, orders, strict=True)
        )
        for expert in members:
            write_projection(view, name, expert, stored(mean.float()))


def matching_order(view: ExpertsView, expert: int, dominant: int) -> Tensor:
    """``[I]`` int64: the neuron of ``expert`` that matches each neuron of ``dominant``.

    It maximises the summed inner products of matched neurons' weights: their rows of gate and up and column of down.
    """
    similarity = 0.0
    for name in projections(view):
        mine, other = (projection_weight(view, name, e).detach().double() for e in (expert, dominant))
        similarity = similarity + (other.T @ mine if name == "down" else other @ mine.T)
    _, order = linear_sum_assignment(np.asarray(similarity), maximize=True)
    return torch.from_numpy(order)


def _ordered(view: ExpertsView, name: str, expert: int, order: Tensor | slice) -> Tensor:
    """A projection with its expert's neurons put in order: rows of gate and up, columns of down."""
    weight = projection_weight(view, name, expert)
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


def merged_bytes(model: nn.Module, stored_experts: dict[str, int], views: Sequence[ExpertsView]) -> int:
    """Stored bytes of a model that stores so many experts of each layer, and the index."""
    spare = 0
    for view in views:
        spare += routed_parameters(view) * (view.layout.num_experts - stored_experts[view.name])
    return 2 * (model_parameters(model) - spare) + index_bytes(views)


def check_mergeable(views: Sequence[ExpertsView]) -> None:
    """Refuse, before anything is changed, a model whose routers are of another kind or whose experts have biases.

    Raises:
        ValueError: the same.
    """
    for view in views:
        router_of(view)
        if view.layout.has_bias:
            raise ValueError(f"baselines: experts that are merged must have no biases, got some in {view.name}.")
