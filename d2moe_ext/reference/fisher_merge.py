from __future__ import annotations

from torch import Tensor


def fisher_merge_(weighted_sum: Tensor, fisher_sum: Tensor, weight: Tensor, gradient: Tensor, scale: float) -> None:
    """``F = scale * gradient**2; weighted_sum += F * weight; fisher_sum += F``, all ``[out, in]`` (eqs. 4 and 5)."""
    fisher = scale * gradient.to(fisher_sum.dtype) ** 2
    weighted_sum += fisher * weight.to(weighted_sum.dtype)
    fisher_sum += fisher
