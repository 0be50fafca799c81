"""Calls of ``moe_gate_up_forward`` in which one part of the forward is nearly all there is.

    low-rank products   U (V x) of one delta over all rows of gate and up, on a base of a single column
    sparse base         the product of a single base that keeps all channels, or half of them by dynamic pruning

What else such a call runs is in its ``contains``. Both parts are launches of ``grouped_product``; ``own`` says which of a
call's they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.layer.shapes import layer_view, top_k_of
from d2moe_ext import ops, reference
from d2moe_ext.bench.costs import Cost
from d2moe_ext.bench.layer import relative_error

KERNEL = "grouped_product"
LOW_RANK, SPARSE_BASE = "low-rank products", "sparse base"
PAIRS = 8192
RANKS = (256, 512)
# Of the rank in the middle: how far the least and the largest are from it.
RAGGED = 0.25
# A factor, either way, by which norms of base columns differ; where all weigh the same, rounding chooses among them.
_COLUMN_RANGE = 8.0
_NO_DELTAS: dict[str, Any] = {
    f"delta_{part}": [] for part in ("u", "v", "rank", "u_start", "v_start", "pivots", "u_scale", "v_scale")
}


@dataclass(frozen=True)
class PartCall:
    """A call, and the least that its part costs.

    Attributes:
        arguments: of ``moe_gate_up_forward``.
        cost: bytes that the part must read and write, and its FLOPs.
        own: how many launches of ``grouped_product``, from the first on, are the part.
        launches: how many there are.
        dynamic: whether channels are pruned by the batch.
        contains: what else the call runs.
    """

    arguments: dict[str, Any]
    cost: Cost
    own: int
    launches: int
    dynamic: bool
    contains: str

    def run(self) -> Tensor:
        """The call."""
        return ops.moe_gate_up_forward(**self.arguments)

    def error(self) -> float:
        """Relative to the reference."""
        return relative_error(self.run(), reference.moe_gate_up_forward(**self.arguments))


@dataclass(frozen=True)
class LowRankSize:
    """Sizes of a call of low-rank products; ``rank`` is the mean over experts."""

    tokens: int
    top_k: int
    experts: int
    inputs: int
    outputs: int
    rank: int

    @property
    def ranks(self) -> list[int]:
        """From three quarters of ``rank`` to five, evenly."""
        last = max(1, self.experts - 1)
        return [round(self.rank * (1 + RAGGED * (2 * expert / last - 1))) for expert in range(self.experts)]


def low_rank_size(shape: str, rank: int) -> LowRankSize:
    """A model's experts, and tokens for ``PAIRS`` pairs."""
    layout, top_k = layer_view(shape).layout, top_k_of(shape)
    return LowRankSize(PAIRS // top_k, top_k, layout.num_experts, layout.hidden_size, layout.gate_up_rows, rank)


def low_rank_call(size: LowRankSize, device: str, dtype: torch.dtype = torch.bfloat16) -> PartCall:
    """Random factors and tokens; every expert is as likely as any other."""
    generator = torch.Generator().manual_seed(0)
    index = torch.rand(size.tokens, size.experts, generator=generator).topk(size.top_k).indices
    rank = torch.tensor(size.ranks, dtype=torch.int32)
    start = (rank.cumsum(0) - rank).to(device, torch.int32)
    rows = int(rank.sum())
    normal = _normal(device, dtype)
    u, v = normal(rows, size.outputs, scale=size.rank**-0.5), normal(rows, size.inputs, scale=size.inputs**-0.5)
    arguments = _NO_DELTAS | {"delta_u": [u], "delta_v": [v], "delta_rank": [rank.to(device)]}
    arguments |= {"delta_u_start": [start], "delta_v_start": [start]}
    arguments |= {
        "hidden_states": normal(size.tokens, size.inputs),
        "top_k_index": index.to(device),
        "gate_up_base": normal(1, size.outputs, 1),
        "gate_up_columns": torch.zeros(1, 1, dtype=torch.int32, device=device),
        "gate_up_column_norms": None,
        "gate_up_expert_to_base": torch.zeros(size.experts, dtype=torch.int32, device=device),
        "gate_up_keep": 1,
        "gate_up_bias": None,
    }
    contains = "the sort, a copy of the base's channel and that times its column, which is added to U's products"
    return PartCall(arguments, low_rank_cost(size, index, dtype.itemsize), 2, 2, False, contains)


def low_rank_cost(size: LowRankSize, index: Tensor, element_size: int) -> Cost:
    """Tokens and the touched experts' factors read, every pair's outputs written; ``2 rank (in + out)`` FLOPs a pair."""
    touched, pairs = torch.unique(index, return_counts=True)
    ranks, width = torch.tensor(size.ranks)[touched], size.inputs + size.outputs
    tokens = int((index >= 0).any(dim=1).sum())
    elements = tokens * size.inputs + int(ranks.sum()) * width + index.numel() * size.outputs
    return Cost(elements * element_size, 2 * int((pairs * ranks).sum()) * width)


def sparse_base_call(
    tokens: int, keep: int, inputs: int, outputs: int, device: str, dtype: torch.dtype = torch.bfloat16
) -> PartCall:
    """One base for one expert, stored channel by channel, of which ``keep`` of ``inputs`` channels are multiplied."""
    normal = _normal(device, dtype)
    base = normal(1, inputs, outputs, scale=inputs**-0.5)
    spread = torch.rand(inputs, generator=torch.Generator().manual_seed(0)).mul(2).sub(1)
    base *= (_COLUMN_RANGE**spread).to(device, dtype)[:, None]
    base = base.transpose(1, 2)
    arguments = _NO_DELTAS | {
        "hidden_states": normal(tokens, inputs),
        "top_k_index": torch.zeros(tokens, 1, dtype=torch.int64, device=device),
        "gate_up_base": base,
        "gate_up_columns": None,
        "gate_up_column_norms": torch.linalg.vector_norm(base, dim=1, dtype=torch.float32),
        "gate_up_expert_to_base": torch.zeros(1, dtype=torch.int32, device=device),
        "gate_up_keep": keep,
        "gate_up_bias": None,
    }
    contains = "the sort from 5 tokens on, a pass that hands the base's output to the pairs"
    if keep < inputs:
        contains += "; scores, the choice of channels and a copy of them"
    cost = Cost((keep * outputs + tokens * inputs) * dtype.itemsize, 2 * tokens * keep * outputs)
    return PartCall(arguments, cost, 1, 2, keep < inputs, contains)


def _normal(device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Normal numbers, others at every call."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    return normal
