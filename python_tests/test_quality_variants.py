"""The paper's pipeline with exchangeable parts: as the package's where nothing is exchanged, and each part as its formula."""

from __future__ import annotations

import copy
import math

import baseline_cases
import numpy as np
import pytest
import tiny_models
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from benchmarks.quality.checks import ORDERS
from benchmarks.quality.methods import all_methods, paper_method
from benchmarks.quality.parts import PARTS
from benchmarks.quality.retired import RETIRED
from benchmarks.quality.variants import PAPER_VARIANTS, Pipeline
from benchmarks.quality.variants.bases import regmean_merge, semi_dynamic, ties_merge, truncated_svd
from benchmarks.quality.variants.deltas import ColumnPruning, LowRank, SharedFactors, _fit_left
from benchmarks.quality.variants.layer import Base, Layer, StudyExperts
from benchmarks.quality.variants.pipeline import Study
from benchmarks.quality.variants.shares import by_sensitivity, layer_rises, shares_of, trim
from benchmarks.quality.variants.spending import Item, spend
from benchmarks.study import Calibration, byte_budget, capture_inputs, stored
from d2moe_ext.adapters import find_experts
from d2moe_ext.calibration import calibrate
from d2moe_ext.evaluate import perplexity, prunes_dynamically
from d2moe_ext.spec import GROUPS


def study(ratio: float = 0.5, **parts) -> Study:
    model, calibration = baseline_cases.prepared("mixtral")
    return Study(model, calibration, ratio, Pipeline(**parts))


@pytest.fixture(scope="module")
def layer() -> Layer:
    return study().layers[0]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# the pipeline


@pytest.mark.parametrize(
    ("family", "ratio", "changes"),
    [
        ("mixtral", 0.3, {}),
        ("mixtral", 0.3, {"base_sparsity": 0.4}),
        ("mixtral", 0.3, {"dynamic_pruning": False}),
        ("gpt_oss", 0.2, {}),
        ("list_moe", 0.2, {}),
        ("deepseek_v3", 0.05, {}),
    ],
)
def test_with_the_papers_parts_it_is_the_package(family, ratio, changes):
    model = tiny_models.tiny_model(family)
    batches = [tiny_models.token_ids(0, 4, 16)]
    stats = calibrate(model, batches, merge="fisher")
    calibration = Calibration(batches, stats, capture_inputs(model, batches, find_experts(model)))
    expected = copy.deepcopy(model)
    size = paper_method(**changes)(expected, calibration, ratio)
    base = semi_dynamic(changes.get("base_sparsity", 0.1), changes.get("dynamic_pruning", True))
    assert Pipeline(base=base)(model, calibration, ratio) == size
    assert prunes_dynamically(model) == prunes_dynamically(expected)
    for seed in (1, 2):
        ids = tiny_models.token_ids(seed)
        tiny_models.assert_close(tiny_models.logits(model, ids), tiny_models.logits(expected, ids))


@pytest.mark.parametrize("fold", [False, True])
def test_folded_deltas_repair_what_pruning_took(fold):
    """At full rank the deltas and what they were taken from are the experts."""
    lab = study(base=semi_dynamic(0.5), fold=fold)
    layer, bases = lab.layers[0], lab.bases[0]
    experts = lab.experts(0, {name: [min(shape)] * 8 for name, shape in layer.shapes.items()})
    down = torch.einsum("ro,eri->eoi", experts.down_delta_u, experts.down_delta_v.view(8, 32, 48))
    for expert in layer.experts:
        weight = layer.weight("down", expert)
        taken_from = bases["down"].masked if fold else bases["down"].full
        torch.testing.assert_close(taken_from + down[expert], weight, rtol=0, atol=0.02 * float(weight.abs().max()))
    lost = (bases["down"].full - bases["down"].masked).abs().max()
    assert lost > 0.1


