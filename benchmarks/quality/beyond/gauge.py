"""Gauge-fixed factors: r of V's columns are made an identity, which need not be stored.

Column-pivoted QR picks r columns P of each expert's V; with ``A = V[:, P]``, ``V → A⁻¹V`` and ``U → UA`` leave the product
as it is, and ``(A⁻¹V)[:, P] = I``. Stored are ``r(m + n − r)`` floats and r pivots of 4 bytes, for ``r(m + n)`` floats; what
that frees goes to rank. Entries of ``A⁻¹V`` may grow: above LARGEST, the largest entry's column takes its row's pivot
(which multiplies ``|det A|`` by that entry), until none is. Cost: a pivoted QR and an ``r x r`` solve per delta; in the
forward V's identity part is a gather. U is refitted after V is rounded. (On the two models of the study no entry lay
above 1.6, at ranks 32 and 96 of the first and last layers.)
"""

from __future__ import annotations

import scipy.linalg
import torch
from torch import Tensor

from benchmarks.quality.beyond.storage import BFLOAT16, Storage
from benchmarks.quality.beyond.stored_layer import StoredLayer, refitted
from benchmarks.study import FLOAT_BYTES, INDEX_BYTES, stored

LARGEST = 1e3


def fix_gauge(u: Tensor, v: Tensor, largest: float = LARGEST) -> tuple[Tensor, Tensor, Tensor]:
    """``u A``, ``A⁻¹ v`` and the pivots.

    Args:
        u: ``[out, r]`` float64.
        v: ``[r, in]`` float64 of rank r.
        largest: the bound on ``|A⁻¹ v|``.

    Raises:
        RuntimeError: the bound is not reached by as many exchanges as there are columns.
    """
    rank, inputs = v.shape
    order = scipy.linalg.qr(v.numpy(), mode="r", pivoting=True)[1]
    pivots = torch.from_numpy(order[:rank].copy()).long()
    for _ in range(inputs):
        chosen = v[:, pivots]
        fixed = torch.linalg.solve(chosen, v)
        fixed[:, pivots] = torch.eye(rank, dtype=v.dtype)
        place = int(fixed.abs().argmax())
        if float(fixed.abs().flatten()[place]) <= largest:
            return u @ chosen, fixed, pivots
        pivots[place // inputs] = place % inputs
    raise RuntimeError(
        f"fix_gauge: the entries of V must come down to {largest:g} by exchanging pivots, got {fixed.abs().max():g}."
    )


GAUGE_FIXED = Storage(
    base=BFLOAT16.base,
    factors=lambda rank, out, inputs: FLOAT_BYTES * rank * (out + inputs - rank) + INDEX_BYTES * rank,
)


class GaugeFixedLayer(StoredLayer):
    """V with an identity in r of its columns."""

    largest = 0.0  # of any |A⁻¹V| so far

    def stored_factors(self, name: str, expert: int, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        u, v, _ = fix_gauge(u, v)
        self.largest = max(self.largest, float(v.abs().max()))
        v = stored(v).double()
        return stored(refitted(self._delta(name, expert).double(), v, self.metric(name, expert))).double(), v
