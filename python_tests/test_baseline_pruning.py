"""NAEE, REAP and the pruning of MoE-I²: what they measure and whom they keep, against plain formulas."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import tiny_models
import torch
from baseline_cases import EXPERT, EXPERTS, FAMILIES, LAYERS, ROW, expert_output, prepared
from torch import Tensor

from benchmarks.baselines.counts import choose_counts
from benchmarks.baselines.moe_i2 import experts_to_keep, importance, moe_i2, rank_weights
from benchmarks.baselines.naee import best_subsets, naee
from benchmarks.baselines.outputs import SubsetLoss
from benchmarks.baselines.reap import reap, saliency
from benchmarks.baselines.routing import keep_experts
from benchmarks.study import LayerInputs, model_parameters
from d2moe_ext.adapters import ExpertsView, find_experts
from d2moe_ext.evaluate import perplexity


def routed_output(view: ExpertsView, family: str, x: Tensor, kept: tuple[int, ...]) -> Tensor:
    """The layer's routed output ``[T, H]`` when only ``kept`` may be chosen, expert by expert."""
    probabilities = (x @ view.block.gate.weight.detach()[list(kept)].T).softmax(dim=1)
    value, slot = probabilities.topk(min(2, len(kept)), dim=1)
    if family == "mixtral":
        value = value / value.sum(dim=1, keepdim=True)
    output = torch.zeros_like(x)
    for place, expert in enumerate(kept):
        weight = (value * (slot == place)).sum(dim=1, keepdim=True)
        output += weight * expert_output(view, expert, x)
    return output


def kept_experts(view: ExpertsView, rows_before: Tensor) -> tuple[int, ...]:
    """Which experts a layer still has, by the rows of its router."""
    return tuple(int((rows_before == row).all(dim=1).nonzero()[0]) for row in view.block.gate.weight.detach())


