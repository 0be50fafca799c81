"""The forward of a compressed MoE layer in plain torch: the ``"torch"`` backend, and what tests hold operators against.

With g a token's router weight of an expert e, b the base of e, and P the base's kept columns:

    gate_up[t, e] = base[b] x[t, P] + U[e] (V[e] x[t]) + bias[e]                      (base once per token and base)
    h[t, e]       = act(gate) * up,   or act(up) where there is no gate
    y[t]          = sum_b base[b] (sum_{e of b} g h[t, e])[P] + sum_e g (U[e] (V[e] h[t, e]) + bias[e])

Every function is differentiable in ``hidden_states`` (``activated``), ``top_k_weights`` and all weights, takes the
arguments of the operator of its name, and computes in the dtype of its input (float64 included); sums over a token's
experts are accumulated in float32 at least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu2": lambda x: functional.relu(x).square(),
}


def moe_forward(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_base: Tensor,
    gate_up_columns: Tensor | None,
    gate_up_column_norms: Tensor | None,
    gate_up_expert_to_base: Tensor,
    gate_up_keep: int,
    gate_up_bias: Tensor | None,
    down_base: Tensor,
    down_columns: Tensor | None,
    down_column_norms: Tensor | None,
    down_expert_to_base: Tensor,
    down_keep: int,
    down_bias: Tensor | None,
    delta_u: Sequence[Tensor],
    delta_v: Sequence[Tensor],
    delta_rank: Sequence[Tensor],
    delta_u_start: Sequence[Tensor],
    delta_v_start: Sequence[Tensor],
    delta_pivots: Sequence[Tensor],
    delta_u_scale: Sequence[Tensor],
    delta_v_scale: Sequence[Tensor],
    activation: str,
    interleaved: bool,
) -> Tensor:
    """The whole expert layer, ``[T, H] -> [T, H]``; arguments as in :func:`d2moe_ext.ops.moe_forward`."""
    if down_columns is not None and not delta_v:
        raise ValueError("moe_forward: delta_v must hold at least down's [R_v, I] where down_columns is given, got none")
    if interleaved and len(delta_u) == 3:
        raise ValueError("moe_forward: delta_u must hold 2 tensors (gate_up, down) where gate_up is interleaved, got 3")
    gate_up = moe_gate_up_forward(
        hidden_states,
        top_k_index,
        gate_up_base,
        gate_up_columns,
        gate_up_column_norms,
        gate_up_expert_to_base,
        gate_up_keep,
        gate_up_bias,
        delta_u[:-1],
        delta_v[:-1],
        delta_rank[:-1],
        delta_u_start[:-1],
        delta_v_start[:-1],
        delta_pivots[:-1],
        delta_u_scale[:-1],
        delta_v_scale[:-1],
    )
    intermediate_size = delta_v[-1].shape[1] if delta_v else down_base.shape[2]
    activated = gated_activation(gate_up, activation, interleaved, gated=gate_up.shape[1] != intermediate_size)
    return moe_down_forward(
        activated,
        top_k_index,
        top_k_weights,
        down_base,
        down_columns,
        down_column_norms,
        down_expert_to_base,
        down_keep,
        down_bias,
        delta_u[-1:],
        delta_v[-1:],
        delta_rank[-1:],
        delta_u_start[-1:],
        delta_v_start[-1:],
        delta_pivots[-1:],
        delta_u_scale[-1:],
        delta_v_scale[-1:],
        per_pair=False,
    )


def moe_gate_up_forward(
    hidden_states: Tensor,
    top_k_index: Tensor,
    gate_up_base: Tensor,
    gate_up_columns: Tensor | None,
    gate_up_column_norms: Tensor | None,
    gate_up_expert_to_base: Tensor,
    gate_up_keep: int,
    gate_up_bias: Tensor | None,
    delta_u: Sequence[Tensor],
    delta_v: Sequence[Tensor],
    delta_rank: Sequence[Tensor],
    delta_u_start: Sequence[Tensor],
    delta_v_start: Sequence[Tensor],
    delta_pivots: Sequence[Tensor],
    delta_u_scale: Sequence[Tensor],
    delta_v_scale: Sequence[Tensor],
) -> Tensor:
    """Gate and up of every (token, expert) pair, ``[T * k, R]``; as in :func:`d2moe_ext.ops.moe_gate_up_forward`."""
    num_experts, top_k = gate_up_expert_to_base.numel(), top_k_index.shape[1]
    expert_of, base_of = _expert_and_base_of_pairs(top_k_index, gate_up_expert_to_base)
    gate_up = hidden_states.new_zeros(expert_of.numel(), gate_up_base.shape[1])
    for base in range(gate_up_base.shape[0]):
        pairs = (base_of == base).nonzero().flatten()
        tokens, row_of_pair = torch.unique(pairs // top_k, return_inverse=True)
        columns = None if gate_up_columns is None else gate_up_columns[base]
        norms = None if gate_up_column_norms is None else gate_up_column_norms[base]
        product = _base_product(hidden_states[tokens], gate_up_base[base], columns, norms, gate_up_keep)
        gate_up.index_copy_(0, pairs, product[row_of_pair])
    optional = (delta_pivots, delta_u_scale, delta_v_scale)
    deltas = _deltas(delta_u, delta_v, delta_rank, delta_u_start, delta_v_start, *optional)
    for expert in range(num_experts if deltas or gate_up_bias is not None else 0):
        pairs = (expert_of == expert).nonzero().flatten()
        if pairs.numel() == 0:
            continue
        x = hidden_states[pairs // top_k]
        outputs = [_delta_product(x, expert, *delta) for delta in deltas]
        if outputs:
            gate_up.index_add_(0, pairs, torch.cat(outputs, dim=1))
        if gate_up_bias is not None:
            gate_up.index_add_(0, pairs, gate_up_bias[expert].expand(pairs.numel(), -1))
    return gate_up


def gated_activation(gate_up: Tensor, activation: str, interleaved: bool, gated: bool) -> Tensor:
    """``act(gate) * up`` of rows ``[gate; up]`` (gate0, up0, gate1, ... if interleaved); ``act(up)`` if not gated."""
    if activation not in _ACTIVATIONS:
        raise ValueError(f"moe_forward: activation must be one of {sorted(_ACTIVATIONS)}, got {activation!r}")
    act = _ACTIVATIONS[activation]
    if not gated:
        return act(gate_up)
    gate, up = (gate_up[:, ::2], gate_up[:, 1::2]) if interleaved else gate_up.chunk(2, dim=1)
    return act(gate) * up


def moe_down_forward(
    activated: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    down_base: Tensor,
    down_columns: Tensor | None,
    down_column_norms: Tensor | None,
    down_expert_to_base: Tensor,
    down_keep: int,
    down_bias: Tensor | None,
    delta_u: Sequence[Tensor],
    delta_v: Sequence[Tensor],
    delta_rank: Sequence[Tensor],
    delta_u_start: Sequence[Tensor],
    delta_v_start: Sequence[Tensor],
    delta_pivots: Sequence[Tensor],
    delta_u_scale: Sequence[Tensor],
    delta_v_scale: Sequence[Tensor],
    per_pair: bool,
) -> Tensor:
    """Down and the weighted sum, ``[T, H]``, or ``[T * k, H]`` per pair; as :func:`d2moe_ext.ops.moe_down_forward`."""
    num_tokens, top_k = top_k_index.shape
    expert_of, base_of = _expert_and_base_of_pairs(top_k_index, down_expert_to_base)
    # A pair's output row and weight: its token and the router's, or itself and 1 where nothing is summed.
    accumulate = torch.promote_types(activated.dtype, torch.float32)
    row_of = torch.arange(num_tokens * top_k, device=activated.device)
    weight_of = None if per_pair else top_k_weights.reshape(-1, 1).to(accumulate)
    row_of = row_of if per_pair else row_of // top_k
    output = activated.new_zeros(num_tokens * top_k if per_pair else num_tokens, down_base.shape[1], dtype=accumulate)

    def weighted(values: Tensor, pairs: Tensor) -> Tensor:
        return values.to(accumulate) if weight_of is None else weight_of[pairs] * values

    for base in range(down_base.shape[0]):
        pairs = (base_of == base).nonzero().flatten()
        rows, position = torch.unique(row_of[pairs], return_inverse=True)
        summed = activated.new_zeros(rows.numel(), activated.shape[1], dtype=accumulate)
        summed = summed.index_add(0, position, weighted(activated[pairs], pairs)).to(activated.dtype)
        columns = None if down_columns is None else down_columns[base]
        norms = None if down_column_norms is None else down_column_norms[base]
        product = _base_product(summed, down_base[base], columns, norms, down_keep)
        output.index_add_(0, rows, product.to(accumulate))
    optional = (delta_pivots, delta_u_scale, delta_v_scale)
    deltas = _deltas(delta_u, delta_v, delta_rank, delta_u_start, delta_v_start, *optional)
    for expert in range(down_expert_to_base.numel() if deltas or down_bias is not None else 0):
        pairs = (expert_of == expert).nonzero().flatten()
        if pairs.numel() == 0:
            continue
        for delta in deltas:
            product = _delta_product(activated[pairs], expert, *delta)
            output.index_add_(0, row_of[pairs], weighted(product, pairs))
        if down_bias is not None:
            output.index_add_(0, row_of[pairs], weighted(down_bias[expert].expand(pairs.numel(), -1), pairs))
    return output.to(activated.dtype)


def _expert_and_base_of_pairs(top_k_index: Tensor, expert_to_base: Tensor) -> tuple[Tensor, Tensor]:
    """Expert and base of pair ``t * k + slot``, both -1 where the id is no expert."""
    expert_of = top_k_index.reshape(-1).long()
    valid = (expert_of >= 0) & (expert_of < expert_to_base.numel())
    expert_of = expert_of.where(valid, -1)
    base_of = expert_to_base.long()[expert_of.clamp(min=0)].where(valid, -1)
    return expert_of, base_of


def _base_product(x: Tensor, weight: Tensor, columns: Tensor | None, column_norms: Tensor | None, keep: int) -> Tensor:
    """``x[:, columns] @ weight.T`` over the ``keep`` columns that weigh most for these rows (paper eq. 9)."""
    if columns is not None:
        x = x[:, columns.long()]
    if keep < weight.shape[1]:
        if column_norms is None:
            raise ValueError(
                f"moe_forward: column_norms must be given where keep is less than the {weight.shape[1]} kept columns, "
                f"got None with keep = {keep}"
            )
        scores = (column_norms.double() * x.detach().double().norm(dim=0)).float()
        scores = scores.where(~scores.isnan(), torch.inf)
        selected = torch.sort(scores, descending=True, stable=True).indices[:keep].sort().values
        x, weight = x[:, selected], weight[:, selected]
    return functional.linear(x, weight)


def _deltas(delta_u: Sequence[Tensor], *parts: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """The arguments of :func:`_delta_product` for each delta; None for a part of which there are none."""
    none: list[Any] = [None] * len(delta_u)
    return list(zip(delta_u, *(part or none for part in parts), strict=True))


def _delta_product(
    x: Tensor,
    expert: int,
    delta_u: Tensor,
    delta_v: Tensor,
    rank: Tensor,
    u_start: Tensor,
    v_start: Tensor,
    pivots: Tensor | None,
    u_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    """``x V[e].T U[e].T`` with expert e's rows ``start : start + rank`` of the stacked factors.

    With pivots p, ``V[e] x = x[p] + stored x[others]``: its columns p are an identity (:mod:`d2moe_ext.gauge`). With
    scales, a row of a factor is its scale times what is stored (:mod:`d2moe_ext.quantise`).
    """
    r, u, v = int(rank[expert]), int(u_start[expert]), int(v_start[expert])
    factor_u = _scaled(delta_u[u : u + r], u_scale, u)
    if pivots is None:
        return functional.linear(x, _scaled(delta_v[v : v + r], v_scale, v)) @ factor_u
    identity = pivots[u : u + r].long()
    others = torch.ones(x.shape[1], dtype=torch.bool, device=x.device).index_fill(0, identity, False).nonzero().flatten()
    rest = _scaled(delta_v.reshape(-1)[v : v + r * others.numel()].view(r, others.numel()), v_scale, u)
    return (x[:, identity] + functional.linear(x[:, others], rest)) @ factor_u


def _scaled(rows: Tensor, scale: Tensor | None, start: int) -> Tensor:
    """``scale[start + i] * rows[i]``; the rows themselves where they are floating."""
    return rows if scale is None else scale[start : start + len(rows), None] * rows
