"""What the quality studies share: what a method may look at, what it may spend, and how stored numbers are rounded.

A *method* compresses a copy of a model in place and answers with the bytes that its file would take, so that every
method is compared at equal stored bytes with the whole model counted (design section 4).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from d2moe_ext.adapters import ExpertsView
from d2moe_ext.calibration import CalibrationStats, pairs_of

FLOAT_BYTES = 2
INDEX_BYTES = 4

_ROUTER_NAMES = ("gate", "router")


@dataclass(frozen=True)
class LayerInputs:
    """What the experts of one layer saw on (part of) the calibration text. T tokens, E experts, k per token.

    Attributes:
        hidden_states: ``[T, H]`` float32.
        top_k_index: ``[T, k]`` int64.
        top_k_weights: ``[T, k]`` float32.
        router_logits: ``[T, E]`` float32, before softmax, as the block's router returns them.
    """

    hidden_states: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor
    router_logits: Tensor


@dataclass(frozen=True)
class Calibration:
    """What every method may look at: the same sequences for all of them. No method writes to it.

    Attributes:
        batches: int64 ``[B, L]`` stacks of token ids.
        stats: ``calibrate(model, batches, merge="fisher", left_gram="full")``.
        inputs: by the name of the experts module (``view.name``).
    """

    batches: list[Tensor]
    stats: CalibrationStats
    inputs: dict[str, LayerInputs]


Method = Callable[[PreTrainedModel, Calibration, float], int]
"""``method(model, calibration, ratio)`` changes ``model`` (float32, uncompressed, a fresh copy) in place so that it computes
what the compressed model would compute, every stored float rounded by :func:`stored`, and returns the whole model's stored
bytes: 2 per float, 4 per index (int32), no file headers. They must not exceed :func:`byte_budget`. Where a method's code
changes what it computes, its attribute ``version`` (an integer; 1 where there is none) is raised by hand."""


def method_version(method: Method) -> int:
    """The hand-set version of a method's code, 1 where none was set."""
    return int(getattr(method, "version", 1))


def stored(x: Tensor) -> Tensor:
    """``x`` as it comes back from a bfloat16 file, float32."""
    return x.bfloat16().float()


def model_parameters(model: nn.Module) -> int:
    """How many parameters a model has, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def byte_budget(model: nn.Module, ratio: float) -> int:
    """The most bytes that an uncompressed ``model`` may take after compression by ``ratio``, in (0, 1)."""
    return FLOAT_BYTES * int((1 - ratio) * model_parameters(model))


class _Recorder:
    """Stands in for a layer's experts: computes what they compute and keeps what they were called with."""

    def __init__(self, view: ExpertsView, max_tokens: int) -> None:
        self.view, self.max_tokens = view, max_tokens
        self.calls: dict[str, list[Tensor]] = {"hidden_states": [], "top_k_index": [], "top_k_weights": [], "router_logits": []}

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        self.calls["hidden_states"].append(hidden_states.float())
        self.calls["top_k_index"].append(top_k_index.long())
        self.calls["top_k_weights"].append(top_k_weights.float())
        view = self.view
        output = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert in range(view.layout.num_experts):
            token, weight = pairs_of(expert, top_k_index, top_k_weights)
            gate_up = linear(hidden_states[token], view.gate_up_weight(expert), view.gate_up_bias(expert))
            down = linear(view.apply_gate(gate_up), view.down_weight(expert), view.down_bias(expert))
            output.index_add_(0, token, view.post_expert_norm(down).float() * weight.float()[:, None])
        return output.to(hidden_states.dtype)

    def router(self) -> nn.Module:
        for name in _ROUTER_NAMES:
            if isinstance(module := getattr(self.view.block, name, None), nn.Module):
                return module
        raise ValueError(
            f"capture_inputs: the block of {self.view.name} must have a router named {' or '.join(_ROUTER_NAMES)}, "
            f"got {type(self.view.block).__name__} without one."
        )

    def record_logits(self, router: nn.Module, arguments: Any, output: Any) -> None:
        logits = output[0] if isinstance(output, tuple) else output
        experts = self.view.layout.num_experts
        if not logits.is_floating_point() or logits.shape[-1] != experts:
            raise ValueError(
                f"capture_inputs: the router of {self.view.name} must return logits [T, {experts}] first, "
                f"got {logits.dtype} {list(logits.shape)}."
            )
        self.calls["router_logits"].append(logits.reshape(-1, experts).float())

    def inputs(self) -> LayerInputs:
        return LayerInputs(**{name: torch.cat(parts)[: self.max_tokens] for name, parts in self.calls.items()})


@torch.no_grad()
def capture_inputs(
    model: nn.Module, batches: list[Tensor], views: list[ExpertsView], max_tokens: int = 8192
) -> dict[str, LayerInputs]:
    """What each layer's experts and router saw on the first ``max_tokens`` tokens of ``batches``.

    Args:
        model: uncompressed; it is run in evaluation mode.
        batches: int64 ``[B, L]`` stacks of token ids.
        views: ``find_experts(model)``, or some of them.
        max_tokens: at least 1; the same tokens are kept of every layer.

    Returns:
        By ``view.name``.

    Raises:
        ValueError: a block whose router is not found or returns no logits.
    """
    recorders = {view.name: _Recorder(view, max_tokens) for view in views}
    was_training = model.training
    model.eval()
    try:
        with ExitStack() as stack:
            for recorder in recorders.values():
                handle = recorder.router().register_forward_hook(recorder.record_logits)
                stack.callback(handle.remove)
                stack.enter_context(recorder.view.intercept(recorder))
            seen = 0
            for ids in batches:
                model(input_ids=ids, use_cache=False)
                seen += ids.numel()
                if seen >= max_tokens:
                    break
    finally:
        model.train(was_training)
    return {name: recorder.inputs() for name, recorder in recorders.items()}
