"""The view of a block's experts: layouts, weights, the intercepted call, and refusals."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from list_moe_model import ListMoeConfig, ListMoeForCausalLM
from tiny_models import (
    EXPERT_LAYERS,
    EXPERTS,
    FAMILIES,
    HIDDEN,
    INTER,
    NATIVE_GATE,
    TOP_K,
    assert_close,
    dense_experts,
    logits,
    tiny_config,
    tiny_model,
    token_ids,
)
from torch import nn
from transformers import AutoModelForCausalLM, Llama4ForCausalLM, Llama4TextConfig, LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2FN

from d2moe_ext.adapters import ExpertList, ExpertsLayout, FusedExperts, find_experts, native_activation, restore


@pytest.mark.parametrize("family", FAMILIES)
def test_find_experts_reads_the_layout_and_order(family):
    views = find_experts(tiny_model(family))
    special = family == "gpt_oss"
    layout = ExpertsLayout(
        num_experts=EXPERTS,
        hidden_size=HIDDEN,
        intermediate_size=INTER,
        gated=True,
        interleaved=special,
        has_bias=special,
        activation="silu" if family in NATIVE_GATE else None,
        has_post_expert_norm=False,
    )
    assert [view.layout for view in views] == [layout] * 2
    prefix = "" if family == "list_moe" else "model."
    assert [view.name for view in views] == [f"{prefix}layers.{i}.mlp.experts" for i in EXPERT_LAYERS[family]]


@pytest.mark.parametrize("family", FAMILIES)
def test_find_experts_works_on_the_meta_device(family):
    real = tiny_model(family)
    with torch.device("meta"):
        model = ListMoeForCausalLM(tiny_config(family)) if family == "list_moe" else _from_config(family)
    views = find_experts(model)
    assert [(view.name, view.layout) for view in views] == [(view.name, view.layout) for view in find_experts(real)]
    assert views[0].gate_up_weight(0).device.type == "meta"
    assert views[0].gate_up_weight(0).shape == (2 * INTER, HIDDEN)
    assert views[0].down_weight(0).shape == (HIDDEN, INTER)


def _from_config(family):
    return AutoModelForCausalLM.from_config(tiny_config(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_intercept_sees_the_routed_call_and_the_views_weights_are_the_models(family):
    model = tiny_model(family)
    expected = logits(model)
    views = find_experts(model)
    calls = []

    def record(view, hidden_states, top_k_index, top_k_weights):
        calls.append((view.name, tuple(hidden_states.shape), tuple(top_k_index.shape), tuple(top_k_weights.shape)))
        return dense_experts(view)(hidden_states, top_k_index, top_k_weights)

    tokens = token_ids().numel()
    with (
        views[0].intercept(functools.partial(record, views[0])),
        views[1].intercept(functools.partial(record, views[1])),
    ):
        assert_close(logits(model), expected)
    assert calls == [(view.name, (tokens, HIDDEN), (tokens, TOP_K), (tokens, TOP_K)) for view in views]
    logits(model)
    assert len(calls) == 2


@pytest.mark.parametrize("family", ["mixtral", "list_moe"])
def test_intercept_nests_and_ends_after_an_error(family):
    model = tiny_model(family)
    expected = logits(model)
    view = find_experts(model)[0]
    zeros = lambda x, ids, weights: torch.zeros_like(x)  # noqa: E731

    def fail(x, ids, weights):
        raise KeyError("stop")

    with view.intercept(zeros):
        without = logits(model)
        with pytest.raises(KeyError, match="stop"), view.intercept(fail):
            logits(model)
        assert torch.equal(logits(model), without)
    assert not torch.allclose(without, expected)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_observed_call_runs_as_ever(family):
    model = tiny_model(family)
    view, seen = find_experts(model)[0], []
    expected = logits(model)
    with view.intercept(lambda *arguments: seen.append(arguments), observe=True):
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), expected)
    ((x, ids, weights),) = seen
    assert x.shape == (token_ids().numel(), view.layout.hidden_size)
    assert ids.shape == weights.shape == (len(x), ids.shape[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_experts_through_an_intercept(family):
    model = tiny_model(family)
    views = find_experts(model)
    with views[0].intercept(dense_experts(views[0])), views[1].intercept(dense_experts(views[1])):
        model(token_ids()).logits.square().sum().backward()
    for view in views:
        assert all(parameter.grad is not None for parameter in view.parameters())
        assert sum(float(parameter.grad.abs().sum()) for parameter in view.parameters()) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_the_routed_experts_alone(family):
    model = tiny_model(family)
    for view in find_experts(model):
        expected = {id(p) for name, p in model.named_parameters() if name.startswith(f"{view.name}.")}
        assert {id(p) for p in view.parameters()} == expected
        bias = EXPERTS * (2 * INTER + HIDDEN) if view.layout.has_bias else 0
        assert sum(p.numel() for p in view.parameters()) == EXPERTS * 3 * INTER * HIDDEN + bias


@pytest.mark.parametrize("family", FAMILIES)
def test_gating_holds_no_routed_weight(family):
    view = find_experts(tiny_model(family))[0]
    gating = view.gating()
    assert len(pickle.dumps(gating)) < len(pickle.dumps(view.parameters()[0])) / 2
    gate_up = torch.randn(5, 2 * INTER)
    assert torch.equal(gating.apply_gate(gate_up), view.apply_gate(gate_up))
    assert torch.equal(copy.deepcopy(gating).apply_gate(gate_up), view.apply_gate(gate_up))


def test_list_biases_are_read_in_gate_up_order():
    model = ListMoeForCausalLM(ListMoeConfig(expert_bias=True)).eval()
    view = find_experts(model)[0]
    assert view.layout.has_bias
    with torch.no_grad():
        for parameter in view.parameters():
            parameter.normal_(std=0.3)  # transformers initialises biases to 0
    expert = view.module[3]
    assert torch.equal(view.gate_up_bias(3), torch.cat([expert.gate_proj.bias, expert.up_proj.bias]))
    expected = logits(model)
    with view.intercept(dense_experts(view)):
        assert_close(logits(model), expected)


@pytest.mark.parametrize("family", ["mixtral", "list_moe"])
def test_replace_and_restore(family):
    class Zeros(nn.Module):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            assert top_k_index.shape == top_k_weights.shape == (hidden_states.shape[0], TOP_K)
            return torch.zeros_like(hidden_states)

    model = tiny_model(family)
    expected = logits(model)
    originals = [view.module for view in find_experts(model)]
    names = [view.name for view in find_experts(model)]
    for view in find_experts(model):
        zeros = Zeros()
        view.replace(zeros)
        assert model.get_submodule(view.name) is view.module is zeros
    without = logits(model)
    assert not torch.allclose(without, expected)
    copied = copy.deepcopy(model)
    for name, original in zip(names, originals, strict=True):
        restore(model, name, original)
    assert torch.equal(logits(model), expected)
    # The copy's hook belongs to the copy: it still runs its own replaced experts.
    assert torch.equal(logits(copied), without)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_python", "gelu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_new", "gelu_tanh"),
        ("relu2", "relu2"),
        ("relu", None),
        ("gelu_10", None),
        ("quick_gelu", None),
        ("prelu", None),
        ("mish", None),
    ],
)
def test_native_activation_goes_by_what_is_computed(name, expected):
    assert native_activation(ACT2FN[name]) == expected


class DuckExperts(nn.Module):
    """What a decorated class of transformers looks like, with the flags of its newest version."""

    has_gate, has_bias, is_transposed, is_concatenated, has_post_expert_norm = False, False, False, True, True

    def __init__(self, shape=(4, 6, 8)):
        super().__init__()
        experts, inter, hidden = shape
        self.up_proj = nn.Parameter(torch.randn(experts, inter, hidden))
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, inter))
        self.act_fn = ACT2FN["relu2"]
        self.post_expert_norm = nn.LayerNorm(hidden)

    def _apply_gate(self, gate_up):
        raise AssertionError("experts without a gate are not gated")


def _block(experts):
    block = nn.Module()
    block.experts = experts
    return block


def test_experts_without_a_gate_and_with_a_norm():
    view = find_experts(_block(DuckExperts()))[0]
    assert view.layout == ExpertsLayout(4, 8, 6, False, False, False, "relu2", True)
    assert view.layout.gate_up_rows == 6
    x = torch.randn(3, 6)
    assert torch.equal(view.apply_gate(x), x.relu().square())
    with torch.no_grad():
        view.module.post_expert_norm.bias.fill_(2.0)
    y = torch.randn(3, 8)
    assert torch.equal(view.post_expert_norm(y), view.module.post_expert_norm(y))
    assert {id(p) for p in view.parameters()} == {id(view.module.up_proj), id(view.module.down_proj)}


def test_a_gate_of_the_models_own_is_never_taken_for_a_native_one():
    class Clamped(nn.Module):
        """An act_fn that the operators have, inside a gate that they do not."""

        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(4, 12, 8))
            self.down_proj = nn.Parameter(torch.randn(4, 8, 6))
            self.act_fn = ACT2FN["silu"]

        def _apply_gate(self, gate_up):
            gate, up = gate_up.chunk(2, dim=-1)
            return self.act_fn(gate) * up.clamp(-1, 1)

    view = find_experts(_block(Clamped()))[0]
    assert view.layout.activation is None
    x = 3 * torch.randn(5, 12)
    assert torch.equal(view.apply_gate(x), view.module._apply_gate(x))


def test_refusals_are_one_sentence():
    with pytest.raises(ValueError, match=r"must have mixture-of-experts layers .* got LlamaForCausalLM without one"):
        find_experts(LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=2)))
    llama4 = Llama4TextConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=8,
        intermediate_size_mlp=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        interleave_moe_layer_step=1,
        pad_token_id=0,
    )
    with pytest.raises(ValueError, match=r"find_experts: \S+experts must be called with .* got Llama4TextExperts"):
        find_experts(Llama4ForCausalLM(llama4))
    wrong = DuckExperts()
    wrong.down_proj = nn.Parameter(torch.randn(4, 8, 7))
    with pytest.raises(ValueError, match=r"that agree, got \[4, 6, 8\] and \[4, 8, 7\]"):
        find_experts(_block(wrong))


def test_list_refusals_are_one_sentence():
    model = tiny_model("list_moe")
    experts = model.layers[0].mlp.experts
    with pytest.raises(ValueError, match="must route them through moe_infer, got Module without it"):
        find_experts(_block(experts))
    with pytest.raises(RuntimeError, match="in eval mode only, got a training model"):
        find_experts(model.train())[0].intercept(lambda x, ids, weights: x).__enter__()
    experts[2].up_proj = nn.Linear(HIDDEN, INTER + 1, bias=False)
    with pytest.raises(ValueError, match=r"find_experts: the experts of layers\.0\.mlp\.experts must have equal shapes"):
        find_experts(model)


def test_kinds_of_views():
    assert {type(view) for view in find_experts(tiny_model("list_moe"))} == {ExpertList}
    assert {type(view) for view in find_experts(tiny_model("olmoe"))} == {FusedExperts}
