"""HC-SMoE and MC-SMoE: who is grouped with whom, and what a merged expert is."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from baseline_cases import EXPERT, EXPERTS, INTER, LAYERS, expert, expert_output, prepared
from torch import Tensor

from benchmarks.baselines.hc_smoe import cluster_loss, hc_smoe, mean_outputs
from benchmarks.baselines.mc_smoe import dominant_experts, group_by_router, mc_smoe
from benchmarks.baselines.merging import check_mergeable, frequency_weights, matching_order, merge_group
from benchmarks.study import model_parameters
from d2moe_ext.adapters import ExpertsView, find_experts


def shuffle(view: ExpertsView, source: int, target: int, seed: int, noise: float = 0.0) -> Tensor:
    """Make expert ``target`` a copy of ``source`` with its neurons permuted; returns the permutation."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(INTER, generator=generator)
    gate, up = view.gate_up_weight(source).detach().chunk(2)
    with torch.no_grad():
        for place, weight in (
            (view.gate_up_weight(target), torch.cat([gate[order], up[order]])),
            (view.down_weight(target), view.down_weight(source).detach()[:, order]),
        ):
            place.copy_((weight + noise * torch.randn(weight.shape, generator=generator)).bfloat16().float())
    return order


def ratio_for(model: torch.nn.Module, experts: int) -> float:
    """A ratio whose budget holds so many experts of all layers, the index, and half an expert more."""
    return ((LAYERS * EXPERTS - experts - 0.5) * EXPERT - 2 * EXPERTS * LAYERS) / model_parameters(model)


def test_frequency_weights() -> None:
    assert frequency_weights(torch.tensor([3, 1])).tolist() == [0.75, 0.25]
    assert frequency_weights(torch.tensor([0, 0, 0, 0])).tolist() == [0.25] * 4


def test_a_merged_expert_is_the_weighted_mean() -> None:
    model, _ = prepared("mixtral")
    view = find_experts(model)[0]
    before = [expert(view, e) for e in range(EXPERTS)]
    merge_group(view, [2, 5, 6], torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), align=False)
    expected = (0.5 * before[2].double() + 0.3 * before[5].double() + 0.2 * before[6].double()).float().bfloat16().float()
    for e in range(EXPERTS):
        assert torch.equal(expert(view, e), expected if e in (2, 5, 6) else before[e])


def test_a_token_with_two_merged_experts_gets_both_weights() -> None:
    model, calibration = prepared("mixtral")
    view = find_experts(model)[0]
    merge_group(view, range(EXPERTS), torch.full((EXPERTS,), 1 / EXPERTS, dtype=torch.float64), align=False)
    x = calibration.inputs[view.name].hidden_states[:6]
    # Mixtral's weights sum to 1 over a token's experts, which are one expert now.
    tiny_models.assert_close(view.block(x[None])[0].detach(), expert_output(view, 3, x))


def test_matching_finds_the_permutation() -> None:
    model, _ = prepared("mixtral")
    view = find_experts(model)[0]
    order = shuffle(view, 1, 4, seed=5, noise=0.02)
    # Place i of expert 4 holds neuron order[i] of expert 1: matched to expert 1, the inverse comes out.
    assert torch.equal(matching_order(view, 4, 1)[order], torch.arange(INTER))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("method", [hc_smoe, mc_smoe])
def test_permuted_copies_merge_exactly(method, family: str) -> None:
    model, calibration = prepared(family)
    for view in find_experts(model):
        for e in range(1, EXPERTS):
            shuffle(view, 0, e, seed=e)
    expected = tiny_models.logits(model)
    method(model, calibration, ratio_for(model, LAYERS))
    for view in find_experts(model):
        assert len({tuple(expert(view, e).tolist()) for e in range(EXPERTS)}) == 1
    tiny_models.assert_close(tiny_models.logits(model), expected)


def test_hc_smoe_merges_the_experts_with_alike_outputs() -> None:
    model, calibration = prepared("mixtral")
    first, second = find_experts(model)
    # In each layer four pairs; every pair is two noisy copies of one expert.
    for view in (first, second):
        for e in (0, 2, 4, 6):
            shuffle(view, e, e + 1, seed=e, noise=0.001)
    hc_smoe(model, calibration, ratio_for(model, 8))
    for view in (first, second):
        weights = [tuple(expert(view, e).tolist()) for e in range(EXPERTS)]
        assert len(set(weights)) == 4
        assert all(weights[e] == weights[e + 1] for e in (0, 2, 4, 6))


