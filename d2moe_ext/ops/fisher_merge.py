from __future__ import annotations

import torch
from torch import Tensor

from d2moe_ext.ops._device import check_same_device


def fisher_merge_(weighted_sum: Tensor, fisher_sum: Tensor, weight: Tensor, gradient: Tensor, scale: float) -> None:
    """Add one expert's Fisher information from one sequence to the sums that the merged base is made of, in place.

    With ``F = scale * gradient**2`` (paper eq. 4; ``scale`` is ``1 / n[e]``): ``weighted_sum += F * weight`` and
    ``fisher_sum += F``. The base is ``weighted_sum / fisher_sum`` (eq. 5). ``F`` itself is never stored.

    Args:
        weighted_sum: ``[out, in]`` float32 or float64.
        fisher_sum: As ``weighted_sum``, in memory of its own.
        weight: ``[out, in]``, float32, float64, bfloat16 or float16.
        gradient: ``[out, in]`` of any of these dtypes.
        scale: Finite and not negative.

    Raises:
        RuntimeError: A shape, dtype, device or scale that is not as above, or sums that share memory.
    """
    torch.ops.d2moe_ext.fisher_merge_(weighted_sum, fisher_sum, weight, gradient, scale)


@torch.library.register_fake("d2moe_ext::fisher_merge_")
def _(weighted_sum: Tensor, fisher_sum: Tensor, weight: Tensor, gradient: Tensor, scale: float) -> None:
    first = ("weighted_sum", weighted_sum)
    check_same_device("fisher_merge_", first, fisher_sum=fisher_sum, weight=weight, gradient=gradient)
