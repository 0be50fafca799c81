"""Gauge-fixed factors: r of V's columns are made an identity, which need not be stored.

``U V`` stays what it is when ``U A`` and ``A⁻¹ V`` take the factors' places. With ``A = V[:, P]`` for r columns P, the
*pivots*, ``(A⁻¹ V)[:, P] = I``: of the r (out + in) elements r² go away, and r indices come. ``U A`` then is columns P of
the delta itself. Exact before rounding; so that rounding does no more harm than before, the pivots are chosen such that
no entry of ``A⁻¹ V`` is larger than :data:`LARGEST_ENTRY`: by LU with partial pivoting, and then by exchanges of a
pivot with another column, each of which multiplies ``|det A|`` by that entry (maximum-volume columns: Goreinov et al.,
*How to find a good submatrix*, 2010).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST_ENTRY = 2.0


class GaugeFixed(NamedTuple):
    """``Δ = u @ V`` with ``V[:, pivots] = I`` and ``V[:, others] = rest``, the others ascending.

    Attributes:
        u: ``[out, r]``, the delta's columns at the pivots.
        rest: ``[r, in - r]``.
        pivots: ``[r]`` int64, ascending.
    """

    u: Tensor
    rest: Tensor
    pivots: Tensor


def fix_gauge(u: Tensor, v: Tensor) -> GaugeFixed:
    """The gauge-fixed form of ``u @ v``.

    With ``Vᵀ = L R`` by LU with partial pivoting, L1 the rows of L at the pivots and L2 the others, ``V[:, others]`` is
    ``V[:, P] (L2 L1⁻¹)ᵀ``: also where rows of V depend on one another, so that A has no inverse.

    Args:
        u: ``[out, r]`` float64.
        v: ``[r, in]`` float64, ``r <= in``; its rows may depend on one another, or be 0.

    Raises:
        ValueError: more rows of V than it has columns.
    """
    rank, inputs = v.shape
    if rank > inputs:
        raise ValueError(f"fix_gauge: the rank must be at most the {inputs} columns of v, got {rank}.")
    places = list(range(inputs))
    coefficients = v.new_zeros(inputs, 0)
    if rank:
        factors, swaps, _ = torch.linalg.lu_factor_ex(v.T)
        for place, other in enumerate(swaps.tolist()):
            places[place], places[other - 1] = places[other - 1], places[place]
        coefficients = torch.linalg.solve_triangular(
            factors[:rank], factors[rank:], upper=False, left=False, unitriangular=True
        )
    chosen = torch.tensor(places, device=v.device)
    pivots, others = chosen[:rank], chosen[rank:]
    _exchange(pivots, others, coefficients)
    order, columns = pivots.argsort(), others.argsort()
    return GaugeFixed(u @ v[:, pivots[order]], coefficients.T[order][:, columns], pivots[order])


def with_identity(rest: Tensor, pivots: Tensor) -> Tensor:
    """V whole, ``[r, in]``: an identity at the pivots, ``rest [r, in - r]`` elsewhere."""
    rank, inputs = len(pivots), rest.shape[1] + len(pivots)
    others = torch.ones(inputs, dtype=torch.bool, device=rest.device)
    others[pivots] = False
    v = rest.new_zeros(rank, inputs)
    v[:, others] = rest
    v[torch.arange(rank, device=rest.device), pivots] = 1.0
    return v


def _exchange(pivots: Tensor, others: Tensor, coefficients: Tensor) -> None:
    """Exchange pivots with other columns, in place, until no coefficient is too large."""
    while coefficients.numel():
        place = int(coefficients.abs().argmax())
        row, column = divmod(place, coefficients.shape[1])
        entry = coefficients[row, column].clone()
        if not float(entry.abs()) > LARGEST_ENTRY:
            break
        across, along = coefficients[row].clone(), coefficients[:, column].clone()
        coefficients.addr_(along, across, alpha=-1 / float(entry))
        coefficients[:, column] = along / entry
        coefficients[row] = -across / entry
        coefficients[row, column] = 1 / entry
        pivots[column], others[row] = others[row].clone(), pivots[column].clone()


def flat_rows(parts: Iterable[Tensor], width: int) -> Tensor:
    """Matrices one after the other, row by row, as ``[rows, width]``: zeros fill the last row up."""
    parts = [part.reshape(-1) for part in parts]
    length = sum(len(part) for part in parts)
    return torch.cat([*parts, parts[0].new_zeros(-length % width)]).view(-1, width)
