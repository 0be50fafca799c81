"""The forward of an MoE layer, compressed or plain, as native operators: :func:`moe_forward` and its two halves.

The halves serve layers whose activation only the model knows: ``moe_gate_up_forward``, the model's own gate, then
``moe_down_forward``. Together with a native activation they compute what ``moe_forward`` does.

Sizes: T tokens, k experts for each (``top_k_index``), H hidden, I intermediate, E experts, K bases (each projection
group has its own K), R rows of the gate_up group: 2 I where there is a gate, I where there is none.

All three are for inference: with grad mode on and an input that requires grad they raise ``RuntimeError``; the
differentiable form is :mod:`d2moe_ext.reference.moe_forward`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
    """Run the experts of one MoE layer (paper eqs. 3, 8 and 9; the base once per token and base, not once per expert).

    With g the router's weight of expert e for token t and b the base of e::

        gate_up[t, e] = base[b] x[t] + U[e] (V[e] x[t]) + bias[e]
        h[t, e]       = act(gate) * up        (act(up) where there is no gate)
        y[t]          = sum_b base[b] (sum_{e of b} g h[t, e]) + sum_e g (U[e] (V[e] h[t, e]) + bias[e])

    Args:
        hidden_states: ``[T, H]`` float32, bfloat16 or float16: the dtype of the forward. Sums accumulate in float32.
        top_k_index: ``[T, k]`` int64 or int32. Ids outside ``0 .. E - 1`` contribute nothing.
        top_k_weights: ``[T, k]`` float32, bfloat16 or float16.
        gate_up_base: ``[K, R, H_kept]`` in the forward's dtype; rows in the model's own order.
        gate_up_columns: ``[K, H_kept]`` int32, the columns each base keeps, or None where all are (``H_kept == H``).
        gate_up_column_norms: ``[K, H_kept]`` float32, ``||base[:, j]||_2``; None only where nothing is pruned
            dynamically.
        gate_up_expert_to_base: ``[E]`` int32.
        gate_up_keep: how many of the kept columns are multiplied: those with the largest ``norm_j * ||X_j||_2`` over
            the tokens that reach the base. ``H_kept`` means no dynamic pruning.
        gate_up_bias: ``[E, R]`` or None.
        down_base, down_columns, down_column_norms, down_expert_to_base, down_keep, down_bias: the same for down:
            ``[K, H, I_kept]``, ``[K, I_kept]``, ``[K, I_kept]``, ``[E]``, int, ``[E, H]``. Its dynamic scores are taken
            on its real input, the weighted sums over the experts of a base.
        delta_u: one ``[R_u, out]`` for each delta: (gate, up, down), or (gate_up, down) with gate_up in the base's row
            order (the only form for interleaved rows), or (up, down) where there is no gate, or none at all.
        delta_v: one ``[R_v, in]`` for each delta.
        delta_rank: one ``[E]`` int32 for each delta: ``U[e] = delta_u[u_start : u_start + rank].T`` and
            ``V[e] = delta_v[v_start : v_start + rank]``, with a rank of at most ``min(out, in)``. Rows may be shared between
            experts.
        delta_u_start: one ``[E]`` int32 for each delta.
        delta_v_start: one ``[E]`` int32 for each delta.
        delta_pivots: none where V is stored whole. Else one ``[R_u]`` int32 for each delta, whose factors are then
            gauge-fixed: columns ``p = delta_pivots[u_start : u_start + rank]`` of ``V[e]``, which ascend, are an identity
            and not stored, and the other columns, ``[rank, in - rank]`` row by row, are the ``rank * (in - rank)``
            elements of ``delta_v`` (read as one flat list) from ``v_start`` on. ``V[e] x = x[p] + stored x[others]``.
        delta_u_scale: none where factors are in the forward's dtype. Else one ``[R_u]`` in the forward's dtype for each
            delta, whose ``delta_u`` and ``delta_v`` are then int8: row i of ``delta_u`` is ``delta_u_scale[i]`` times what
            is stored.
        delta_v_scale: as many: one ``[R_v]`` for the rows of ``delta_v``, or where there are pivots one ``[R_u]``, which
            holds the scales of ``V[e]`` at ``u_start : u_start + rank`` (of what is stored; the identity has none).
        activation: ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"relu2"``.
        interleaved: whether gate_up's rows are gate0, up0, gate1, up1, ... instead of ``[gate; up]``; without a gate it
            means nothing.

    Returns:
        ``[T, H]`` in the dtype of ``hidden_states``.

    Raises:
        RuntimeError: one sentence with the argument, the rule and the value, for a wrong shape, dtype, device or
            activation, and on the CPU for an index (on a GPU, where looking would make the host wait, what an index out of
            range points at is left out); for ``down_columns`` without any delta, which would leave I unknown (pass deltas with
            zero rows); and where a gradient would be needed.
    """
    return torch.ops.d2moe_ext.moe_forward(
        hidden_states,
        top_k_index,
        top_k_weights,
        gate_up_base,
        gate_up_columns,
        gate_up_column_norms,
        gate_up_expert_to_base,
        gate_up_keep,
        gate_up_bias,
        down_base,
        down_columns,
        down_column_norms,
        down_expert_to_base,
        down_keep,
        down_bias,
        list(delta_u),
        list(delta_v),
        list(delta_rank),
        list(delta_u_start),
        list(delta_v_start),
        list(delta_pivots),
        list(delta_u_scale),
        list(delta_v_scale),
        activation,
        interleaved,
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
    """Gate and up of every (token, expert) pair: the first half of :func:`moe_forward`, up to the activation.

    Args:
        hidden_states ... gate_up_bias: as in :func:`moe_forward`.
        delta_u ... delta_v_scale: as in :func:`moe_forward` without down's: (gate, up), or one over all R rows, or none.

    Returns:
        ``[T * k, R]`` in the dtype of ``hidden_states``: row ``t * k + slot``; rows of ids that are no expert are 0.

    Raises:
        RuntimeError: as :func:`moe_forward`.
    """
    return torch.ops.d2moe_ext.moe_gate_up_forward(
        hidden_states,
        top_k_index,
        gate_up_base,
        gate_up_columns,
        gate_up_column_norms,
        gate_up_expert_to_base,
        gate_up_keep,
        gate_up_bias,
        list(delta_u),
        list(delta_v),
        list(delta_rank),
        list(delta_u_start),
        list(delta_v_start),
        list(delta_pivots),
        list(delta_u_scale),
        list(delta_v_scale),
    )


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
    """Down and the weighted sum over a token's experts: the second half of :func:`moe_forward`, after the activation.

    Args:
        activated: ``[T * k, I]``, h of each pair in row ``t * k + slot``; rows of ids that are no expert are not read.
        top_k_index, top_k_weights, down_base ... down_bias: as in :func:`moe_forward`.
        delta_u ... delta_v_scale: down's alone, or none.
        per_pair: True leaves out the weights and the sum, for models with a norm after each expert. The base is
            then multiplied once per pair, and its dynamic scores are taken on the pairs' rows.

    Returns:
        ``[T, H]`` in the dtype of ``activated``; if ``per_pair`` ``[T * k, H]``, 0 for ids that are no expert.

    Raises:
        RuntimeError: as :func:`moe_forward`.
    """
    return torch.ops.d2moe_ext.moe_down_forward(
        activated,
        top_k_index,
        top_k_weights,
        down_base,
        down_columns,
        down_column_norms,
        down_expert_to_base,
        down_keep,
        down_bias,
        list(delta_u),
        list(delta_v),
        list(delta_rank),
        list(delta_u_start),
        list(delta_v_start),
        list(delta_pivots),
        list(delta_u_scale),
        list(delta_v_scale),
        per_pair,
    )


@torch.library.register_fake("d2moe_ext::moe_forward")
def _moe_forward_fake(hidden_states: Tensor, *arguments: object) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape)


@torch.library.register_fake("d2moe_ext::moe_gate_up_forward")
def _moe_gate_up_forward_fake(hidden_states: Tensor, top_k_index: Tensor, gate_up_base: Tensor, *arguments: object) -> Tensor:
    return hidden_states.new_empty(top_k_index.shape[0] * top_k_index.shape[1], gate_up_base.shape[1])


@torch.library.register_fake("d2moe_ext::moe_down_forward")
def _moe_down_forward_fake(
    activated: Tensor, top_k_index: Tensor, top_k_weights: Tensor, down_base: Tensor, *arguments: object
) -> Tensor:
    per_pair = arguments[-1]
    rows = top_k_index.shape[0] * top_k_index.shape[1] if per_pair else top_k_index.shape[0]
    return activated.new_empty(rows, down_base.shape[1])
