"""Low rank per expert: which ranks a budget of parameters holds, and the truncation itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.baselines.routing import projection_weight, projections, write_projection
from benchmarks.study import stored
from d2moe_ext import ops
from d2moe_ext.adapters import ExpertsView
from d2moe_ext.calibration import LayerStats
from d2moe_ext.layer_compression import RIDGE, shrunk_down_gram, shrunk_gate_up_gram


@dataclass(frozen=True)
class Matrix:
    """A matrix that may be stored as two factors. ``weight``: its share of the budget per element, relative to others'."""

    rows: int
    columns: int
    weight: float = 1.0

    @property
    def full_rank(self) -> int:
        """The rank that stands for the matrix itself, unfactored."""
        return min(self.rows, self.columns)

    def cost(self, rank: int) -> int:
        """Stored parameters at a rank; factors never cost more than the matrix itself."""
        return min(rank * (self.rows + self.columns), self.rows * self.columns)

    def rank_for(self, parameters: float) -> int:
        """The largest rank whose cost stays within ``parameters``; ``full_rank`` where the matrix itself does."""
        if parameters >= self.rows * self.columns:
            return self.full_rank
        return min(int(parameters // (self.rows + self.columns)), self.full_rank)


def ranks_within(matrices: Sequence[Matrix], parameters: int) -> list[int]:
    """A rank per matrix: parameters in proportion to ``weight`` times the number of elements, in all at most ``parameters``.

    What rounding leaves over goes to the heaviest matrices first, one rank each.

    Raises:
        ValueError: a negative budget.
    """
    if parameters < 0:
        raise ValueError(f"baselines: the budget of parameters must be at least 0, got {parameters}.")

    def at(share: float) -> list[int]:
        return [m.rank_for(share * m.weight * m.rows * m.columns) for m in matrices]

    def cost(ranks: Sequence[int]) -> int:
        return sum(m.cost(rank) for m, rank in zip(matrices, ranks, strict=True))

    full = [m.full_rank for m in matrices]
    if cost(full) <= parameters:
        return full
    low, high = 0.0, 1 / min(m.weight for m in matrices)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(at(middle)) <= parameters else (low, middle)
    ranks = at(low)
    spent = cost(ranks)
    for index in sorted(range(len(matrices)), key=lambda i: (-matrices[i].weight, i)):
        matrix, rank = matrices[index], ranks[index]
        # A factored matrix as dear as the whole one is stored whole.
        following = matrix.rank_for(matrix.cost(rank + 1))
        step = matrix.cost(following) - matrix.cost(rank)
        if rank < matrix.full_rank and spent + step <= parameters:
            ranks[index] = following
            spent += step
    return ranks


def pooled_gram(stats: LayerStats) -> Tensor:
    """``G_pool/n_pool``, ``[H, H]``: the layer's inputs whichever expert they went to, per token."""
    return stats.gram_gate_up.sum(0) / max(int(stats.tokens.sum()), 1)


def expert_gram(stats: LayerStats, name: str, expert: int, pooled: Tensor) -> Tensor:
    """The shrunk Gram of a projection's inputs, ``[in, in]`` float64, per token (design section 2.5)."""
    return shrunk_down_gram(stats, expert) if name == "down" else shrunk_gate_up_gram(stats, pooled, expert)


@torch.no_grad()
def truncate(view: ExpertsView, stats: LayerStats, expert: int, ranks: dict[str, int]) -> None:
    """Put the whitened truncation of each projection of an expert in its place, its factors rounded as they are stored.

    Args:
        ranks: by projection; a full rank leaves the projection as it is.
    """
    pooled = pooled_gram(stats)
    for name in projections(view):
        weight = projection_weight(view, name, expert)
        if ranks[name] < min(weight.shape):
            gram = expert_gram(stats, name, expert, pooled)
            u, v, _, _ = ops.whitened_svd(weight.double()[None], ranks[name], gram[None], None, RIDGE)
            write_projection(view, name, expert, stored(u[0].float()) @ stored(v[0].float()))
