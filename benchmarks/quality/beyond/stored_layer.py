"""A layer whose bases and factors are rounded as the file holds them while it is compressed, not afterwards.

The deltas then also repair what rounding the base loses. Nothing else differs from the package's default; other ways to
store factors are subclasses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.study import stored
from d2moe_ext.layer_compression import RIDGE, DeltaReport, LayerCompressor
from d2moe_ext.merge import PrunedBase
from d2moe_ext.reference.whitened_svd import ridged_gram


class StoredLayer(LayerCompressor):
    """Bases and factors in bfloat16."""

    def stored_base(self, base: Tensor) -> Tensor:
        """``[out, in]`` float32, pruned columns at 0, as read back from the file."""
        return stored(base)

    def stored_factors(self, name: str, expert: int, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``u [out, r]`` and ``v [r, in]``, float64, as read back from the file."""
        return stored(u).double(), stored(v).double()

    def metric(self, name: str, expert: int) -> Tensor:
        """``[in, in]`` float64: the ridged Gram that the delta's SVD is whitened with on the right."""
        delta = self._delta(name, expert)
        return ridged_gram(self._gram(name, expert), delta.shape[1], RIDGE, delta)

    def round_bases(self) -> None:
        for group, pruned in self.bases.items():
            full = torch.stack([self.stored_base(pruned.masked(base)) for base in range(len(pruned.full))])
            self.bases[group] = PrunedBase(full, pruned.columns)

    def factor(self, name: str) -> tuple[dict[str, Tensor], DeltaReport]:
        rows_u, rows_v, errors, ridges = [], [], [], []
        for expert, u, v, sigma, ridge in self._factors(name):
            energy = float(sigma.square().sum())
            errors.append((float(sigma[len(v) :].square().sum()) / energy) ** 0.5 if energy else 0.0)
            ridges.append(float(ridge))
            if len(v):
                u, v = self.stored_factors(name, expert, u.double(), v.double())
            rows_u.append(u.T.double())
            rows_v.append(v.double())
        return self.factor_state(name, rows_u, rows_v, [], {}), DeltaReport(errors, ridges)


def refitted(delta: Tensor, v: Tensor, gram: Tensor) -> Tensor:
    """The best ``U`` for a given ``V``: ``U = Δ G Vᵀ (V G Vᵀ)⁻¹``.

    It minimises ``‖(Δ − U V) G^½‖`` row by row, and so for any left Gram.

    Args:
        delta: ``[out, in]`` float64.
        v: ``[r, in]`` float64.
        gram: ``[in, in]`` float64, positive definite.

    Returns:
        ``[out, r]`` float64.
    """
    image = gram @ v.T
    normal = v @ image
    # Of relative size 1e-13: V's rows are near orthonormal in this metric, but rounding may leave two of them alike.
    normal.diagonal().add_(1e-13 * normal.diagonal().mean())
    return torch.cholesky_solve((delta @ image).T, torch.linalg.cholesky(normal)).T