def test_study_experts_are_a_base_on_its_best_columns_and_dense_deltas(layer):
    view, hidden, inter = layer.view, baseline_cases.HIDDEN, baseline_cases.INTER
    kept = {"gate_up": 29, "down": 40}
    shapes = {"gate_up": (2 * inter, hidden), "down": (hidden, inter)}
    bases, deltas = {}, {}
    for place, (group, (out, inputs)) in enumerate(shapes.items()):
        columns = torch.randperm(inputs, generator=torch.Generator().manual_seed(place))[: kept[group]].sort().values
        full = random(out, inputs, seed=place).float()
        bases[group] = Base(full, stored(full[:, columns]), columns.int(), kept[group] - 7, 0)
        deltas[group] = random(baseline_cases.EXPERTS, out, inputs, seed=9 + place).float()
    x = random(11, hidden, seed=5).float()
    index = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(t))[:2] for t in range(11)])
    weights = random(11, 2, seed=6).float().abs()

    def through_base(group: str, x: Tensor) -> Tensor:
        weight, columns = bases[group].kept, bases[group].columns.long()
        scores = weight.norm(dim=0) * x[:, columns].norm(dim=0)
        best = scores.topk(bases[group].keep).indices
        return x[:, columns[best]] @ weight[:, best].T

    shared, gated_sum, expected = through_base("gate_up", x), torch.zeros(11, inter), torch.zeros(11, hidden)
    for token in range(11):
        for slot in range(2):
            expert = int(index[token, slot])
            gate, up = (shared[token] + deltas["gate_up"][expert] @ x[token]).chunk(2)
            h = weights[token, slot] * silu(gate) * up
            gated_sum[token] += h
            expected[token] += deltas["down"][expert] @ h
    expected += through_base("down", gated_sum)
    experts = StudyExperts(view, bases, deltas)
    with torch.no_grad():
        tiny_models.assert_close(experts(x, index, weights), expected)
    assert experts.prunes_dynamically


@pytest.mark.parametrize("name", PAPER_VARIANTS)
def test_every_method_spends_the_budget_and_changes_something(name):
    model, calibration = baseline_cases.prepared("mixtral")
    reference = copy.deepcopy(model)
    budget = byte_budget(model, 0.45)
    size = PAPER_VARIANTS[name](model, calibration, 0.45)
    assert 0.99 * budget <= size <= budget  # a step of a tiny shared factor is worth 0.6 % of these models
    paper_method()(reference, calibration, 0.45)
    ids = tiny_models.token_ids(4)
    mine, papers = tiny_models.logits(model, ids), tiny_models.logits(reference, ids)
    assert bool(mine.isfinite().all())
    assert not torch.allclose(mine, papers, atol=1e-4)
    made = {id(p) for m in model.modules() if isinstance(m, StudyExperts) for p in m.parameters()}
    assert all(torch.equal(p, stored(p)) for p in model.parameters() if id(p) not in made)


@pytest.mark.parametrize("name", ["merge: TIES", "split: s = 0.2"])
def test_a_ratio_out_of_reach_is_one_sentence(name):
    model, calibration = baseline_cases.prepared("mixtral")
    with pytest.raises(ValueError, match=r"^ratio must .*got 0.9\d*[ ,.]"):
        PAPER_VARIANTS[name](model, calibration, 0.9)


def test_tables_and_claims_name_methods_that_are_there():
    methods = all_methods()
    lines = {line.method for part in PARTS.values() for line in part.lines}
    assert set(PAPER_VARIANTS) <= lines <= set(methods) | set(RETIRED)
    assert {method for order in ORDERS for method in order.methods} <= set(methods)


# merges


def test_ties_trims_elects_and_averages_those_that_agree():
    weights = random(5, 4, 6, seed=1)
    mean = weights.mean(0)
    expected = mean.clone()
    vectors = weights - mean
    kept = [sorted(vectors[e].abs().flatten().tolist(), reverse=True)[: int(0.5 * 24)][-1] for e in range(5)]
    for i in range(4):
        for j in range(6):
            entries = [float(vectors[e, i, j]) for e in range(5) if abs(vectors[e, i, j]) >= kept[e]]
            sign = math.copysign(1, sum(entries)) if entries else 0
            agree = [entry for entry in entries if entry * sign > 0]
            expected[i, j] += 0.7 * sum(agree) / len(agree) if agree else 0
    torch.testing.assert_close(ties_merge(weights, 0.5, 0.7), expected)


@pytest.mark.parametrize("off_diagonal", [1.0, 0.9])
def test_regmean_is_the_least_squares_base(off_diagonal):
    weights, x = random(3, 5, 7, seed=2), random(3, 30, 7, seed=3)
    x[:, :, 4] = 0  # a channel that no token reached
    grams = x.transpose(1, 2) @ x
    # 0.9 G + 0.1 diag(G) is the Gram of these rows.
    diagonal = torch.diag_embed(grams.diagonal(dim1=1, dim2=2).sqrt())
    rows = torch.cat([math.sqrt(off_diagonal) * x, math.sqrt(1 - off_diagonal) * diagonal], dim=1)
    targets = torch.cat([r @ w.T for r, w in zip(rows, weights, strict=True)])
    seen = [0, 1, 2, 3, 5, 6]
    solution = torch.linalg.lstsq(torch.cat(list(rows))[:, seen], targets).solution.T
    unseen = random(5, 7, seed=4)
    merged = regmean_merge(weights, grams, off_diagonal, unseen)
    torch.testing.assert_close(merged[:, seen], solution)
    torch.testing.assert_close(merged[:, 4], unseen[:, 4])


