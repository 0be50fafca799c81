"""Counting and planning: the paper's Table 12, budgets that land, ratios that cannot be reached."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paper_config import paper_config

from d2moe_ext.budget import LayerShapes, ModelShapes, kept_columns, plan_compression, without_deltas
from d2moe_ext.factor_cost import FactorCost, Purse, equal_share
from d2moe_ext.global_ranks import choose_global_ranks, concave_points

# The preserved shares of the deltas in the paper's Table 12, in percent.
TABLE_12 = {
    0.1: {0.2: 68.05, 0.4: 47.34, 0.6: 26.62, 0.7: 16.26, 0.8: 5.93},
    0.6: {0.2: 74.30, 0.4: 53.58, 0.6: 32.86, 0.7: 22.54, 0.8: 12.18},
}


def mixtral_8x7b() -> ModelShapes:
    layers = tuple(LayerShapes(f"model.layers.{i}.mlp.experts", 8, 4096, 14336, 2) for i in range(32))
    return ModelShapes(layers, 46_702_792_704, 32000 * 4096, other_tensors=227, element_size=2)


def small(num_layers=3, num_experts=8, hidden=192, inter=288, other=500_000, **options) -> ModelShapes:
    layers = tuple(LayerShapes(f"layers.{i}", num_experts, hidden, inter, 2, **options) for i in range(num_layers))
    total = other + sum(s.weight_parameters + s.bias_parameters for s in layers)
    return ModelShapes(layers, total, 0, other_tensors=20, element_size=2)


@pytest.mark.parametrize(("sparsity", "ratio"), [(s, r) for s, row in TABLE_12.items() for r in row])
def test_table_12_is_reproduced_within_a_twentieth_of_a_point(sparsity, ratio):
    plan = plan_compression(mixtral_8x7b(), paper_config(ratio, base_sparsity=sparsity, count="paper"))
    assert abs(100 * plan.delta_share - TABLE_12[sparsity][ratio]) < 0.05


@settings(max_examples=60, deadline=None)
@given(
    ratio=st.floats(0.05, 0.7),
    sparsity=st.sampled_from([0.0, 0.1, 0.37, 0.6]),
    count=st.sampled_from(["stored", "paper"]),
    num_experts=st.integers(4, 12),
    joint=st.booleans(),
    gauge_fixed=st.booleans(),
    factor_dtype=st.sampled_from(["model", "int8"]),
    element_size=st.sampled_from([2, 4]),
    options=st.sampled_from([{}, {"gated": False}, {"interleaved": True, "has_bias": True}, {"has_bias": True}]),
)
def test_a_plan_lands_within_half_a_percent_and_never_above(
    ratio, sparsity, count, num_experts, joint, gauge_fixed, factor_dtype, element_size, options
):
    model = replace(small(num_experts=num_experts, **options), element_size=element_size)
    factors = {"joint_gate_up": joint, "gauge_fixed": gauge_fixed, "factor_dtype": factor_dtype}
    config = paper_config(ratio, base_sparsity=sparsity, count=count, **factors)
    layers = [without_deltas(layer, config, element_size) for layer in model.layers]
    bare = model.other_parameters + sum(layer.parameters(count) for layer in layers)
    if bare > (1 - ratio) * model.total_parameters:
        with pytest.raises(ValueError, match="ratio must lie between 0 and"):
            plan_compression(model, config)
        return
    plan = plan_compression(model, config)
    target = (1 - ratio) * model.total_parameters
    costs = [(cost, layer.ranks[name]) for layer in plan.layers for name, cost in layer.factor_costs.items()]
    # Factors of eight bits may cost less at their full rank than the ratio allows.
    whole = factor_dtype == "int8" and all(cost.longest - min(ranks) < 8 for cost, ranks in costs)
    assert plan.compressed_parameters <= target
    assert plan.compressed_parameters >= 0.995 * target or whole


@given(
    out=st.integers(1, 50),
    inputs=st.integers(1, 50),
    gauge_fixed=st.booleans(),
    int8=st.sampled_from([0, 2, 4]),
    ranks=st.lists(st.integers(0, 50), min_size=1, max_size=6),
)
def test_factors_cost_what_they_store(out, inputs, gauge_fixed, int8, ranks):
    cost = FactorCost(out, inputs, gauge_fixed, int8)
    ranks = [min(rank, cost.longest) for rank in ranks]
    elements = [rank * inputs - (rank**2 if gauge_fixed else 0) for rank in ranks]
    stored_elements = out * sum(ranks) + inputs * math.ceil(sum(elements) / inputs)
    assert cost.elements(ranks) == stored_elements
    # Of eight bits, as many elements as a parameter has bytes are one; a scale for each row of U and V is one, too.
    assert cost.parameters(ranks) == (math.ceil(stored_elements / int8) + 2 * sum(ranks) if int8 else stored_elements)
    assert cost.indices(ranks) == (sum(ranks) if gauge_fixed else 0)
    for rank, stored in zip(ranks, elements, strict=True):
        own = (rank * out + stored) / (int8 or 1) + (2 * rank if int8 else 0) + cost.indices([rank])
        assert cost.of(rank) == pytest.approx(own)
        assert cost.rank_at(cost.of(rank) / (out * inputs)) == pytest.approx(rank, abs=1e-5)
    assert cost.rank_at(10.0) == cost.longest
    purse = Purse(10**6)
    bought = [purse.buy("delta", cost, 0, rank // 2) and purse.buy("delta", cost, rank // 2, rank) for rank in ranks]
    assert all(bought)
    assert 10**6 - purse.left == cost.parameters(ranks) + cost.indices(ranks)
    empty = Purse(cost.parameters(ranks) + cost.indices(ranks) - 1)
    assert not all(empty.buy("delta", cost, 0, rank) for rank in ranks) or not any(ranks)


def test_what_a_full_rank_leaves_goes_to_the_other_deltas():
    """Of 100 x 10 every rank is bought for 275 + 20 parameters, of 40 x 40 for 800 + 80."""
    flat, square = FactorCost(100, 10, False, 4), FactorCost(40, 40, False, 4)
    assert equal_share([flat, square], 520) == pytest.approx(520 / 2600)
    share = equal_share([flat, square], 900)
    assert flat.rank_at(share) == 10
    assert square.of(10) / 10 * square.rank_at(share) == pytest.approx(900 - 295)
    assert equal_share([flat, square], 5000) == 1.0
    assert equal_share([FactorCost(40, 40, False)] * 3, 1200) == pytest.approx(1200 / 4800)


def test_what_fills_up_the_last_row_leaves_no_expert_without_its_share():
    """A budget of rank 48 for every expert, to the parameter, but for what fills up each V's last row."""
    config = paper_config(0.4, base_sparsity=0.0, gauge_fixed=True)
    sizes = {"num_layers": 1, "num_experts": 3, "hidden": 200, "inter": 200}
    bare = small(**sizes, other=0)
    cost = FactorCost(200, 200, True)
    assert cost.elements([48] * 3) + cost.indices([48] * 3) > 3 * cost.of(48)
    stored = without_deltas(bare.layers[0], config, 2).parameters("stored") + 9 * cost.of(48)
    ratio = 1 - (stored + 0.5) / bare.total_parameters
    ranks = plan_compression(bare, replace(config, ratio=ratio)).layers[0].ranks
    every = [rank for each in ranks.values() for rank in each]
    assert 40 <= min(every) <= max(every) == 48


