"""The models whose layers are timed: configurations in place of weights, and what a ratio makes of their layers."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers

from d2moe_ext.adapters import ExpertsView, find_experts
from d2moe_ext.budget import LayerPlan, ModelShapes, plan_compression
from d2moe_ext.config import CompressionConfig, Preset
from d2moe_ext.shapes import experts_per_token, model_shapes
from d2moe_ext.spec import DeltaSpec, ExpertsSpec, GroupSpec

# As the models' own config.json files say. Where transformers' defaults are those numbers they are written out all the same.
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral-8x7B": (
        "Mixtral",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "Phi-3.5-MoE": (
        "Phimoe",
        {
            "vocab_size": 32064,
            "hidden_size": 4096,
            "intermediate_size": 6400,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 16,
            "num_experts_per_tok": 2,
            "attention_bias": True,
            "lm_head_bias": True,
        },
    ),
    # Its code comes with the model. Qwen2-MoE's has the same layers: shared experts, a first layer without experts; its
    # few more parameters (biases of q, k and v, a gate of the shared experts) are 0.002 % of the whole.
    "DeepSeek-MoE-16B": (
        "Qwen2Moe",
        {
            "vocab_size": 102400,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 2816,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 6,
            "mlp_only_layers": [0],
        },
    ),
    "Qwen1.5-MoE-A2.7B": (
        "Qwen2Moe",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
        },
    ),
    "Qwen3-30B-A3B": (
        "Qwen3Moe",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
        },
    ),
}
SHAPES = tuple(_MODELS)
# As d2moe plan takes them.
Variant = tuple[Preset, float]
_PRESETS: tuple[Preset, ...] = ("performance", "throughput", "quality")
VARIANTS: tuple[Variant, ...] = tuple((preset, ratio) for ratio in (0.4, 0.6) for preset in _PRESETS)


@cache
def _model(shape: str) -> transformers.PreTrainedModel:
    """On the meta device, in bfloat16, the dtype that all of them are published in."""
    family, settings = _MODELS[shape]
    config = getattr(transformers, f"{family}Config")(**settings, tie_word_embeddings=False)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@cache
def shapes_of(shape: str) -> ModelShapes:
    """The whole model, for counting."""
    return model_shapes(_model(shape))


def layer_view(shape: str) -> ExpertsView:
    """The experts of the first MoE layer, on the meta device."""
    return find_experts(_model(shape))[0]


def top_k_of(shape: str) -> int:
    """Experts a token takes."""
    return experts_per_token(_model(shape))


@cache
def layer_plan(shape: str, preset: Preset, ratio: float) -> LayerPlan:
    """What ``d2moe plan`` gives the first MoE layer when the whole model is compressed at ``ratio``."""
    return plan_compression(shapes_of(shape), CompressionConfig(ratio, preset=preset)).layers[0]


def spec_of(plan: LayerPlan, view: ExpertsView) -> ExpertsSpec:
    """The compressed layer of a plan whose factors are floating."""
    costs = plan.factor_costs
    return ExpertsSpec(
        view.layout,
        GroupSpec(plan.num_bases, plan.gate_up_kept, plan.gate_up_keep),
        GroupSpec(plan.num_bases, plan.down_kept, plan.down_keep),
        {name: DeltaSpec(sum(ranks), costs[name].v_rows(ranks)) for name, ranks in plan.ranks.items()},
        gauge_fixed=plan.gauge_fixed,
    )