def test_regmean_leaves_experts_without_tokens_out():
    layer = study().layers[0]
    unused = [expert for expert in layer.experts if not int(layer.stats.tokens[expert])]
    assert unused  # two tokens do not reach eight experts
    before = Pipeline(merge=PAPER_VARIANTS["merge: RegMean"].merge).merge(layer, "down")
    with torch.no_grad():
        layer.view.module.down_proj[unused[0]] += 1
    seen_channels = (layer.stats.gram_down[layer.stats.tokens > 0].diagonal(dim1=1, dim2=2) > 0).any(0)
    after = PAPER_VARIANTS["merge: RegMean"].merge(layer, "down")
    assert torch.equal(before[:, seen_channels], after[:, seen_channels])


# bases


def test_the_base_sees_gated_sums(layer):
    """The diagonal of the Gram of what the base sees is calibration's energy, as all its tokens were captured."""
    for group in GROUPS:
        energy = layer.base_gram(group).diagonal() * (int(layer.stats.tokens.sum()) if group == "gate_up" else 1)
        torch.testing.assert_close(energy, layer.energy(group)[0], rtol=1e-4, atol=1e-6)


def test_a_truncated_base_is_no_larger_and_the_nearest_in_its_norm(layer):
    merged = random(baseline_cases.HIDDEN, baseline_cases.INTER, seed=7).float()
    pruned, low_rank = semi_dynamic(0.5)(layer, "down", merged), truncated_svd(0.5)(layer, "down", merged)
    rank = int(torch.linalg.matrix_rank(low_rank.kept.double(), rtol=1e-5))
    assert low_rank.floats == rank * (32 + 48) <= pruned.floats < (rank + 1) * (32 + 48)
    gram = layer.base_gram("down")
    gram = gram + 1e-6 * gram.diagonal().diag()
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.clamp_min(0).sqrt()
    u, sigma, vt = torch.linalg.svd(merged.double())
    plain = u[:, :rank] * sigma[:rank] @ vt[:rank]
    least = torch.linalg.svdvals(merged.double() @ root)[rank:].norm()
    error = ((merged - low_rank.kept).double() @ root).norm()
    assert least <= error * (1 + 1e-9)
    assert error <= 1.02 * least + 0.01 * float((merged.double() @ root).norm())  # bfloat16 factors
    assert error < ((merged.double() - plain) @ root).norm()


def test_columns_pruned_per_batch_are_stored(layer):
    merged = random(baseline_cases.HIDDEN, baseline_cases.INTER, seed=8).float()
    dynamic, static = semi_dynamic(0.5)(layer, "down", merged), semi_dynamic(0.5, dynamic=False)(layer, "down", merged)
    assert (dynamic.kept.shape[1], dynamic.keep, static.kept.shape[1], static.keep) == (36, 24, 24, 24)
    assert (dynamic.floats, dynamic.indices, static.floats, static.indices) == (36 * 32, 36, 24 * 32, 24)
    scores = merged.double().norm(dim=0) * layer.energy("down")[0].sqrt()
    assert set(static.columns.tolist()) == set(scores.topk(24).indices.tolist())
    torch.testing.assert_close(dynamic.masked[:, dynamic.columns.long()], stored(merged[:, dynamic.columns.long()]))
    assert int((dynamic.masked != 0).any(0).sum()) == 36


# deltas


def test_pruned_deltas_keep_the_columns_that_weigh_most(layer):
    deltas = random(8, 48, 32, seed=11)
    sizes = [0, 1, 5, 9, 16, 31, 32, 7]
    kept = ColumnPruning().compress(layer, "gate", deltas, sizes)
    for expert, size in enumerate(sizes):
        scores = deltas[expert].norm(dim=0) * layer.gram("gate", expert).diagonal().sqrt()
        best = set(np.argsort(-scores.numpy())[:size].tolist())
        assert set((kept[expert] != 0).any(0).nonzero().flatten().tolist()) == best
        columns = sorted(best)
        assert torch.equal(kept[expert][:, columns], stored(deltas[expert][:, columns].float()))
    # 48 floats of two bytes and an index of four
    assert {2 * item.cost(3) for item in ColumnPruning().items(layer, "gate")} == {3 * (48 * 2 + 4)}


