"""Tiny random models of every supported family, and compressed ones that are right by construction.

Sizes are small and unlike one another (H 32, I 24, E 6, k 2), so that no two axes can be mistaken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from list_moe_model import ListMoeConfig, ListMoeForCausalLM
from torch import Tensor, nn

from d2moe_ext import hf
from d2moe_ext.adapters import ExpertsView, find_experts
from d2moe_ext.experts import D2MoEExperts
from d2moe_ext.quantise import quantise_rows
from d2moe_ext.spec import DeltaSpec, ExpertsSpec, GroupSpec, delta_names

HIDDEN, INTER, EXPERTS, TOP_K, VOCAB = 32, 24, 6, 2, 64

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FINE = {"intermediate_size": 40, "moe_intermediate_size": INTER}
_DEEPSEEK = {
    **_COMMON,
    **_FINE,
    "num_key_value_heads": 4,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}

FAMILIES: dict[str, tuple[str, dict]] = {
    "mixtral": ("Mixtral", {**_COMMON, "intermediate_size": INTER, "num_local_experts": EXPERTS}),
    "qwen2_moe": (
        "Qwen2Moe",
        {**_COMMON, **_FINE, "num_experts": EXPERTS, "shared_expert_intermediate_size": 40},
    ),
    "qwen3_moe": ("Qwen3Moe", {**_COMMON, **_FINE, "num_experts": EXPERTS, "head_dim": 8}),
    "phimoe": ("Phimoe", {**_COMMON, "intermediate_size": INTER, "num_local_experts": EXPERTS}),
    "deepseek_v2": ("DeepseekV2", {**_DEEPSEEK, "n_group": 1, "topk_group": 1}),
    "deepseek_v3": ("DeepseekV3", {**_DEEPSEEK, "n_group": 2, "topk_group": 1}),
    "olmoe": ("Olmoe", {**_COMMON, "intermediate_size": INTER, "num_experts": EXPERTS}),
    "gpt_oss": (
        "GptOss",
        {**_COMMON, "intermediate_size": INTER, "num_local_experts": EXPERTS, "head_dim": 8},
    ),
    "list_moe": ("", {}),
}
NATIVE_GATE = {name for name in FAMILIES if name != "gpt_oss"}  # gpt_oss has a gate of its own
EXPERT_LAYERS = {name: ([1, 2] if name.startswith("deepseek") else [0, 1]) for name in FAMILIES}


def tiny_config(family: str) -> transformers.PreTrainedConfig:
    name, settings = FAMILIES[family]
    if family == "list_moe":
        return ListMoeConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return getattr(transformers, f"{name}Config")(**settings)


def tiny_model(family: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A model in evaluation mode, float32, whose experts weigh enough that a mistake in them shows in the logits."""
    torch.manual_seed(seed)
    config = tiny_config(family)
    if family == "list_moe":
        ListMoeConfig.register_for_auto_class()
        ListMoeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
        model = ListMoeForCausalLM(config)
    else:
        model = getattr(transformers, f"{FAMILIES[family][0]}ForCausalLM")(config)
    with torch.no_grad():
        for view in find_experts(model):
            for parameter in view.parameters():
                parameter.normal_(std=0.3)
    return model.eval()


