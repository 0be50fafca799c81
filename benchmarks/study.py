"""What every method of the quality study is given, and how its result is counted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from d2moe_ext.adapters import ExpertsView, RoutedCall
from d2moe_ext.calibration import CalibrationStats, pairs_of


@dataclass(frozen=True)
class LayerInputs:
    """What the experts of one layer saw on (part of) the calibration text.

    Attributes:
        hidden_states: ``[T, H]`` float32.
        top_k_index: ``[T, k]`` int64.
        top_k_weights: ``[T, k]`` float32.
        router_logits: ``[T, E]`` float32, before softmax.
    """

    hidden_states: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor
    router_logits: Tensor


@dataclass(frozen=True)
class Calibration:
    """What every method may look at: the same sequences for all of them."""

    batches: list[Tensor]
    stats: CalibrationStats
    inputs: dict[str, LayerInputs]


Method = Callable[[PreTrainedModel, Calibration, float], int]


def stored(x: Tensor) -> Tensor:
    """``x`` as a bfloat16 file would give it back."""
    return x.bfloat16().float()


def model_parameters(model: torch.nn.Module) -> int:
    """Parameters of the whole model; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def byte_budget(model: torch.nn.Module, ratio: float) -> int:
    """What a model without ``ratio`` of its parameters may take."""
    return 2 * int((1 - ratio) * model_parameters(model))


def _recorder(view: ExpertsView, seen: list[tuple[Tensor, Tensor, Tensor]]) -> RoutedCall:
    def run(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        seen.append((hidden_states, top_k_index, top_k_weights))
        output = torch.zeros_like(hidden_states)
        for expert in range(view.layout.num_experts):
            token, weight = pairs_of(expert, top_k_index, top_k_weights)
            x = torch.nn.functional.linear(hidden_states[token], view.gate_up_weight(expert), view.gate_up_bias(expert))
            y = torch.nn.functional.linear(view.apply_gate(x), view.down_weight(expert), view.down_bias(expert))
            output.index_add_(0, token, view.post_expert_norm(y) * weight[:, None])
        return output

    return run


@torch.no_grad()
def capture_inputs(
    model: PreTrainedModel, batches: list[Tensor], views: list[ExpertsView], max_tokens: int = 8192
) -> dict[str, LayerInputs]:
    """What each view's experts are called with on the first ``max_tokens`` tokens of ``batches``."""
    seen: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {view.name: [] for view in views}
    tokens = 0
    with ExitStack() as stack:
        for view in views:
            stack.enter_context(view.intercept(_recorder(view, seen[view.name])))
        for batch in batches:
            if tokens < max_tokens:
                model(input_ids=batch, use_cache=False)
                tokens += batch.numel()
    captured = {}
    for view in views:
        x, index, weights = (torch.cat(parts)[:max_tokens] for parts in zip(*seen[view.name], strict=True))
        gate = getattr(view.block, "gate", None) or view.block.router
        captured[view.name] = LayerInputs(x.float(), index, weights.float(), torch.nn.functional.linear(x, gate.weight))
    return captured