def ratio_for(model: torch.nn.Module, experts: int) -> float:
    """A ratio whose budget holds exactly so many experts of all layers, and half an expert more."""
    gone = LAYERS * EXPERTS - experts - 0.5
    return gone * (EXPERT + ROW) / model_parameters(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_a_set_is_the_change_of_the_layers_output(family: str) -> None:
    model, calibration = prepared(family)
    view = find_experts(model)[1]
    inputs = calibration.inputs[view.name]
    loss = SubsetLoss(view, inputs)
    x = inputs.hidden_states
    full = routed_output(view, family, x, tuple(range(EXPERTS)))
    for kept in [(0, 1), (5,), (2, 4, 6, 7), tuple(range(1, EXPERTS)), tuple(range(EXPERTS))]:
        expected = float((full - routed_output(view, family, x, kept)).square().sum(dim=1).mean())
        assert loss(kept) == pytest.approx(expected, rel=1e-3, abs=1e-4 * float(full.square().sum(dim=1).mean()))
    assert loss([]) == pytest.approx(float(full.square().sum(dim=1).mean()), rel=1e-3)
    assert view.block.gate.weight.shape[0] == EXPERTS  # the router is as it was
    assert view.block.gate.top_k == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_naee_keeps_the_best_of_all_sets(family: str) -> None:
    model, calibration = prepared(family)
    original, _ = prepared(family)
    rows = [view.block.gate.weight.detach().clone() for view in find_experts(model)]
    naee(model, calibration, ratio_for(model, 7))
    assert sum(view.layout.num_experts for view in find_experts(model)) == 7
    for view, changed, before in zip(find_experts(original), find_experts(model), rows, strict=True):
        x = calibration.inputs[view.name].hidden_states
        full = routed_output(view, family, x, tuple(range(EXPERTS)))

        def error(kept: tuple[int, ...]) -> float:
            return float((full - routed_output(view, family, x, kept)).square().sum())  # noqa: B023

        kept = kept_experts(changed, before)
        best = min(error(other) for other in combinations(range(EXPERTS), len(kept)))
        assert error(kept) <= best * (1 + 1e-4)


def test_with_many_experts_naee_removes_the_least_missed_one_by_one() -> None:
    class Additive:
        """A layer of 14 experts, each missed by its own number."""

        num_experts = 14

        def __call__(self, kept: tuple[int, ...]) -> float:
            return float(sum((5 * e) % 14 for e in range(14) if e not in kept))

    order = sorted(range(14), key=lambda e: (5 * e) % 14, reverse=True)
    found = best_subsets(Additive())  # type: ignore[arg-type]
    assert [set(kept) for _, kept in found] == [set(order[:count]) for count in range(15)]


@pytest.mark.parametrize("family", FAMILIES)
def test_saliency_is_the_mean_over_an_experts_own_tokens(family: str) -> None:
    model, calibration = prepared(family)
    for view in find_experts(model):
        inputs = calibration.inputs[view.name]
        expected = torch.zeros(EXPERTS)
        for expert in range(EXPERTS):
            values = []
            for token in range(len(inputs.hidden_states)):
                for slot in range(2):
                    if int(inputs.top_k_index[token, slot]) == expert:
                        output = expert_output(view, expert, inputs.hidden_states[token])
                        values.append(float(inputs.top_k_weights[token, slot]) * float(output.norm()))
            if values:
                expected[expert] = sum(values) / len(values)
        torch.testing.assert_close(saliency(view, inputs), expected, rtol=1e-4, atol=1e-4)


def test_reap_keeps_the_experts_of_the_highest_saliency() -> None:
    model, calibration = prepared("mixtral")
    scores = [saliency(view, calibration.inputs[view.name]) for view in find_experts(model)]
    rows = [view.block.gate.weight.detach().clone() for view in find_experts(model)]
    reap(model, calibration, ratio_for(model, 9))
    for view, score, before in zip(find_experts(model), scores, rows, strict=True):
        kept = kept_experts(view, before)
        assert set(kept) == set(score.topk(len(kept)).indices.tolist())


def test_the_counts_are_those_with_the_lowest_perplexity_on_calibration_text() -> None:
    model, calibration = prepared("mixtral")
    losses = [[float(8 - count) ** 1.2 for count in range(9)], [0.01 * (8 - count) for count in range(9)]]
    seen = {}

    def prune(trial: torch.nn.Module, counts: list[int]) -> None:
        for view, count in zip(find_experts(trial), counts, strict=True):
            keep_experts(view, range(count))
        text = torch.cat([batch.flatten() for batch in calibration.batches])
        seen[tuple(counts)] = perplexity(trial, text, window=calibration.batches[0].shape[1]).perplexity

    chosen = choose_counts(model, calibration, losses, 8, prune)
    assert len(seen) == 3
    assert (8, 0) in seen  # by the losses as they are
    assert (5, 3) in seen  # relative to each layer's own
    assert (4, 4) in seen  # as equal as can be
    assert seen[tuple(chosen)] == min(seen.values())
    assert model_parameters(model) == model_parameters(prepared("mixtral")[0])  # only copies were pruned


def test_importance_is_the_loss_without_one_expert() -> None:
    model, calibration = prepared("qwen3_moe")
    view = find_experts(model)[0]
    inputs = calibration.inputs[view.name]
    x = inputs.hidden_states
    full = routed_output(view, "qwen3_moe", x, tuple(range(EXPERTS)))
    for expert, value in enumerate(importance(SubsetLoss(view, inputs))):
        others = tuple(e for e in range(EXPERTS) if e != expert)
        expected = float((full - routed_output(view, "qwen3_moe", x, others)).square().sum(dim=1).mean())
        assert value == pytest.approx(expected, rel=1e-3, abs=1e-4 * float(full.square().sum(dim=1).mean()))


def test_the_share_of_experts_that_stays_passes_through_the_papers_own_split() -> None:
    assert experts_to_keep(0.45, 1000) in (750, 751)
    assert experts_to_keep(1.0, 16) == 16
    assert experts_to_keep(0.0, 16) == 0
    assert experts_to_keep(0.45**2, 1000) in (562, 563)  # 0.75²


def test_ranks_grow_with_importance() -> None:
    weights = rank_weights([0.0, 1.0, 5.0])
    assert sum(weights) == pytest.approx(3)
    assert 0 < weights[0] < weights[1] < weights[2]
    assert rank_weights([0.0, 0.0]) == pytest.approx([1.0, 1.0])


def test_moe_i2_gives_the_most_important_expert_the_highest_rank() -> None:
    model, calibration = prepared("mixtral")
    views = find_experts(model)
    rows = [view.block.gate.weight.detach().clone() for view in views]
    scores = [importance(SubsetLoss(view, calibration.inputs[view.name])) for view in views]
    moe_i2(model, calibration, 0.5)
    assert LAYERS < sum(view.layout.num_experts for view in find_experts(model)) < LAYERS * EXPERTS
    for view, before, score in zip(find_experts(model), rows, scores, strict=True):
        kept = kept_experts(view, before)
        assert len(kept) > 1
        ranks = {}
        for place, expert in enumerate(kept):
            ranks[expert] = int(torch.linalg.matrix_rank(view.down_weight(place).detach().double(), rtol=1e-5))
        ordered = sorted(kept, key=lambda expert: score[expert])
        assert ranks[ordered[0]] < ranks[ordered[-1]]
        assert all(ranks[a] <= ranks[b] + 1 for a, b in pairwise(ordered))


def test_captured_weights_of_other_routers_are_taken_as_they_are() -> None:
    model, calibration = prepared("mixtral")
    view = find_experts(model)[0]
    inputs = calibration.inputs[view.name]
    doubled = LayerInputs(inputs.hidden_states, inputs.top_k_index, 2 * inputs.top_k_weights, inputs.router_logits)
    # Nothing is dropped, but the router now gives half of what was captured: the loss is that of the other half.
    assert SubsetLoss(view, doubled)(range(EXPERTS)) == pytest.approx(SubsetLoss(view, inputs)([]), rel=1e-3)
    assert tiny_models.TOP_K == 2
