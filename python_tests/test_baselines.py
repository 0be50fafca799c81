"""The rival compressors as a whole: bytes, what they leave untouched, what they refuse."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from baseline_cases import EXPERT, EXPERTS, FAMILIES, HIDDEN, INTER, LAYERS, ROW, expert, expert_output, prepared

from benchmarks.baselines import BASELINES
from benchmarks.baselines.counts import spread
from benchmarks.baselines.mobe import Group
from benchmarks.baselines.routing import NoExperts, keep_experts, router_of
from benchmarks.study import byte_budget, model_parameters
from d2moe_ext.adapters import find_experts

# What a method may leave of its budget: a whole expert, or a step of rank.
SLACK = {
    "naee": 2 * (EXPERT + ROW),
    "reap": 2 * (EXPERT + ROW),
    "hc_smoe": 2 * EXPERT,
    "mc_smoe": 2 * EXPERT,
    "svd_llm": 2 * (HIDDEN + INTER),
    "moe_i2": 2 * (HIDDEN + INTER),
    "mobe": 2 * (EXPERTS * INTER + EXPERTS * HIDDEN + EXPERTS * EXPERTS),
}


def stored_floats(name: str, model: torch.nn.Module) -> int:
    """What the model's expert weights take, read off the weights themselves: distinct experts, or numerical ranks."""
    total = 0
    for view in find_experts(model):
        experts = range(view.layout.num_experts)
        if name in ("hc_smoe", "mc_smoe"):
            total += EXPERT * len({tuple(expert(view, e).tolist()) for e in experts})
        elif name in ("svd_llm", "moe_i2"):
            for e in experts:
                gate, up = view.gate_up_weight(e).detach().double().chunk(2)
                for matrix in (gate, up, view.down_weight(e).detach().double()):
                    rank = int(torch.linalg.matrix_rank(matrix, rtol=1e-5))
                    total += min(rank * sum(matrix.shape), matrix.numel())
        else:
            total += EXPERT * view.layout.num_experts
    return total


@pytest.mark.parametrize(("ratio", "family"), [(0.2, "mixtral"), (0.45, "qwen3_moe"), (0.7, "mixtral")])
@pytest.mark.parametrize("name", BASELINES)
def test_bytes_are_within_the_budget_and_near_it(name: str, ratio: float, family: str) -> None:
    model, calibration = prepared(family)
    assert any(int(layer.tokens.min()) == 0 for layer in calibration.stats.layers.values())
    budget = byte_budget(model, ratio)
    taken = BASELINES[name](model, calibration, ratio)
    assert budget - SLACK[name] < taken <= budget
    assert bool(tiny_models.logits(model).isfinite().all())
    if name != "mobe":
        rest = model_parameters(model) - sum(p.numel() for view in find_experts(model) for p in view.parameters())
        index = 4 * EXPERTS * LAYERS if name in ("hc_smoe", "mc_smoe") else 0
        assert taken == 2 * (rest + stored_floats(name, model)) + index


@pytest.mark.parametrize("name", BASELINES)
def test_stored_weights_are_bfloat16(name: str) -> None:
    model, calibration = prepared("mixtral")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-5)
    BASELINES[name](model, calibration, 0.4)
    experts = {id(p) for view in find_experts(model) for p in view.parameters()}
    factored = name in ("svd_llm", "moe_i2", "mobe")
    for parameter in model.parameters():
        if not (factored and id(parameter) in experts):
            assert torch.equal(parameter, parameter.bfloat16().float())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", BASELINES)
def test_with_nothing_to_remove_the_model_stays_as_it_is(name: str, family: str) -> None:
    model, calibration = prepared(family)
    expected = tiny_models.logits(model)
    assert BASELINES[name](model, calibration, 0.0) == 2 * model_parameters(model)
    assert torch.equal(tiny_models.logits(model), expected)


