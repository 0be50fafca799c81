"""What the experts of a layer put out on its captured inputs, and what the layer loses without some of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.baselines.routing import router_of
from benchmarks.study import LayerInputs
from d2moe_ext.adapters import ExpertsView


@torch.no_grad()
def expert_outputs(view: ExpertsView, hidden_states: Tensor) -> Tensor:
    """``[E, T, H]``: every expert on every token, before the router's weight."""
    outputs = []
    for expert in range(view.layout.num_experts):
        gate_up = linear(hidden_states, view.gate_up_weight(expert), view.gate_up_bias(expert))
        down = linear(view.apply_gate(gate_up), view.down_weight(expert), view.down_bias(expert))
        outputs.append(view.post_expert_norm(down))
    return torch.stack(outputs)


def dense_weights(top_k_index: Tensor, top_k_weights: Tensor, num_experts: int) -> Tensor:
    """``[T, E]``: the router's weight of every expert for every token, 0 where it was not chosen."""
    dense = top_k_weights.new_zeros(len(top_k_index), num_experts)
    return dense.scatter_add_(1, top_k_index, top_k_weights)


class SubsetLoss:
    """``‖F(x) − F_kept(x)‖²`` of one layer, averaged over its captured tokens, for any set of kept experts.

    The layer's output is linear in the router's weights, so with the tokens' inner products of expert outputs,
    ``K_t [E, E]``, the loss of a set is the mean of ``d_t K_t d_tᵀ``, ``d_t`` being how the weights change: exact, and
    no output is formed again for another set.
    """

    @torch.no_grad()
    def __init__(self, view: ExpertsView, inputs: LayerInputs) -> None:
        self.router, self.hidden_states = router_of(view), inputs.hidden_states
        self.num_experts = view.layout.num_experts
        outputs = expert_outputs(view, inputs.hidden_states)
        self.inner = torch.einsum("eth,fth->tef", outputs, outputs)
        self.original = dense_weights(inputs.top_k_index, inputs.top_k_weights, self.num_experts)

    @torch.no_grad()
    def weights(self, kept: Sequence[int]) -> Tensor:
        """``[T, E]``: what the model's own router gives when only ``kept`` are left."""
        dense = torch.zeros_like(self.original)
        if kept:
            weight, top_k, num_experts = self.router.weight, self.router.top_k, self.router.num_experts
            index = torch.tensor(sorted(kept))
            try:
                self.router.weight = torch.nn.Parameter(weight[index], requires_grad=False)
                self.router.top_k, self.router.num_experts = min(top_k, len(index)), len(index)
                _, chosen_weights, chosen = self.router(self.hidden_states)
            finally:
                self.router.weight, self.router.top_k, self.router.num_experts = weight, top_k, num_experts
            dense.scatter_add_(1, index[chosen], chosen_weights.to(dense.dtype))
        return dense

    @torch.no_grad()
    def __call__(self, kept: Sequence[int]) -> float:
        """The mean squared error of the layer's output, summed over its channels."""
        change = self.weights(kept) - self.original
        return float(torch.einsum("te,tef,tf->t", change, self.inner, change).clamp_min(0).double().mean())
