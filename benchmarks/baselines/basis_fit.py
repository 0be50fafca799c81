"""The alternating least-squares fit of a mixture of basis matrices to the experts of a layer (for :mod:`mobe`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from d2moe_ext.bases import cluster
from d2moe_ext.reference.whitened_svd import ridged_gram

RIDGE = 1e-6
SOLVER_STEPS = 8


@dataclass(frozen=True)
class Mixture:
    """``W_e ≈ A_e Σ_j α_{e,j} B_j``: ``left [E, P, r]``, ``weights [E, m]``, ``bases [m, r, Q]``, float64."""

    left: Tensor
    weights: Tensor
    bases: Tensor

    def mixed(self) -> Tensor:
        """``[E, r, Q]``: each expert's mixture of the bases."""
        return torch.einsum("em,mrq->erq", self.weights, self.bases)

    def product(self) -> Tensor:
        """``[E, P, Q]``."""
        return self.left @ self.mixed()


class Target:
    """What is fitted: ``Σ_e tr(L_e (W_e − A_e B_e) G_e (W_e − A_e B_e)ᵀ)`` is to be small.

    Attributes:
        weight: ``W``, ``[E, P, Q]`` float64.
        left_metric: ``L``, ``[E, P, P]`` float64 with our ridge; None: the identity.
        right_metric: ``G``, ``[E, Q, Q]`` float64 with our ridge; None likewise.
    """

    def __init__(self, weight: Tensor, left_metric: Tensor | None = None, right_metric: Tensor | None = None) -> None:
        self.weight = weight.double()
        self.left_metric = None if left_metric is None else _ridged(left_metric, weight)
        self.right_metric = None if right_metric is None else _ridged(right_metric, weight)
        self.size = float((self.times_left(self.weight) * self.times_right(self.weight)).sum())

    def times_left(self, x: Tensor) -> Tensor:
        """``L_e x_e``."""
        return x if self.left_metric is None else self.left_metric @ x

    def times_right(self, x: Tensor) -> Tensor:
        """``x_e G_e``."""
        return x if self.right_metric is None else x @ self.right_metric

    def error(self, mixture: Mixture) -> float:
        """The sum above, relative to its value at ``A = 0``."""
        residual = self.weight - mixture.product()
        return float((self.times_left(residual) * self.times_right(residual)).sum()) / max(self.size, 1e-300)


def _ridged(grams: Tensor, like: Tensor) -> Tensor:
    return torch.stack([ridged_gram(gram, gram.shape[-1], RIDGE, like) for gram in grams])


def solve_left(target: Target, mixed: Tensor) -> Tensor:
    """The best ``A [E, P, r]`` for ``B_e [E, r, Q]``: ``A_e (B_e G_e B_eᵀ) = W_e G_e B_eᵀ``; the left metric drops out."""
    seen = target.times_right(mixed)
    normal = seen @ mixed.mT
    return _solve_semidefinite(normal, target.weight @ seen.mT)


def solve_weights(target: Target, left: Tensor, bases: Tensor) -> Tensor:
    """The best ``α [E, m]``: ``Σ_j ⟨A B_i, A B_j⟩ α_j = ⟨A B_i, W⟩`` per expert, in the metric."""
    curved = left.mT @ target.times_left(left)  # Aᵀ L A, [E, r, r]
    wanted = target.times_right(left.mT @ target.times_left(target.weight))  # Aᵀ L W G, [E, r, Q]
    rhs = torch.einsum("erq,mrq->em", wanted, bases)
    columns = []
    for basis in bases:
        moved = target.times_right(curved @ basis)
        columns.append(torch.einsum("erq,mrq->em", moved, bases))
    normal = torch.stack(columns, dim=2)
    return _solve_semidefinite(normal, rhs[:, None])[:, 0]


def improve_bases(target: Target, mixture: Mixture, steps: int = SOLVER_STEPS) -> Tensor:
    """Better ``B [m, r, Q]`` for the given ``A`` and ``α``, by preconditioned conjugate gradients from the present ones.

    The normal equations ``Σ_e α_{e,i} Aᵀ L A (Σ_j α_{e,j} B_j) G = Σ_e α_{e,i} Aᵀ L W G`` have ``m·r·Q`` unknowns, too many to
    factor; every step of the solver lowers the error.
    """
    left, weights = mixture.left, mixture.weights
    curved = left.mT @ target.times_left(left)
    wanted = target.times_right(left.mT @ target.times_left(target.weight))

    def apply(bases: Tensor) -> Tensor:
        mixed = torch.einsum("em,mrq->erq", weights, bases)
        return torch.einsum("em,erq->mrq", weights, target.times_right(curved @ mixed))

    precondition = _preconditioner(target, curved, weights)
    bases = mixture.bases
    residual = torch.einsum("em,erq->mrq", weights, wanted) - apply(bases)
    scaled = precondition(residual)
    direction, strength = scaled, float((residual * scaled).sum())
    for _ in range(steps):
        moved = apply(direction)
        curvature = float((direction * moved).sum())
        if not strength > 0 or not curvature > 0:
            break
        bases = bases + strength / curvature * direction
        residual = residual - strength / curvature * moved
        scaled = precondition(residual)
        strength, previous = float((residual * scaled).sum()), strength
        direction = scaled + strength / previous * direction
    return bases