@pytest.mark.parametrize("name", ["naee", "reap", "hc_smoe", "mc_smoe"])
def test_a_budget_below_one_expert_per_layer_empties_a_layer(name: str) -> None:
    model, calibration = prepared("mixtral")
    rest = model_parameters(model) - LAYERS * EXPERTS * EXPERT
    ratio = 1 - (rest + 1.5 * EXPERT) / model_parameters(model)
    taken = BASELINES[name](model, calibration, ratio)
    assert [type(layer.mlp.experts) is NoExperts for layer in model.model.layers].count(True) == 1
    assert taken <= 2 * (rest + EXPERT) + 4 * EXPERTS * LAYERS
    assert bool(tiny_models.logits(model).isfinite().all())


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_a_ratio_out_of_range_is_refused(name: str, ratio: float) -> None:
    model, calibration = prepared("mixtral")
    with pytest.raises(ValueError, match=f"ratio must lie in 0 <= ratio < 1, got {ratio}"):
        BASELINES[name](model, calibration, ratio)


@pytest.mark.parametrize("name", BASELINES)
def test_a_ratio_out_of_reach_is_refused(name: str) -> None:
    model, calibration = prepared("mixtral")
    with pytest.raises(ValueError, match="the budget must hold|the budget of parameters must be"):
        BASELINES[name](model, calibration, 0.95)


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "list_moe"])
def test_a_router_of_another_kind_is_refused(family: str) -> None:
    view = find_experts(tiny_models.tiny_model(family))[0]
    with pytest.raises(ValueError, match=f"the router of {view.name} must hold nothing but weight"):
        router_of(view)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
@pytest.mark.parametrize("kept", [[1, 3, 4], [2]])
def test_kept_experts_are_routed_by_a_softmax_over_them(family: str, kept: list[int]) -> None:
    model = tiny_models.tiny_model(family)
    view = find_experts(model)[0]
    x = torch.randn(11, tiny_models.HIDDEN)
    probabilities = (x @ view.block.gate.weight[kept].T).softmax(dim=1)
    value, slot = probabilities.topk(min(2, len(kept)), dim=1)
    if family == "mixtral":  # the only one of the three whose default renormalises over the chosen experts
        value = value / value.sum(dim=1, keepdim=True)
    expected = torch.zeros_like(x)
    for token in range(len(x)):
        for weight, place in zip(value[token], slot[token], strict=True):
            expected[token] += weight * expert_output(view, kept[int(place)], x[token])
    keep_experts(view, kept)
    tiny_models.assert_close(view.block(x[None])[0].detach(), expected.detach())
    assert view.block.gate.weight.shape == (len(kept), tiny_models.HIDDEN)
    assert view.module.down_proj.shape[0] == len(kept)


def test_a_layer_without_experts_adds_nothing() -> None:
    model = tiny_models.tiny_model("mixtral")
    view = find_experts(model)[0]
    before = model_parameters(model)
    keep_experts(view, [])
    assert torch.equal(view.block(torch.randn(1, 5, tiny_models.HIDDEN)), torch.zeros(1, 5, tiny_models.HIDDEN))
    expert_parameters = 3 * tiny_models.HIDDEN * tiny_models.INTER
    assert before - model_parameters(model) == tiny_models.EXPERTS * (expert_parameters + tiny_models.HIDDEN)


def test_spread_finds_the_least_summed_loss() -> None:
    losses = torch.rand(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).tolist()
    for total in range(13):
        every = [(i, j, total - i - j) for i in range(5) for j in range(5) if 0 <= total - i - j < 5]
        best = min(every, key=lambda counts: sum(losses[layer][count] for layer, count in enumerate(counts)))
        assert spread(losses, total) == list(best)
        even = [counts for counts in every if max(counts) - min(counts) <= 1]
        best = min(even, key=lambda counts: sum(losses[layer][count] for layer, count in enumerate(counts)))
        assert spread(losses, total, uniform=True) == list(best)


def test_mixtures_of_bases_are_counted_as_they_are_stored() -> None:
    model, calibration = prepared("mixtral")
    view = find_experts(model)[0]
    for name in ("gate", "down"):
        group = Group(view, calibration.stats.layers[view.name], name)
        assert group.cost(3, 5) == EXPERTS * INTER * 5 + 3 * 5 * HIDDEN + EXPERTS * 3
        rank = group.rank_for(3, 10_000)
        assert group.cost(3, rank) <= 10_000 < group.cost(3, rank + 1)
