from __future__ import annotations

from torch import Tensor


def gram_update_(gram: Tensor, hidden_states: Tensor, row_weights: Tensor | None = None) -> None:
    """``gram [n, n] += X^T diag(w) X`` for ``hidden_states`` X ``[T, n]`` and ``row_weights`` w ``[T]`` (or ones)."""
    x = hidden_states.to(gram.dtype)
    weighted = x if row_weights is None else x * row_weights.to(gram.dtype)[:, None]
    gram += weighted.T @ x
