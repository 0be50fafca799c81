"""Ways to store the experts' deltas (the paper's Tables 6 and 11)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from benchmarks.quality.variants.layer import Layer
from benchmarks.quality.variants.spending import Item
from benchmarks.study import FLOAT_BYTES, INDEX_BYTES, stored
from d2moe_ext import ops
from d2moe_ext.layer_compression import RIDGE
from d2moe_ext.reference.whitened_svd import cholesky_with_ridge


class DeltaCompressor(Protocol):
    """A way to store one projection's deltas of a layer."""

    def items(self, layer: Layer, name: str) -> list[Item]:
        """What it may spend on: one item per expert, or one for all of them."""

    def compress(self, layer: Layer, name: str, deltas: Tensor, sizes: list[int]) -> Tensor:
        """``[E, out, in]`` float64 as it comes back at those sizes, float32, everything stored rounded."""


def _product(u: Tensor, v: Tensor) -> Tensor:
    """Of two factors as they are stored, float32."""
    return stored(u.float()) @ stored(v.float())


class LowRank:
    """The paper's: every expert's delta truncated in the norm of its own inputs (eqs. 6-8); a size is a rank."""

    def items(self, layer: Layer, name: str) -> list[Item]:
        out, inputs = layer.shapes[name]
        return [Item(out * inputs, min(out, inputs), out + inputs) for _ in layer.experts]

    def compress(self, layer: Layer, name: str, deltas: Tensor, sizes: list[int]) -> Tensor:
        result = []
        for expert, size in enumerate(sizes):
            gram = layer.gram(name, expert)[None]
            u, v, _, _ = ops.whitened_svd(deltas[expert][None], size, gram, None, RIDGE)
            result.append(_product(u[0], v[0]))
        return torch.stack(result)


class ColumnPruning:
    """Every expert's delta without its columns of least ``‖Δ_j‖·‖X_j‖``, the score of eq. 9; a size is a number of columns.

    Whole columns, as each then needs one index. Single elements pruned by magnitude would each need an index of
    their own, four bytes beside the two of their value: a third as many elements at equal bytes.
    """

    def items(self, layer: Layer, name: str) -> list[Item]:
        out, inputs = layer.shapes[name]
        return [Item(out * inputs, inputs, out + INDEX_BYTES // FLOAT_BYTES) for _ in layer.experts]

    def compress(self, layer: Layer, name: str, deltas: Tensor, sizes: list[int]) -> Tensor:
        result = torch.zeros(deltas.shape)
        for expert, size in enumerate(sizes):
            norms = layer.gram(name, expert).diagonal().sqrt().float()[None]
            columns = ops.column_select(norms, deltas[expert].norm(dim=0).float(), size)[1].long()
            result[expert][:, columns] = stored(deltas[expert][:, columns].float())
        return result


def _root(gram: Tensor) -> Tensor:
    """``S`` with ``S Sᵀ`` the ridged Gram."""
    return cholesky_with_ridge(gram, len(gram), RIDGE, gram)[0]


def _fit_left(delta: Tensor, v: Tensor, root: Tensor) -> Tensor:
    """The ``u`` of least ``‖(Δ − u v) S‖_F``."""
    return torch.linalg.lstsq((v @ root).T, (delta @ root).T).solution.T


class SharedFactors:
    """One V or one U for all experts of a layer (the paper's Table 11), with the parameters saved spent on rank.

    Shared V: truncated SVD of the deltas stacked as ``[E·out, in]`` in the norm of the experts' mean Gram (Grams are averaged,
    never their Cholesky factors); each U is then the least-squares fit in its expert's own Gram. Merged U: the left singular
    vectors of ``[out, E·in]``, each delta in its expert's norm and weighed by the tokens routed to it; each V is then
    ``Uᵀ Δ``, the best in every norm. With both, an expert's own part is the ``[r, r]`` matrix between them, without which
    all experts would be one.
    """

    def __init__(self, shared_v: bool, merged_u: bool) -> None:
        if not (shared_v or merged_u):
            raise ValueError("SharedFactors: shared_v or merged_u must be True, got False for both.")
        self.shared_v, self.merged_u = shared_v, merged_u

    def items(self, layer: Layer, name: str) -> list[Item]:
        out, inputs = layer.shapes[name]
        experts = len(layer.experts)
        elements = experts * out * inputs
        if self.shared_v and self.merged_u:
            return [Item(elements, min(out, inputs), out + inputs, experts)]
        if self.shared_v:
            return [Item(elements, min(experts * out, inputs), experts * out + inputs)]
        return [Item(elements, min(out, experts * inputs), out + experts * inputs)]

    def compress(self, layer: Layer, name: str, deltas: Tensor, sizes: list[int]) -> Tensor:
        (rank,) = sizes
        if rank == 0:
            return torch.zeros(deltas.shape)
        grams = [layer.gram(name, expert) for expert in layer.experts]
        u = stored(self._left(layer, deltas, grams, rank).float()).double() if self.merged_u else None
        if not self.shared_v:
            assert u is not None
            return torch.stack([_product(u, u.T @ delta) for delta in deltas])
        v = stored(self._right(deltas, grams, rank).float()).double()
        result = []
        for delta, gram in zip(deltas, grams, strict=True):
            own = _fit_left(delta if u is None else u.T @ delta, v, _root(gram))
            result.append(_product(own, v) if u is None else u.float() @ _product(own, v))
        return torch.stack(result)

    @staticmethod
    def _right(deltas: Tensor, grams: list[Tensor], rank: int) -> Tensor:
        mean = torch.stack(grams).mean(0)
        return ops.whitened_svd(deltas.flatten(0, 1)[None], rank, mean[None], None, RIDGE)[1][0]

    @staticmethod
    def _left(layer: Layer, deltas: Tensor, grams: list[Tensor], rank: int) -> Tensor:
        tokens = layer.stats.tokens.double().clamp_min(1)  # an expert that saw none still has a say
        total = sum(n * delta @ gram @ delta.T for n, delta, gram in zip(tokens, deltas, grams, strict=True))
        assert isinstance(total, Tensor)
        return torch.linalg.eigh(total).eigenvectors.flip(1)[:, :rank]