def test_hc_smoe_weighs_by_frequency() -> None:
    model, calibration = prepared("mixtral")
    original, _ = prepared("mixtral")
    hc_smoe(model, calibration, ratio_for(model, 12))
    merged = 0
    for view, before in zip(find_experts(model), find_experts(original), strict=True):
        tokens = calibration.stats.layers[view.name].tokens
        groups: dict[tuple, list[int]] = {}
        for e in range(EXPERTS):
            groups.setdefault(tuple(expert(view, e).tolist()), []).append(e)
        for weight, members in groups.items():
            if len(members) > 1:
                merged += 1
                leader = max(members, key=lambda e: int(tokens[e]))
                shares = frequency_weights(tokens[members])
                mean = torch.zeros(EXPERT, dtype=torch.float64)
                for e, share in zip(members, shares, strict=True):
                    order = matching_order(before, e, leader)
                    gate, up = before.gate_up_weight(e).detach().chunk(2)
                    down = before.down_weight(e).detach()
                    mean += share * torch.cat([gate[order].flatten(), up[order].flatten(), down[:, order].flatten()]).double()
                assert torch.equal(torch.tensor(weight), mean.float().bfloat16().float())
    assert merged


def test_mean_outputs_are_over_all_tokens() -> None:
    model, calibration = prepared("mixtral")
    view = find_experts(model)[0]
    x = calibration.inputs[view.name].hidden_states
    expected = torch.stack([expert_output(view, e, x).mean(dim=0) for e in range(EXPERTS)])
    torch.testing.assert_close(mean_outputs(view, calibration.inputs[view.name]).float(), expected, rtol=1e-4, atol=1e-4)


def test_cluster_loss_by_hand() -> None:
    features = torch.tensor([[0.0], [2.0], [10.0]], dtype=torch.float64)
    shares = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)
    assert cluster_loss(features, shares, torch.tensor([0, 0, 1])) == pytest.approx(0.5)
    assert cluster_loss(features, shares, torch.tensor([0, 1, 2])) == 0.0
    # All in one: the centre is 5.5.
    assert cluster_loss(features, shares, torch.tensor([0, 0, 0])) == pytest.approx((5.5**2 + 3.5**2) / 4 + 4.5**2 / 2)


def test_dominant_experts_are_the_most_used_of_the_whole_model() -> None:
    tokens = [torch.tensor([10, 9, 8, 0]), torch.tensor([100, 5, 4, 20]), torch.tensor([0, 0, 0, 0])]
    assert dominant_experts(tokens, 3) == [[0], [0], [0]]
    assert dominant_experts(tokens, 5) == [[0, 1, 2], [0], [0]]
    assert dominant_experts(tokens, 6) == [[0, 1, 2], [0, 3], [0]]


def test_others_join_the_dominant_expert_the_router_treats_most_alike() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(40, 5, generator=generator)
    logits[:, 3] = 3 * logits[:, 1] + 0.1 * torch.randn(40, generator=generator)  # scale does not matter
    logits[:, 0] = logits[:, 4] + 0.1 * torch.randn(40, generator=generator)
    logits[:, 2] = -logits[:, 1] + 0.5 * logits[:, 4]
    assert group_by_router(logits, [1, 4]) == [[1, 3], [4, 0, 2]]


def test_mc_smoe_leaves_dominant_experts_of_their_own_as_they_are() -> None:
    model, calibration = prepared("mixtral")
    original, _ = prepared("mixtral")
    mc_smoe(model, calibration, ratio_for(model, 13))
    tokens = [calibration.stats.layers[view.name].tokens for view in find_experts(model)]
    leaders = dominant_experts(tokens, 13)
    for view, before, dominant in zip(find_experts(model), find_experts(original), leaders, strict=True):
        for members in group_by_router(calibration.inputs[view.name].router_logits, dominant):
            same = [torch.equal(expert(view, e), expert(before, e)) for e in members]
            assert len({tuple(expert(view, e).tolist()) for e in members}) == 1
            # A partner that no token reached has no say in the mean.
            used = [e for e in members if int(calibration.stats.layers[view.name].tokens[e])]
            assert same[0] == (len(members) == 1 or used == members[:1])


def test_experts_with_biases_are_refused() -> None:
    view = find_experts(prepared("mixtral")[0])[0]
    view.layout = type(view.layout)(**{**vars(view.layout), "has_bias": True})
    with pytest.raises(ValueError, match="must have no biases"):
        check_mergeable([view])