def test_gauge_fixed_factors_buy_higher_ranks():
    model = small()
    plans = {fixed: plan_compression(model, paper_config(0.4, gauge_fixed=fixed)) for fixed in (False, True)}
    for name, whole in plans[False].layers[0].ranks.items():
        assert sum(plans[True].layers[0].ranks[name]) > sum(whole)
        assert min(plans[True].layers[0].ranks[name]) >= max(whole)
    fixed = plans[True]
    indices = 4 * sum(layer.index_elements for layer in fixed.layers)
    pivots = sum(sum(ranks) for layer in fixed.layers for ranks in layer.ranks.values())
    whole_indices = 4 * sum(layer.index_elements for layer in plans[False].layers)
    assert indices - whole_indices == 4 * pivots
    assert fixed.layers[0].stored_tensors - plans[False].layers[0].stored_tensors == 3  # gate's, up's and down's pivots


@pytest.mark.parametrize("gauge_fixed", [False, True])
def test_factors_of_eight_bits_buy_higher_ranks_for_the_same_bytes(gauge_fixed):
    model = small()
    options = {"gauge_fixed": gauge_fixed}
    plain, int8 = (plan_compression(model, paper_config(0.5, factor_dtype=d, **options)) for d in ("model", "int8"))
    for name, ranks in plain.layers[0].ranks.items():
        assert min(int8.layers[0].ranks[name]) > 1.5 * max(ranks)
    assert int8.bytes_after == pytest.approx(plain.bytes_after, rel=0.006)
    assert int8.layers[0].stored_tensors - plain.layers[0].stored_tensors == 2 * 3  # a scale for each of six factors
    elements = sum(layer.delta_elements for layer in int8.layers)
    scales = sum(2 * sum(row) for layer in int8.layers for row in layer.ranks.values())
    assert sum(layer.delta_parameters for layer in int8.layers) == pytest.approx(elements / 2 + scales, abs=9)
    # Arithmetic is by elements, what is read by bytes.
    assert int8.active_parameters_after > 1.2 * plain.active_parameters_after
    assert int8.bytes_per_token_after == pytest.approx(plain.bytes_per_token_after, rel=0.01)


@pytest.mark.parametrize("longest", [30, 200])
def test_greedy_buying_joins_steps_whose_price_falls(longest):
    """All ranks of one delta save alike: gauge-fixed, the last ones cost least, so that all are bought or none."""
    model = small(num_layers=1, num_experts=4, hidden=longest, inter=longest, other=longest)
    config = paper_config(
        0.5, decomposition="two_sided", ranks="global", base_sparsity=0.5, joint_gate_up=True, gauge_fixed=True
    )
    plan = plan_compression(model, config)
    savings = [{name: [np.ones(longest)] * 4 for name in plan.layers[0].ranks}]
    ranks = choose_global_ranks(plan, savings).layers[0].ranks
    every = ranks["gate_up"] + ranks["down"]
    # What is left over buys single steps.
    assert every.count(longest) >= 2


