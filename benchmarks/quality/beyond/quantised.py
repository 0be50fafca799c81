"""Factors of eight bits.

Each stored row of U and V is ``scale · q`` with q in −127..127, rounded to nearest, and one bfloat16 scale,
rounded up so that nothing is clipped: 1 byte per entry and 2 per row. What that frees goes to rank. U is refitted in
closed form to the quantised V (:func:`refitted`) before it is quantised itself.
Cost: the forward dequantises. Rows of U are those of the file: one per rank, ``[r, out]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.quality.beyond.storage import BFLOAT16, Storage
from benchmarks.quality.beyond.stored_layer import StoredLayer, refitted
from benchmarks.study import FLOAT_BYTES

LEVELS = 127


def quantised(rows: Tensor) -> Tensor:
    """``[n, m]`` as read back from eight-bit rows, in its own dtype; off by at most half a scale."""
    exact = rows.abs().amax(1, keepdim=True) / LEVELS
    scale = exact.bfloat16()
    scale = torch.where(scale.to(exact.dtype) < exact, (exact * (1 + 2**-7)).bfloat16(), scale).to(rows.dtype)
    return (rows / torch.where(scale > 0, scale, 1.0)).round() * scale


def _int8(rows: int, columns: int) -> int:
    return rows * (columns + FLOAT_BYTES)


def _int8_factors(rank: int, out: int, inputs: int) -> int:
    return _int8(rank, out) + _int8(rank, inputs)


INT8_FACTORS = Storage(base=BFLOAT16.base, factors=_int8_factors)


class Int8FactorsLayer(StoredLayer):
    """Eight-bit U and V beside bfloat16 bases."""

    def stored_factors(self, name: str, expert: int, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        v = quantised(v)
        u = refitted(self._delta(name, expert).double(), v, self.metric(name, expert))
        return quantised(u.T.contiguous()).T, v
