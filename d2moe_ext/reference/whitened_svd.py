from __future__ import annotations

import torch
from torch import Tensor


def ridged_gram(gram: Tensor | None, size: int, ridge: float, like: Tensor) -> Tensor:
    """One Gram with its ridge, ``[size, size]`` float64: ``G + ridge * diag(d)``, ``d_j = G_jj`` or, where that is 0,
    the smallest positive ``G_jj``; the identity for ``None`` and for a Gram whose diagonal is all zero."""
    identity = torch.eye(size, dtype=torch.float64, device=like.device)
    if gram is None:
        return identity
    full = gram.double().diag() if gram.dim() == 1 else gram.double()
    diagonal = full.diagonal()
    if not bool((diagonal > 0).any()):
        return identity
    return full + ridge * torch.where(diagonal > 0, diagonal, diagonal[diagonal > 0].min()).diag()


def cholesky_with_ridge(gram: Tensor | None, size: int, ridge: float, like: Tensor) -> tuple[Tensor, float]:
    """The Cholesky factor of the ridged Gram and the ridge it took: raised tenfold, three times at most."""
    for raises in range(4):
        raised = ridge * 10**raises
        factor, info = torch.linalg.cholesky_ex(ridged_gram(gram, size, raised, like))
        if int(info) == 0:
            return factor, raised if gram is not None and bool((gram != 0).any()) else 0.0
    raise ValueError(f"the Gram must be positive semi-definite up to a ridge of {raised} times its diagonal.")


def whitened_svd(
    delta: Tensor,
    rank: int,
    gram: Tensor | None = None,
    left_gram: Tensor | None = None,
    ridge: float = 1e-6,
    left_ridge: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``L^T delta S = U Sigma V^T`` with ``S S^T = gram``, ``L L^T = left_gram``; ``u = L^-T U_r Sigma_r`` and
    ``v = V_r^T S^-1`` (paper eqs. 6-8), in float64.

    ``delta [B, m, n]``, ``gram [B, n, n]`` or ``[B, n]``, ``left_gram [B, m, m]`` or ``[B, m]``. Returns
    ``u [B, m, rank]``, ``v [B, rank, n]``, ``singular_values [B, min(m, n)]``, ``ridge_used [B]``.
    """
    m, n = delta.shape[1:]
    entries = []
    for b, matrix in enumerate(delta.double()):
        s, ridge_used = cholesky_with_ridge(None if gram is None else gram[b], n, ridge, delta)
        left, _ = cholesky_with_ridge(None if left_gram is None else left_gram[b], m, left_ridge, delta)
        left_vectors, sigma, right_vectors = torch.linalg.svd(left.T @ matrix @ s, full_matrices=False)
        scaled = left_vectors[:, :rank] * sigma[:rank]
        u = torch.linalg.solve_triangular(left.T, scaled, upper=True)
        v = torch.linalg.solve_triangular(s, right_vectors[:rank], upper=False, left=False)
        entries.append((u, v, sigma, torch.tensor(ridge_used, dtype=torch.float64, device=delta.device)))
    u, v, sigma, used = (torch.stack(parts) for parts in zip(*entries, strict=True))
    return u.to(delta.dtype), v.to(delta.dtype), sigma, used
