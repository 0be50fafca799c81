"""Tiny models with eight experts, large beside the rest of the model, and what the rival compressors are given of them."""

from __future__ import annotations

import copy
from functools import cache

import tiny_models
import torch
import transformers
from torch import Tensor, nn

from benchmarks.study import Calibration, capture_inputs
from d2moe_ext.adapters import ExpertsView, find_experts
from d2moe_ext.calibration import calibrate

FAMILIES = ("mixtral", "qwen3_moe")
EXPERTS, HIDDEN, INTER, LAYERS = 8, 32, 48, 2
EXPERT = 3 * HIDDEN * INTER  # parameters
ROW = HIDDEN


@cache
def _prepared(family: str) -> tuple[transformers.PreTrainedModel, Calibration]:
    torch.manual_seed(3)
    config = tiny_models.tiny_config(family)
    for name, value in {
        "num_local_experts": EXPERTS,
        "num_experts": EXPERTS,
        "intermediate_size": INTER,
        "moe_intermediate_size": INTER,
    }.items():
        if hasattr(config, name):
            setattr(config, name, value)
    model = getattr(transformers, f"{tiny_models.FAMILIES[family][0]}ForCausalLM")(config).eval()
    with torch.no_grad():
        for view in find_experts(model):
            for parameter in view.parameters():
                parameter.normal_(std=0.3)
            view.block.gate.weight.normal_(std=0.5)
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    # Two tokens only: some experts are never used.
    batches = [torch.tensor([[3, 4] * 8]), torch.tensor([[5, 6, 7, 3] * 8])]
    stats = calibrate(model, batches, merge="mean")
    inputs = capture_inputs(model, batches, find_experts(model))
    return model, Calibration(batches, stats, inputs)


def prepared(family: str) -> tuple[transformers.PreTrainedModel, Calibration]:
    """A model of its own to change, whose parameters bfloat16 holds exactly, and its calibration."""
    model, calibration = _prepared(family)
    return copy.deepcopy(model), calibration


def expert(view: ExpertsView, index: int) -> Tensor:
    """All weights of one expert in a row."""
    return torch.cat([view.gate_up_weight(index).detach().flatten(), view.down_weight(index).detach().flatten()])


def expert_output(view: ExpertsView, index: int, x: Tensor) -> Tensor:
    """``down(silu(gate x) * up x)`` of one expert, written out."""
    gate, up = (x @ view.gate_up_weight(index).detach().T).chunk(2, dim=-1)
    return (nn.functional.silu(gate) * up) @ view.down_weight(index).detach().T
