"""Which experts share a base."""

from __future__ import annotations

import torch
from torch import Tensor

from d2moe_ext.adapters import ExpertsView


def weight_distances(view: ExpertsView) -> Tensor:
    """Squared Frobenius distances between the experts' weights, ``[E, E]`` float64."""
    count = view.layout.num_experts
    inner = torch.zeros(count, count, dtype=torch.float64, device=view.down_weight(0).device)
    for weight in (view.gate_up_weight, view.down_weight):
        for i in range(count):
            mine = weight(i).flatten().float()
            for j in range(i, count):
                inner[i, j] += torch.dot(mine, weight(j).flatten().float())
    inner = inner + inner.T - torch.diag(inner.diagonal())
    norms = inner.diagonal()
    return (norms[:, None] + norms[None, :] - 2 * inner).clamp_min(0)


def cluster(distances: Tensor, num_clusters: int) -> Tensor:
    """Average-linkage clustering, deterministic: the two nearest clusters merge until ``num_clusters`` are left.

    Args:
        distances: ``[n, n]``, symmetric.
        num_clusters: from 1 to n.

    Returns:
        ``[n]`` int32: each item's cluster, numbered by its lowest item.
    """
    distances = distances.cpu()  # so many small steps are no work for a GPU
    members = [[i] for i in range(len(distances))]
    while len(members) > num_clusters:
        means = [
            (distances[a][:, b].mean().item(), i, j) for i, a in enumerate(members) for j, b in enumerate(members) if i < j
        ]
        _, i, j = min(means)
        members[i] += members.pop(j)
    labels = torch.empty(len(distances), dtype=torch.int32, device="cpu")
    for label, items in enumerate(sorted(members, key=min)):
        labels[items] = label
    return labels


def assign_bases(view: ExpertsView, num_bases: int) -> Tensor:
    """``[E]`` int32, on the weights' device: the base of each expert; experts with similar weights share one.

    Raises:
        ValueError: more bases than experts.
    """
    count = view.layout.num_experts
    if not 1 <= num_bases <= count:
        raise ValueError(f"num_bases must lie between 1 and {count}, the experts of {view.name}, got {num_bases}.")
    device = view.down_weight(0).device
    if num_bases == 1:
        return torch.zeros(count, dtype=torch.int32, device=device)
    if num_bases == count:
        return torch.arange(count, dtype=torch.int32, device=device)
    return cluster(weight_distances(view), num_bases).to(device)