@pytest.mark.parametrize(("shared_v", "merged_u"), [(True, False), (False, True), (True, True)])
def test_shared_factors_recover_deltas_that_have_them(layer, shared_v, merged_u):
    rank, method = 6, SharedFactors(shared_v, merged_u)
    own_u, own_v, u, v = random(8, 48, rank), random(8, rank, 32, seed=1), random(48, rank, seed=2), random(rank, 32, seed=3)
    if shared_v and merged_u:
        deltas, parameters = u @ random(8, rank, rank, seed=4) @ v, u.numel() + v.numel() + 8 * rank**2
    elif shared_v:
        deltas, parameters = own_u @ v, own_u.numel() + v.numel()
    else:
        deltas, parameters = u @ own_v, u.numel() + own_v.numel()
    (item,) = method.items(layer, "gate")
    assert item.cost(rank) == parameters
    found = method.compress(layer, "gate", deltas, [rank])
    assert float((found - deltas).norm() / deltas.norm()) < 0.02  # rounded factors
    less = method.compress(layer, "gate", deltas, [rank - 1])
    assert float((less - deltas).norm() / deltas.norm()) > 0.05
    assert not method.compress(layer, "gate", deltas, [0]).any()
    full = method.compress(layer, "gate", random(8, 48, 32, seed=5), [item.most])
    if not merged_u:
        assert float((full - random(8, 48, 32, seed=5)).norm()) < 0.02 * full.norm()
    with pytest.raises(ValueError, match="must be True, got False for both"):
        SharedFactors(False, False)


def test_shared_v_fits_each_u_to_its_experts_inputs():
    delta, v, x = random(5, 9), random(3, 9, seed=1), random(40, 9, seed=2)
    gram = x.T @ x
    u = _fit_left(delta, v, torch.linalg.cholesky(gram))
    expected = torch.linalg.lstsq(x @ v.T, x @ delta.T).solution.T
    torch.testing.assert_close(u, expected)


def test_merged_u_is_the_best_for_tokens_as_they_were_routed(layer):
    """No other U of its rank leaves less of the deltas' outputs, weighed by tokens, with the best V for each."""
    deltas = random(8, 48, 32, seed=12)
    tokens = layer.stats.tokens.double().clamp_min(1)
    grams = [layer.gram("gate", expert) for expert in layer.experts]

    def left(u: Tensor) -> float:
        rest = [delta - u @ (u.T @ delta) for delta in deltas]
        return sum(float(n * (r @ g * r).sum()) for n, r, g in zip(tokens, rest, grams, strict=True))

    best = SharedFactors._left(layer, deltas, grams, 4)
    torch.testing.assert_close(best.T @ best, torch.eye(4, dtype=torch.float64))
    for seed in range(20):
        other, _ = torch.linalg.qr(best + 0.1 * random(48, 4, seed=seed))
        assert left(best) < left(other)


# who gets how much


def test_spending_is_in_proportion_and_complete():
    items = [Item(600, 40, 10), Item(600, 40, 10, weight=2.0), Item(1200, 100, 7), Item(500, 30, 5, weight=0.0)]
    items.append(Item(800, 20, 3, quadratic=2))
    for floats in (0, 9, 100, 333, 800, 1003):
        sizes = spend(items, floats)
        cost = sum(item.cost(size) for item, size in zip(items, sizes, strict=True))
        assert cost <= floats
        assert sizes[3] == 0
        cheapest = min(i.cost(s + 1) - i.cost(s) for i, s in zip(items, sizes, strict=True) if i.weight and s < i.most)
        assert floats - cost < cheapest
    sizes = spend(items, 1003)
    assert abs(10 * sizes[1] - 2 * 10 * sizes[0]) <= 30
    assert abs(7 * sizes[2] - 2 * 10 * sizes[0]) <= 30
    assert spend(items, 10**6) == [40, 40, 100, 0, 20]
    assert items[4].cost(3) == 27
    assert [items[4].size_for(f) for f in (0, 4, 5, 13.9, 14, 26, 27, 10**6)] == [0, 0, 1, 1, 2, 2, 3, 20]
    assert spend([Item(1, 5, 1, weight=0.0)], 10) == [0]


