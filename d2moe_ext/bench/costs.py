"""The bytes that a layer's forward cannot help reading, and the FLOPs that it cannot help doing.

T tokens, k experts a token, E experts, H hidden, I intermediate, R rows of gate_up, r rank:

    bytes   touched bases [out, columns]; touched experts' U, V, pivots, scales and biases, rows that they share once;
            x [T, H] read and y [T, H] written
    FLOPs   2 out columns for each (token, base); 2 r (in + out) for each (token, expert) and delta, or gauge-fixed
            2 r (in - r + out)

``columns`` are those stored, or with dynamic pruning the ``keep`` of them that are multiplied. An uncompressed layer is
one whose every expert is a base. Left out, as thousandths of the rest: lists of columns and their norms, the routing, the
gate's activation, the choice of columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from d2moe_ext.experts import D2MoEExperts
from d2moe_ext.spec import GROUPS


@dataclass(frozen=True)
class Cost:
    """Of one forward: bytes read and written, and floating-point operations."""

    bytes: int
    flops: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


def forward_cost(module: D2MoEExperts, top_k_index: Tensor) -> Cost:
    """The least that a forward of ``module`` costs for tokens routed like this.

    Args:
        module: compressed experts, or :class:`~d2moe_ext.experts.UncompressedExperts`; ``module.dynamic`` is heeded.
        top_k_index: ``[T, k]``; ids outside ``0..E-1`` cost nothing.
    """
    layout, element = module.spec.layout, module.get_parameter("down_base").element_size()
    tokens, slots = ((top_k_index >= 0) & (top_k_index < layout.num_experts)).nonzero(as_tuple=True)
    experts = top_k_index[tokens, slots].long()
    cost = Cost(2 * top_k_index.shape[0] * layout.hidden_size * element, 0)
    for group in GROUPS:
        cost += _base_cost(module, group, tokens, experts)
    touched, pairs = torch.unique(experts, return_counts=True)
    for projection in module.spec.delta_order:
        cost += _delta_cost(module, projection, touched, pairs)
    if layout.has_bias:
        cost += Cost(touched.numel() * (layout.gate_up_rows + layout.hidden_size) * element, 0)
    return cost


def _base_cost(module: D2MoEExperts, group: str, tokens: Tensor, experts: Tensor) -> Cost:
    """Every base that a token takes, read once; multiplied once for each (token, base), or for each (token, expert) where a
    norm after each expert keeps the sum over experts from coming first."""
    spec = module.spec
    group_spec = getattr(spec, group)
    out = spec.shape_of(group)[0]
    columns = group_spec.keep if module.dynamic else group_spec.kept
    base_of = getattr(module, f"{group}_expert_to_base").long()[experts]
    products = torch.unique(torch.stack([tokens, base_of]), dim=1).shape[1]
    if group == "down" and spec.layout.has_post_expert_norm:
        products = experts.numel()
    weight = getattr(module, f"{group}_base")
    return Cost(torch.unique(base_of).numel() * out * columns * weight.element_size(), 2 * products * out * columns)


def _delta_cost(module: D2MoEExperts, projection: str, touched: Tensor, pairs: Tensor) -> Cost:
    """Factors of the touched experts at their stored size; ``pairs`` counts each one's tokens."""
    spec = module.spec
    out, inputs = spec.shape_of(projection)
    part = {name: getattr(module, f"{projection}_delta_{name}") for name in ("u", "v", "rank", "u_start", "v_start")}
    ranks, u_starts, v_starts = (part[name].long()[touched].tolist() for name in ("rank", "u_start", "v_start"))
    per_rank = [inputs - rank if spec.gauge_fixed else inputs for rank in ranks]
    # Gauge-fixed V's start and end at an element, others at a row.
    v_lengths = [rank * width if spec.gauge_fixed else rank for rank, width in zip(ranks, per_rank, strict=True)]
    u_rows = covered(zip(u_starts, ranks, strict=True))
    v_stored = covered(zip(v_starts, v_lengths, strict=True))
    v_elements = v_stored if spec.gauge_fixed else v_stored * inputs
    read = u_rows * out * part["u"].element_size() + v_elements * part["v"].element_size()
    if spec.gauge_fixed:
        read += u_rows * getattr(module, f"{projection}_delta_pivots").element_size()
    if spec.factor_dtype == "int8":
        scales = u_rows + (u_rows if spec.gauge_fixed else v_stored)
        read += scales * module.get_parameter("down_base").element_size()
    work = zip(pairs.tolist(), ranks, per_rank, strict=True)
    return Cost(read, sum(2 * count * rank * (width + out) for count, rank, width in work))


def covered(slices: Iterable[tuple[int, int]]) -> int:
    """How many places the slices ``(start, length)`` cover together, those that several share counted once."""
    total, end = 0, 0
    for start, length in sorted(slices):
        first = max(start, end)
        end = max(end, start + length)
        total += max(end - first, 0)
    return total
