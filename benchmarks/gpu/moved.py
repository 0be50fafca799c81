"""The bytes that the kernels between a forward's products must move, by the kernel's name.

T tokens, P pairs of a token and an expert, H hidden, I intermediate, E experts; B rows of bases: P where every expert is a base
of its own, else one for each token and base that it takes. Each is read or written once::

    sort_rows             P ids; P places and E + 1 offsets
    weighted_activation   P ids and weights in float32, [P, 2 I] (or [P, I] without a gate); [P, I]
    base_sums             P ids and the experts' bases, [P, I]; [B, I]
    combine_tokens        P ids and the experts' bases, [B, H] of the bases and [P, H] of the deltas; [T, H]

Layers whose experts have biases, which ``combine_tokens`` adds as well, are not counted.
"""

from __future__ import annotations

from torch import Tensor

from d2moe_ext.experts import D2MoEExperts

SORT, ACTIVATION, SUMS, COMBINE = "sort_rows", "weighted_activation", "base_sums", "combine_tokens"
# As csrc/kernels/tuning_cuda.h has it: tokens up to which nothing is sorted.
UNSORTED_TOKENS = 4
_INT32 = _FLOAT32 = 4


def moved_bytes(module: D2MoEExperts, top_k_index: Tensor) -> dict[str, int]:
    """Of every such kernel that a forward launches.

    Args:
        module: plain or compressed experts.
        top_k_index: ``[T, k]``; every id must be an expert's.
    """
    layout, element = module.spec.layout, module.get_parameter("down_base").element_size()
    tokens, top_k = top_k_index.shape
    pairs, ids = tokens * top_k, top_k_index.numel() * top_k_index.element_size()
    own_bases = module.spec.down.num_bases >= layout.num_experts
    base_rows = pairs if own_bases else _base_rows(top_k_index, module.get_buffer("down_expert_to_base"))
    inner = (2 if layout.gated else 1) * layout.intermediate_size
    delta_rows = pairs if module.spec.deltas else 0
    lists = ids + layout.num_experts * _INT32
    moved = {
        ACTIVATION: ids + pairs * _FLOAT32 + pairs * (inner + layout.intermediate_size) * element,
        COMBINE: lists + (base_rows + delta_rows + tokens) * layout.hidden_size * element,
    }
    if not own_bases:
        moved[SUMS] = lists + (pairs + base_rows) * layout.intermediate_size * element
    if tokens > UNSORTED_TOKENS:
        moved[SORT] = ids + (pairs + layout.num_experts + 1) * _INT32
    return moved


def _base_rows(top_k_index: Tensor, expert_to_base: Tensor) -> int:
    """How many bases the tokens take, those that several of a token's experts share counted once."""
    bases = expert_to_base[top_k_index].sort(dim=1).values
    return bases.shape[0] + int((bases.diff(dim=1) != 0).sum())
