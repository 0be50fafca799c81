from __future__ import annotations

import torch
from torch import Tensor

from d2moe_ext.ops._device import check_same_device


def gram_update_(gram: Tensor, hidden_states: Tensor, row_weights: Tensor | None = None) -> None:
    """Add ``hidden_states.T @ diag(row_weights) @ hidden_states`` to ``gram``, in place.

    The Gram matrix ``G = sum x x^T`` of a projection's inputs is what its delta is whitened with (paper 3.3, eq. 6).
    Rows are converted to the dtype of ``gram`` in bounded chunks, so 16-bit activations are never copied whole.

    Args:
        gram: ``[n, n]`` float32 or float64, symmetric. Afterwards it is symmetric to the last bit: what stood above
            the diagonal is replaced by what stands below it.
        hidden_states: ``[T, n]``, float32, float64, bfloat16 or float16. ``T`` may be 0.
        row_weights: ``[T]`` of any of these dtypes, of either sign; ``None`` means ones.

    Raises:
        RuntimeError: A shape, dtype or device that is not as above.
    """
    torch.ops.d2moe_ext.gram_update_(gram, hidden_states, row_weights)


@torch.library.register_fake("d2moe_ext::gram_update_")
def _(gram: Tensor, hidden_states: Tensor, row_weights: Tensor | None = None) -> None:
    check_same_device("gram_update_", ("gram", gram), hidden_states=hidden_states, row_weights=row_weights)