def test_trimming_takes_the_deltas_of_the_least_used_experts():
    trimmed = study(weights=trim(3))
    untrimmed = study(weights=trim(0))
    for index, layer in enumerate(trimmed.layers):
        least = set(np.argsort(layer.stats.tokens.numpy(), kind="stable")[:3].tolist())
        mine, others = trimmed.sizes()[index], untrimmed.sizes()[index]
        for name in layer.shapes:
            assert {expert for expert in layer.experts if mine[name][expert] == 0} == least
            assert all(mine[name][expert] > others[name][expert] for expert in layer.experts if expert not in least)
        dense = trimmed.experts(index, mine)
        assert not dense.down_delta_v.view(8, 32, 48)[sorted(least)].any()
    step = sum(out + inputs for layer in trimmed.layers for out, inputs in layer.shapes.values())
    assert abs(trimmed.stored_bytes(trimmed.sizes()) - untrimmed.stored_bytes(untrimmed.sizes())) < 2 * step
    with pytest.raises(ValueError, match="trim must be less than the 8 experts of .*, got 8"):
        trim(8)(trimmed)


def test_a_layers_rise_is_that_of_the_model_with_it_compressed_alone():
    lab = study()
    before = {name: p.clone() for name, p in lab.model.named_parameters()}
    rises = layer_rises(lab)
    assert dict.fromkeys(before, True) == {n: torch.equal(p, before[n]) for n, p in lab.model.named_parameters()}
    text = torch.cat([batch.flatten() for batch in lab.calibration.batches])
    window = lab.calibration.batches[0].shape[1]
    for index, rise in enumerate(rises):
        alone, plan = copy.deepcopy(lab.model), lab.uniform_ranks()[index]
        find_experts(alone)[index].replace(lab.experts(index, plan))
        measured = [math.log(perplexity(m, text, window=window).perplexity) for m in (alone, lab.model)]
        assert math.isclose(rise, measured[0] - measured[1], abs_tol=1e-6)
    assert any(abs(rise) > 1e-3 for rise in rises)


def test_shares_minimise_rises_that_fall_as_one_over_rank():
    rises = [0.9, 0.1, 0.4]
    shares = np.array(shares_of(rises))
    chosen = 30 * shares / shares.sum()
    least = sum(a / r for a, r in zip(rises, chosen, strict=True))
    for one in np.arange(0.5, 29, 0.5):
        for two in np.arange(0.5, 29.5 - one, 0.5):
            assert least <= 0.9 / one + 0.1 / two + 0.4 / (30 - one - two) + 1e-12
    assert shares_of([-0.1, 0.0]) == [1.0, 1.0]
    assert min(shares_of([-0.1, 0.3])) == math.sqrt(0.05)


def test_sensitive_layers_get_more_rank():
    lab = study(weights=by_sensitivity)
    rises = layer_rises(lab)
    ranks = [sum(map(sum, sizes.values())) for sizes in lab.sizes()]
    assert rises[0] != rises[1]
    assert (ranks[0] > ranks[1]) == (rises[0] > rises[1])


def test_low_rank_factors_are_rounded_as_stored(layer):
    deltas = random(8, 48, 32, seed=13)
    found = LowRank().compress(layer, "gate", deltas, [4] * 8)
    for expert in layer.experts:
        root = torch.linalg.cholesky(layer.gram("gate", expert) + 1e-9 * torch.eye(32, dtype=torch.float64))
        least = torch.linalg.svdvals(deltas[expert] @ root)[4:].norm()
        error = ((found[expert] - deltas[expert]) @ root).norm()
        assert least * (1 - 1e-3) <= error <= 1.01 * least + 0.01 * (deltas[expert] @ root).norm()
        assert torch.linalg.matrix_rank(found[expert].double(), rtol=1e-5) == 4


def test_base_products_of_the_captured_tokens_are_the_models_own():
    """The captured routing of a layer reproduces its output, so Grams made from it are of what the model computes."""
    lab = study()
    layer = lab.layers[0]
    inputs = layer.inputs
    output = torch.zeros_like(inputs.hidden_states)
    for expert in layer.experts:
        gate, up = linear(inputs.hidden_states, layer.weight("gate_up", expert)).chunk(2, dim=-1)
        weight = ((inputs.top_k_index == expert) * inputs.top_k_weights).sum(1, keepdim=True)
        output += weight * linear(silu(gate) * up, layer.weight("down", expert))
    with torch.no_grad():
        own = layer.view.module(inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights)
    tiny_models.assert_close(own, output)