def token_ids(seed: int = 0, batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    return model(token_ids() if ids is None else ids).logits


def tolerance(values: Tensor, dtype: torch.dtype | None = None) -> float:
    """How far two evaluation orders may part: a rounding per term of sums of some hundred, layer upon layer."""
    return 256 * torch.finfo(dtype or values.dtype).eps * float(values.detach().abs().max())


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    limit = tolerance(expected, dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=limit)


def dense_experts(view: ExpertsView) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The experts of a view as the dense formula: every expert on every token, weighted by the router."""

    def run(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        for expert in range(view.layout.num_experts):
            gate_up = nn.functional.linear(hidden_states, view.gate_up_weight(expert), view.gate_up_bias(expert))
            down = nn.functional.linear(view.apply_gate(gate_up), view.down_weight(expert), view.down_bias(expert))
            weight = ((top_k_index == expert) * top_k_weights).sum(dim=1, keepdim=True)
            output = output + weight.to(output.dtype) * view.post_expert_norm(down)
        return output

    return run


def compress_exactly(
    view: ExpertsView,
    num_bases: int = 1,
    pruned: int = 0,
    dynamic: int = 0,
    joint_gate_up: bool | None = None,
    int8: bool = False,
) -> D2MoEExperts:
    """Compressed experts that compute what the plain ones do: full-rank deltas against the (pruned) mean of each base.

    Args:
        num_bases: expert e belongs to base ``e % num_bases``.
        pruned: columns of each base that are not stored (the deltas make up for them).
        dynamic: how many of the stored columns are left out per forward (this does change the result).
        joint_gate_up: None: where the layout requires it.
        int8: round the factors to eight bits (this does change the result, a little).
    """
    layout = view.layout
    joint = layout.interleaved if joint_gate_up is None else joint_gate_up
    weights = {
        "gate_up": torch.stack([view.gate_up_weight(e).detach() for e in range(layout.num_experts)]),
        "down": torch.stack([view.down_weight(e).detach() for e in range(layout.num_experts)]),
    }
    groups, deltas, tensors = {}, {}, {}
    expert_to_base = torch.arange(layout.num_experts, dtype=torch.int32) % num_bases
    for group, weight in weights.items():
        inputs = weight.shape[2]
        kept = inputs - pruned
        groups[group] = GroupSpec(num_bases, kept, kept - dynamic)
        mean = torch.stack([weight[expert_to_base == base].mean(dim=0) for base in range(num_bases)])
        columns = torch.stack([torch.randperm(inputs)[:kept].sort().values for _ in range(num_bases)])
        tensors[f"{group}_base"] = torch.stack([mean[base][:, columns[base]] for base in range(num_bases)])
        tensors[f"{group}_expert_to_base"] = expert_to_base
        if pruned:
            tensors[f"{group}_columns"] = columns.int()
        mask = torch.zeros(num_bases, 1, inputs).scatter_(2, columns.unsqueeze(1), 1.0).to(weight.dtype)
        delta = weight - (mean * mask)[expert_to_base.long()]
        for name, rows in _delta_rows(group, layout.gated, joint, delta).items():
            deltas[name] = _full_rank(name, rows, tensors)
    spec = ExpertsSpec(layout, groups["gate_up"], groups["down"], {n: deltas[n] for n in delta_names(layout, joint)})
    first = view.down_weight(0)
    if int8:
        spec = dataclasses.replace(spec, factor_dtype="int8")
        for factor in [f"{name}_delta_{part}" for name in deltas for part in "uv"]:
            tensors[factor], tensors[f"{factor}_scale"] = quantise_rows(tensors[factor].double(), first.dtype)
    experts = D2MoEExperts(spec, view, dtype=first.dtype, device=first.device)
    if layout.has_bias:
        tensors["gate_up_bias"] = torch.stack([view.gate_up_bias(e).detach() for e in range(layout.num_experts)])
        tensors["down_bias"] = torch.stack([view.down_bias(e).detach() for e in range(layout.num_experts)])
    children = {f"{name}.{key}": t for name, child in experts.named_children() for key, t in child.state_dict().items()}
    experts.load_state_dict({**tensors, **children})
    return experts


def _delta_rows(group: str, gated: bool, joint: bool, delta: Tensor) -> dict[str, Tensor]:
    if group == "down":
        return {"down": delta}
    if not gated:
        return {"up": delta}
    if joint:
        return {"gate_up": delta}
    gate, up = delta.chunk(2, dim=1)
    return {"gate": gate, "up": up}


def _full_rank(name: str, delta: Tensor, tensors: dict[str, Tensor]) -> DeltaSpec:
    """Factor ``delta [E, out, in]`` as identity times delta, or delta times identity, whose rows are shared."""
    num_experts, out, inputs = delta.shape
    rank = min(out, inputs)
    own = torch.arange(num_experts, dtype=torch.int32) * rank
    shared = torch.zeros(num_experts, dtype=torch.int32)
    if out <= inputs:
        u, v, u_start, v_start = torch.eye(out, dtype=delta.dtype), delta.reshape(-1, inputs), shared, own
    else:
        u, v = delta.transpose(1, 2).reshape(-1, out), torch.eye(inputs, dtype=delta.dtype)
        u_start, v_start = own, shared
    tensors[f"{name}_delta_u"], tensors[f"{name}_delta_v"] = u, v
    tensors[f"{name}_delta_rank"] = torch.full((num_experts,), rank, dtype=torch.int32)
    tensors[f"{name}_delta_u_start"], tensors[f"{name}_delta_v_start"] = u_start, v_start
    return DeltaSpec(u.shape[0], v.shape[0])


def compressed_model(family: str, layers: list[int] | None = None, **how: object) -> transformers.PreTrainedModel:
    """A tiny model whose experts (of some MoE layers, counted from 0; None: all) are compressed; it can be saved."""
    model = tiny_model(family)
    specs = {}
    for index, view in enumerate(find_experts(model)):
        if layers is None or index in layers:
            experts = compress_exactly(view, **how)
            specs[view.name] = experts.spec
            view.replace(experts)
    hf.mark_compressed(model, specs, {"ratio": 0.4, "merge": "mean"})
    return model


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in _files(directory)}


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file())
