"""The best base for given deltas: the other half of alternating base and deltas (design section 2.5, two-sided).

Given the truncated deltas ``Δ_r[e]``, the base's kept columns P solve, in the metric that the deltas' SVD uses,

    min over W_b of  Σ_e ‖B[e]^½ (T[e] − W_b) G[e]^½‖_F²   with T[e] = W[e] − Δ_r[e],
    so  Σ_e B[e] W_b[:,P] G[e][P,P] = Σ_e B[e] (T[e] G[e])[:,P]        (E terms, [out, kept] each).

With equal B it is one Cholesky solve; B differs by expert, so that solve is the preconditioner of a few steps of
conjugate gradients. They start from the base at hand and each lowers the error, so alternation never raises it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

# 4 and 8 steps gave the same perplexities on both models of docs/quality.md (2026-11-22, selection text): the next alternation
# takes up what is left.
CONJUGATE_GRADIENT_STEPS = 2


@dataclass(frozen=True)
class ExpertTarget:
    """What one expert asks of its base.

    Attributes:
        target: ``[out, in]`` float64, ``W[e] − Δ_r[e]``.
        gram: ``[in, in]`` float64, ridged.
        left: ``[out, out]`` float64, ridged, or its diagonal ``[out]``; zero where no token gave a gradient.
    """

    target: Tensor
    gram: Tensor
    left: Tensor

    def weigh(self, y: Tensor) -> Tensor:
        """``B[e] y`` for ``y [out, n]``."""
        return self.left[:, None] * y if self.left.dim() == 1 else self.left @ y

    @property
    def left_diagonal(self) -> Tensor:
        return self.left if self.left.dim() == 1 else self.left.diagonal()


def base_error(base: Tensor, experts: Sequence[ExpertTarget]) -> float:
    """``Σ_e ‖B[e]^½ (T[e] − W_b) G[e]^½‖_F²`` for ``W_b [out, in]``."""
    total = 0.0
    for expert in experts:
        left_out = expert.target - base
        total += float((expert.weigh(left_out @ expert.gram) * left_out).sum())
    return total


def refit_base(base: Tensor, experts: Sequence[ExpertTarget], columns: Tensor) -> Tensor:
    """A base with a smaller error, or as small, for the same deltas.

    Args:
        base: ``[out, in]`` float64, zero outside ``columns``; the base at hand.
        experts: those that share it.
        columns: ``[kept]``, the columns it keeps.

    Returns:
        ``[out, in]`` float64, zero outside ``columns``.
    """
    index = columns.long()
    grams = [expert.gram[index][:, index] for expert in experts]
    residual = _sum(expert.weigh((expert.target - base) @ expert.gram)[:, index] for expert in experts)
    rows = _sum(expert.left_diagonal for expert in experts)
    if not bool((rows > 0).any()):
        return base
    shared = _sum(expert.left_diagonal.mean() * gram for expert, gram in zip(experts, grams, strict=True))
    factor = torch.linalg.cholesky(shared)
    # A row that no expert's gradient reaches has no residual and stays as it is.
    scale = torch.where(rows > 0, rows.mean() / rows.where(rows > 0, 1.0), 0.0)[:, None]

    def precondition(y: Tensor) -> Tensor:
        return scale * torch.cholesky_solve(y.T, factor).T

    correction = torch.zeros_like(residual)
    direction = preconditioned = precondition(residual)
    energy = (residual * preconditioned).sum()
    for _ in range(CONJUGATE_GRADIENT_STEPS):
        image = _sum(expert.weigh(direction @ gram) for expert, gram in zip(experts, grams, strict=True))
        curvature = (direction * image).sum()
        if not float(curvature) > 0:  # solved already
            break
        step = energy / curvature
        correction = correction + step * direction
        residual = residual - step * image
        preconditioned = precondition(residual)
        previous, energy = energy, (residual * preconditioned).sum()
        direction = preconditioned + energy / previous * direction
    refit = base.clone()
    refit[:, index] += correction
    return refit


def _sum(terms: Iterable[Tensor]) -> Tensor:
    """Of at least one term, one after the other: a stack of them would hold all at once."""
    return reduce(torch.add, terms)
