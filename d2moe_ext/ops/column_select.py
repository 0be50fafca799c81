from __future__ import annotations

import torch
from torch import Tensor

from d2moe_ext.ops._device import check_same_device


def column_select(
    hidden_states: Tensor, column_norms: Tensor, keep: int, columns: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Score the columns of a base on the rows at hand and select the best (paper eq. 9).

    ``scores[j] = column_norms[j] * ||hidden_states[:, columns[j]]||_2``. Squares are summed in float64, so large
    float16 or float32 inputs do not overflow.

    Args:
        hidden_states: ``[T, in]`` float32, bfloat16 or float16. With ``T == 0`` every score is 0.
        column_norms: ``[n]`` float32, the norms of the base's stored columns.
        keep: How many to select, from 0 to ``n``.
        columns: ``[n]`` int32, the input channel of each stored column; ``None`` means all of them, ``n == in``.

    Returns:
        ``scores``, ``[n]`` float32, and ``selected``, ``[keep]`` int32: the positions (``0 .. n-1``) of the largest
        scores, distinct and ascending. Of equal scores the lower position wins; NaN counts as infinity.

    Raises:
        RuntimeError: A shape, dtype or device that is not as above, ``keep`` or a column out of range.
    """
    return torch.ops.d2moe_ext.column_select(hidden_states, column_norms, keep, columns)


@torch.library.register_fake("d2moe_ext::column_select")
def _(hidden_states: Tensor, column_norms: Tensor, keep: int, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    first = ("hidden_states", hidden_states)
    check_same_device("column_select", first, column_norms=column_norms, columns=columns)
    return torch.empty_like(column_norms), column_norms.new_empty((keep,), dtype=torch.int32)