def test_concave_points_skip_what_saves_less_than_the_line_past_it():
    assert concave_points([0, 1, 2, 3], [0, 3, 5, 6]) == [0, 1, 2, 3]
    assert concave_points([0, 1, 2, 3], [0, 1, 4, 5]) == [0, 2, 3]
    assert concave_points([0, 1, 2, 4], [0, 1, 2, 3]) == [0, 1, 2, 3]
    assert concave_points([0, 1, 2, 4], [0, 1, 2, 5]) == [0, 3]


def test_ranks_follow_the_kernels_step_and_differ_by_one():
    plan = plan_compression(mixtral_8x7b(), paper_config(0.6))
    ranks = [r for layer in plan.layers for row in layer.ranks.values() for r in row]
    assert all(r % 16 == 0 for r in ranks)
    assert max(ranks) - min(ranks) == 16
    low = plan_compression(small(), paper_config(0.6))
    assert {r % 8 for layer in low.layers for row in layer.ranks.values() for r in row} == {0}


def test_the_most_routed_experts_get_the_steps_left_over():
    tokens = [[1, 9, 2, 8, 3, 7, 4, 6]] * 3
    plan = plan_compression(small(), paper_config(0.4), tokens)
    for layer in plan.layers:
        for ranks in layer.ranks.values():
            by_tokens = [ranks[e] for e in (1, 3, 5, 7, 6, 4, 2, 0)]
            assert by_tokens == sorted(by_tokens, reverse=True)


def test_an_unreachable_ratio_names_the_reachable_range():
    with pytest.raises(ValueError, match=r"ratio must lie between 0 and 0\.\d{4} for this model .* got 0\.95\.$"):
        plan_compression(small(), paper_config(0.95))
    edge = plan_compression(small(), paper_config(0.5)).model
    with pytest.raises(ValueError, match="ratio") as caught:
        plan_compression(edge, paper_config(0.99))
    reachable = float(str(caught.value).split()[6])
    plan_compression(edge, paper_config(reachable - 1e-3))
    with pytest.raises(ValueError, match="ratio must lie between"):
        plan_compression(edge, paper_config(reachable + 1e-3))


def test_more_bases_than_experts_are_refused():
    with pytest.raises(ValueError, match=r"num_bases must be at most the number of experts of layers\.0 \(8\), got 9"):
        plan_compression(small(), paper_config(0.4, num_bases=9))


def test_paper_counting_leaves_more_for_the_deltas():
    stored, paper = (plan_compression(small(), paper_config(0.4, base_sparsity=0.6, count=c)) for c in ("stored", "paper"))
    assert paper.delta_share > stored.delta_share
    assert paper.stored_parameters > stored.stored_parameters


def test_columns_are_pruned_half_for_good_and_half_per_batch():
    assert kept_columns(4096, 0.1) == (4096 - 204, 4096 - 408)
    assert kept_columns(100, 0.0) == (100, 100)


def test_the_plan_as_a_dictionary_is_json_and_agrees_with_itself():
    plan = plan_compression(small(), paper_config(0.6, preset="throughput"))
    record = json.loads(json.dumps(plan.to_dict()))
    assert record["compressed_parameters"] == record["stored_parameters"]
    assert record["ratio"] == pytest.approx(0.6, abs=0.003)
    assert record["bytes_after"] < 0.45 * record["bytes_before"]
    assert record["flops_per_token_after"] < record["flops_per_token_before"]
    assert [layer["down_kept"] for layer in record["layers"]] == [288 - 86] * 3


def test_active_parameters_by_hand():
    plan = plan_compression(small(num_layers=1), paper_config(0.4, base_sparsity=0.0))
    (layer,) = plan.layers
    base = 3 * 192 * 288
    assert layer.active_parameters == pytest.approx(base + 2 * layer.delta_parameters / 8)
    assert plan.active_parameters_before == 500_000 + 2 * base


def test_global_ranks_go_where_they_save_most_and_spend_the_budget():
    plan = plan_compression(small(num_layers=2), paper_config(0.5, decomposition="two_sided", ranks="global"))
    savings = [
        {
            name: [np.geomspace(1, 1e-3, 192) * (100 if (index, e) == (1, 3) else e != 0) for e in range(8)]
            for name in layer.ranks
        }
        for index, layer in enumerate(plan.layers)
    ]
    chosen = choose_global_ranks(plan, savings)
    ranks = [layer.ranks for layer in chosen.layers]
    assert all(row[0] == 0 for name, row in ranks[0].items())
    assert all(row[3] == max(row) for row in ranks[1].values())
    target = 0.5 * plan.model.total_parameters
    assert 0.995 * target <= chosen.compressed_parameters <= target
