"""Factors of eight bits: a row is a scale times integers from -127 to 127, rounded to nearest.

The scale is the row's largest entry over 127, rounded up to eight significant bits: nothing is clipped, and the scale is the
same number in every floating dtype (but for float16's narrow range). V comes first; U is then refitted to the V that is
stored, so that it makes up for part of what rounding V lost, and rounded itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LEVELS = 127
_SCALE_BITS = 8
# Relative to normal equations of unit diagonal; raised where Cholesky fails, as for rows that rounding made alike.
_NORMAL_RIDGES = (1e-13, 1e-10, 1e-7)


class Int8Rows(NamedTuple):
    """Row i is ``scale[i] * values[i]``: ``[n, m]`` int8 and ``[n]`` in the dtype that is stored."""

    values: Tensor
    scale: Tensor

    def read(self) -> Tensor:
        """``[n, m]`` float64."""
        return self.scale.double()[:, None] * self.values


def quantise_rows(rows: Tensor, dtype: torch.dtype) -> Int8Rows:
    """Rows of eight bits, off by at most half a scale.

    Args:
        rows: ``[n, m]`` float64; a row may be all zero, or empty.
        dtype: of the scales; one that cannot hold a row's scale gives infinity.
    """
    largest = rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))
    scale = _rounded_up(largest / LEVELS, dtype)
    values = (rows / scale.where(scale > 0, 1.0)[:, None]).round()
    return Int8Rows(values.to(torch.int8), scale.to(dtype))


def _rounded_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The least number of eight significant bits that is no smaller, float64; below dtype's normal range, of fewer."""
    mantissa, exponent = torch.frexp(scale)
    rounded = torch.ldexp((mantissa * 2**_SCALE_BITS).ceil(), exponent - _SCALE_BITS)
    limits = torch.finfo(dtype)
    step = limits.smallest_normal * limits.eps
    return rounded.where(rounded >= limits.smallest_normal, (rounded / step).ceil() * step)


def refitted_u(delta: Tensor, v: Tensor, gram: Tensor) -> Tensor:
    """The best ``U`` for a given ``V``: ``U = Δ G Vᵀ (V G Vᵀ)⁻¹``, which minimises ``‖(Δ − U V) G^½‖``.

    It does so row by row, and so for any left Gram.

    Args:
        delta: ``[out, in]`` float64.
        v: ``[r, in]`` float64; a row that is all zero gets zeros.
        gram: ``[in, in]`` float64, positive definite.

    Returns:
        ``[out, r]`` float64.
    """
    image = gram @ v.T
    normal = v @ image
    lengths = normal.diagonal().sqrt()
    lengths = lengths.where(lengths > 0, 1.0)
    normal = normal / lengths / lengths[:, None]
    for ridge in _NORMAL_RIDGES:
        factor, info = torch.linalg.cholesky_ex(normal + ridge * torch.eye(len(v), dtype=v.dtype, device=v.device))
        if not int(info):
            break
    return (torch.cholesky_solve((delta @ image / lengths).T, factor) / lengths[:, None]).T
