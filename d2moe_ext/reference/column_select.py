from __future__ import annotations

import torch
from torch import Tensor


def column_select(
    hidden_states: Tensor, column_norms: Tensor, keep: int, columns: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``C_j = column_norms[j] * ||X[:, columns[j]]||_2`` (eq. 9) and the positions of the ``keep`` largest, ascending.

    X is ``hidden_states [T, in]``; ``column_norms [n]``, ``columns [n]`` int32 or ``None`` for ``n == in``. Of equal
    scores the lower position wins, NaN counts as infinity. Returns scores ``[n]`` float32, selected ``[keep]`` int32.
    """
    x = hidden_states.double()
    norms = torch.linalg.vector_norm(x if columns is None else x[:, columns.long()], dim=0)
    scores = (column_norms.double() * norms).float()
    order = torch.argsort(scores.nan_to_num(nan=torch.inf, posinf=torch.inf), descending=True, stable=True)
    return scores, order[:keep].sort().values.to(torch.int32)