def _preconditioner(target: Target, curved: Tensor, weights: Tensor) -> Callable[[Tensor], Tensor]:
    """``R_i -> C_i⁻¹ R_i G⁻¹`` with ``C_i = Σ_e α² Aᵀ L A`` and the mean ``G``: exact for one basis and equal Grams."""
    blocks = torch.einsum("em,ers->mrs", weights.square(), curved)
    left = torch.linalg.cholesky(_lifted(blocks))
    mean = None if target.right_metric is None else target.right_metric.mean(0)
    right = None if mean is None else torch.linalg.cholesky(_lifted(mean[None])[0])

    def apply(residual: Tensor) -> Tensor:
        solved = torch.cholesky_solve(residual, left)
        return solved if right is None else torch.cholesky_solve(solved.mT, right).mT

    return apply


def _lifted(normal: Tensor) -> Tensor:
    """Symmetric matrices ``[B, n, n]`` made definite by a trace-relative ridge far below the data's precision."""
    n = normal.shape[-1]
    trace = normal.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-300)
    return normal + (1e-12 * trace)[:, None, None] * torch.eye(n, dtype=normal.dtype)


def _solve_semidefinite(normal: Tensor, rhs: Tensor) -> Tensor:
    """``X normal = rhs`` for symmetric semi-definite ``normal [E, n, n]`` and ``rhs [E, p, n]``, of least norm."""
    values, vectors = torch.linalg.eigh(normal)
    kept = values > 1e-12 * values[:, -1:].clamp_min(1e-300)
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
    return ((rhs @ vectors) * inverse[:, None]) @ vectors.mT


def start(target: Target, rank: int, num_bases: int) -> Mixture:
    """A first mixture: experts are clustered by their weights, and each cluster shares its best row space of ``rank``."""
    flat = target.weight.flatten(1)
    labels = cluster(torch.cdist(flat, flat), num_bases).long()
    bases = []
    for label in range(num_bases):
        members = torch.nonzero(labels == label).flatten()
        bases.append(_row_space(target, members, rank))
    stacked = torch.stack(bases)
    weights = torch.nn.functional.one_hot(labels, num_bases).double()
    return Mixture(solve_left(target, stacked[labels]), weights, stacked)


def _row_space(target: Target, members: Tensor, rank: int) -> Tensor:
    """``[r, Q]``: the rows that serve the members best where their metrics are replaced by the mean one."""
    weight = target.weight[members]
    energy = (weight.mT @ target.times_left(target.weight)[members]).sum(0)
    if target.right_metric is None:
        return torch.linalg.eigh(energy)[1][:, -rank:].mT
    factor = torch.linalg.cholesky(target.right_metric[members].mean(0))
    vectors = torch.linalg.eigh(factor.mT @ energy @ factor)[1][:, -rank:]
    return torch.linalg.solve_triangular(factor.mT, vectors, upper=True).mT


def alternate(target: Target, mixture: Mixture, rounds: int) -> tuple[Mixture, list[float]]:
    """``rounds`` rounds of least squares for ``α``, ``B`` and ``A`` in turn; the error before the first and after each."""
    errors = [target.error(mixture)]
    for _ in range(rounds):
        weights = solve_weights(target, mixture.left, mixture.bases)
        mixture = Mixture(mixture.left, weights, mixture.bases)
        bases = improve_bases(target, mixture)
        mixture = _balanced(Mixture(mixture.left, weights, bases))
        mixture = Mixture(solve_left(target, mixture.mixed()), mixture.weights, mixture.bases)
        errors.append(target.error(mixture))
    return mixture, errors


def _balanced(mixture: Mixture) -> Mixture:
    """Every basis of norm ``sqrt(r)`` and ``α`` scaled to match: the same mixture, but no factor runs out of range."""
    rank = mixture.bases.shape[1]
    norms = mixture.bases.flatten(1).norm(dim=1).clamp_min(1e-300) / rank**0.5
    return Mixture(mixture.left, mixture.weights * norms, mixture.bases / norms[:, None, None])
