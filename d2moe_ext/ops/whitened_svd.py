from __future__ import annotations

import torch
from torch import Tensor

from d2moe_ext.ops._device import check_same_device


def whitened_svd(
    delta: Tensor,
    rank: int,
    gram: Tensor | None = None,
    left_gram: Tensor | None = None,
    ridge: float = 1e-6,
    left_ridge: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Truncate each delta to ``rank`` in the norm of the data it meets (paper eqs. 6-8).

    With ``S S^T = gram`` and ``L L^T = left_gram``, each after its ridge, ``u @ v`` minimises
    ``||L^T (delta - u @ v) S||_F`` over all matrices of that rank, and that minimum is
    ``sqrt(sum(singular_values[rank:]**2))``. The paper has no left Gram; with one, of the loss's gradients at the
    projection's output, the error is the loss's own to second order. Everything is computed in float64 and cast once.

    The ridge adds ``ridge * d`` to the diagonal, where ``d`` is the diagonal itself, or its smallest positive entry
    where that is 0. A Gram whose diagonal is all zero (no token was seen) counts as the identity, without a ridge.
    Where the Cholesky factorisation fails the ridge is raised tenfold, three times at most.

    Args:
        delta: ``[B, m, n]`` float32 or float64.
        rank: From 0 to ``min(m, n)``. With 0 only the singular values are computed.
        gram: ``[B, n, n]``, or ``[B, n]`` for a diagonal one, float32 or float64, symmetric positive semi-definite;
            ``None`` means the identity.
        left_gram: ``[B, m, m]`` or ``[B, m]``, likewise.
        ridge: Of ``gram``, relative to its diagonal.
        left_ridge: Of ``left_gram``, relative to its diagonal.

    Returns:
        ``u [B, m, rank]`` and ``v [B, rank, n]`` in delta's dtype, always finite; component by component from the
        largest singular value down, so that ``u[..., :r]`` and ``v[:, :r]`` are the factors for a smaller rank ``r``
        (each component's magnitude is shared evenly between the two). ``singular_values [B, min(m, n)]`` float64 of
        ``L^T delta S``, descending; they come from its Gram matrix, so those below about ``1e-8`` of the largest are
        noise of that size. ``ridge_used [B]`` float64: the ridge of ``gram`` as it was raised; 0 where there was none.

    Raises:
        RuntimeError: A shape, dtype or device that is not as above; ``rank`` or a ridge out of range; a non-finite
            ``delta``, ``gram`` or ``left_gram``; a negative diagonal; a Gram that is not positive semi-definite even
            with the ridge raised.
    """
    return torch.ops.d2moe_ext.whitened_svd(delta, rank, gram, left_gram, ridge, left_ridge)


@torch.library.register_fake("d2moe_ext::whitened_svd")
def _(
    delta: Tensor,
    rank: int,
    gram: Tensor | None = None,
    left_gram: Tensor | None = None,
    ridge: float = 1e-6,
    left_ridge: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_same_device("whitened_svd", ("delta", delta), gram=gram, left_gram=left_gram)
    batch, m, n = delta.shape
    return (
        delta.new_empty((batch, m, rank)),
        delta.new_empty((batch, rank, n)),
        delta.new_empty((batch, min(m, n)), dtype=torch.float64),
        delta.new_empty((batch,), dtype=torch.float64),
    )
