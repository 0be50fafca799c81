"""Ideas on top of the default: what they store, and that each keeps what its formula promises."""

from __future__ import annotations

import copy
import math

import baseline_cases
import numpy as np
import pytest
import torch

from benchmarks.quality.beyond import BEYOND
from benchmarks.quality.beyond.clusters import clustered_method, co_activation_distances, rebased, whitened_distances
from benchmarks.quality.beyond.gauge import GAUGE_FIXED, GaugeFixedLayer, fix_gauge
from benchmarks.quality.beyond.pipeline import Compressor, compress_stored, diagonal, stored_method
from benchmarks.quality.beyond.quantised import INT8_ALL, Int8Layer, quantised
from benchmarks.quality.beyond.refit import RefittedLayer
from benchmarks.quality.beyond.sequential import sequential_method
from benchmarks.quality.beyond.storage import BFLOAT16, Storage, choose_ranks
from benchmarks.quality.beyond.stored_layer import StoredLayer, refitted
from benchmarks.quality.beyond.weighted import WeightedGrams, _GradientPass, weighted_method, weighted_stats
from benchmarks.quality.methods import all_methods, stored_bytes
from benchmarks.quality.package_methods import package_method
from benchmarks.study import Calibration, byte_budget, capture_inputs, stored
from d2moe_ext import global_ranks
from d2moe_ext.adapters import find_experts
from d2moe_ext.calibration import calibrate
from d2moe_ext.config import CompressionConfig
from d2moe_ext.experts import D2MoEExperts

RATIO = 0.5
FIXED = {"base_sparsity": 0.2, "alternations": 1}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(size, seed):
    rows = random(3 * size, size, seed=seed)
    return rows.T @ rows


@pytest.fixture(scope="module")
def case():
    model, _ = baseline_cases.prepared("mixtral")
    ids = torch.randint(3, 64, (4, 64), generator=torch.Generator().manual_seed(0))
    batches = list(ids.split(2))
    stats = calibrate(model, batches, merge="fisher", left_gram="full")
    return model, Calibration(batches, stats, capture_inputs(model, batches, find_experts(model)))


def compressed(model):
    return [module for module in model.modules() if isinstance(module, D2MoEExperts)]


def error(delta, u, v, metric):
    left_out = delta - u @ v
    return ((left_out @ metric) * left_out).sum().item()


# bytes


def recounted(model, experts_bytes):
    others = sum(p.numel() for p in model.parameters()) - sum(p.numel() for e in compressed(model) for p in e.parameters())
    indices = sum(t.numel() for e in compressed(model) for t in e.state_dict().values() if t.dtype == torch.int32)
    return 2 * others + 4 * indices + sum(experts_bytes(experts) for experts in compressed(model))


def ranks_of(experts):
    return [(n, int(r)) for n in experts.spec.deltas for r in getattr(experts, f"{n}_delta_rank")]


def gauge_bytes(experts):
    bases = 2 * (experts.gate_up_base.numel() + experts.down_base.numel())
    sizes = [(sum(experts.spec.shape_of(n)), r) for n, r in ranks_of(experts)]
    return bases + sum(2 * r * (total - r) + 4 * r for total, r in sizes)


def int8_bytes(experts):
    tensors = [experts.gate_up_base[0], experts.down_base[0]]
    tensors += [getattr(experts, f"{n}_delta_{part}") for n in experts.spec.deltas for part in "uv"]
    return sum(t.numel() + 2 * len(t) for t in tensors)


@pytest.mark.parametrize(
    ("storage", "layer_class", "experts_bytes"),
    [
        (BFLOAT16, StoredLayer, lambda experts: 2 * sum(p.numel() for p in experts.parameters())),
        (GAUGE_FIXED, GaugeFixedLayer, gauge_bytes),
        (INT8_ALL, Int8Layer, int8_bytes),
    ],
)
def test_the_bytes_are_those_of_the_tensors_and_nearly_the_budget(case, storage, layer_class, experts_bytes):
    model = copy.deepcopy(case[0])
    budget = byte_budget(model, RATIO)
    count = compress_stored(model, diagonal(case[1].stats), RATIO, storage, layer_class, **FIXED)
    assert count == recounted(model, experts_bytes)
    assert 0.97 * budget < count <= budget


@pytest.mark.parametrize(
    "method",
    [
        package_method(sequential=True, **FIXED),
        sequential_method(layer_class=RefittedLayer, **FIXED),
        weighted_method("gradient", **FIXED),
        clustered_method("co-activation", **FIXED),
        package_method(joint_gate_up=False, **FIXED),
    ],
    ids=["sequential", "refitted", "weighted", "clustered", "separate"],
)
def test_a_method_stays_within_the_budget(case, method):
    model = copy.deepcopy(case[0])
    count = method(model, case[1], RATIO)
    assert count == stored_bytes(model) <= byte_budget(case[0], RATIO)


def test_every_idea_has_a_name_of_its_own():
    assert len(set(map(id, BEYOND.values()))) == len(BEYOND) > 20
    assert BEYOND.items() <= all_methods().items()


def test_the_sparsity_left_open_is_chosen(case):
    model = copy.deepcopy(case[0])
    count = stored_method(GAUGE_FIXED, GaugeFixedLayer, alternations=1)(model, case[1], RATIO)
    assert count <= byte_budget(case[0], RATIO)


def test_without_a_change_the_pipeline_is_the_packages(case, monkeypatch):
    # On a model this small the package would go on to finer steps of rank, which the pipeline does not have.
    monkeypatch.setattr(global_ranks, "LANDING_SHARE", 1.0)
    ours, packages = copy.deepcopy(case[0]), copy.deepcopy(case[0])
    compress_stored(ours, diagonal(case[1].stats), RATIO, **FIXED)
    package_method(gauge_fixed=False, **FIXED)(packages, case[1], RATIO)
    for mine, theirs in zip(compressed(ours), compressed(packages), strict=True):
        assert ranks_of(mine) == ranks_of(theirs)
        torch.testing.assert_close(mine.gate_up_base, theirs.gate_up_base)


def test_ranks_save_what_the_best_choice_saves(case):
    """Two deltas with a price that falls with the rank, against all choices."""
    model, calibration = case
    config = CompressionConfig(RATIO, base_sparsity=0.2)
    plan = Compressor(model, diagonal(calibration.stats), config).layers[0].plan
    storage = Storage(BFLOAT16.base, lambda rank, out, inputs: rank * (200 - rank))
    rng = np.random.default_rng(0)
    savings = {
        name: [np.sort(rng.random(min(shape)))[::-1] for _ in range(8)]
        for name, shape in plan.shapes.delta_shapes(True).items()
    }
    for name in savings:  # all but two deltas save nothing
        savings[name][1:] = [np.zeros_like(values) for values in savings[name][1:]]
    budget = storage.factors(24, 0, 0) + storage.factors(16, 0, 0)
    ranks = choose_ranks([plan], [savings], budget, storage)[0].ranks

    def saved(first, second):
        return savings["gate_up"][0][:first].sum() + savings["down"][0][:second].sum()

    steps = range(0, 33, 8)
    price = lambda rank: storage.factors(rank, 0, 0)  # noqa: E731
    best = max(saved(a, b) for a in steps for b in [*steps, 40, 48] if price(a) + price(b) <= budget)
    assert sum(price(r) for each in ranks.values() for r in each) <= budget
    assert saved(ranks["gate_up"][0], ranks["down"][0]) >= 0.9 * best


# gauge, eight bits, refit


def test_the_gauge_leaves_the_product_and_makes_an_identity():
    u, v = random(12, 5), random(5, 20, seed=1)
    fixed_u, fixed_v, pivots = fix_gauge(u, v)
    torch.testing.assert_close(fixed_u @ fixed_v, u @ v)
    assert torch.equal(fixed_v[:, pivots], torch.eye(5, dtype=torch.float64))


def test_pivots_are_exchanged_until_the_bound_holds():
    v = random(12, 60, seed=2)
    first = float(fix_gauge(random(3, 12), v)[1].abs().max())
    bound = 1 + (first - 1) / 2
    u, fixed, _ = fix_gauge(random(3, 12), v, largest=bound)
    assert float(fixed.abs().max()) <= bound < first
    torch.testing.assert_close(u @ fixed, random(3, 12) @ v)


def test_a_bound_below_one_is_refused():
    with pytest.raises(RuntimeError, match="must come down to 0.5"):
        fix_gauge(random(3, 4), random(4, 10), largest=0.5)


def test_eight_bits_are_off_by_half_a_scale():
    rows = random(50, 33) * torch.logspace(-4, 3, 50, dtype=torch.float64)[:, None]
    rows[7] = 0
    read = quantised(rows)
    largest = rows.abs().amax(1, keepdim=True)
    assert bool(((read - rows).abs() <= largest / 127 * (1 + 2**-7) / 2 * 1.001).all())
    scale = read.abs().amax(1) / 127  # its largest entry may lie one step lower
    assert all(len(torch.unique(row)) <= 255 for row in read)
    assert bool((scale <= largest.flatten() / 127 * (1 + 2**-6)).all())


def test_a_refit_is_the_least_squares_solution_and_never_worse():
    delta, v, metric = random(9, 14), random(4, 14, seed=1), gram(14, seed=2)
    root = torch.linalg.cholesky(metric)
    plain = torch.linalg.lstsq((v @ root).T, (delta @ root).T).solution.T
    u = refitted(delta, v, metric)
    torch.testing.assert_close(u, plain)
    assert error(delta, u, v, metric) <= error(delta, u + 1e-3 * random(9, 4, seed=3), v, metric)


@torch.no_grad()
@pytest.mark.parametrize("layer_class", [RefittedLayer, GaugeFixedLayer])
def test_refitting_a_layer_lowers_its_error(case, layer_class):
    stats = diagonal(case[1].stats)
    config = CompressionConfig(RATIO, **FIXED)
    layer = Compressor(case[0], stats, config, layer_class=layer_class).layers[0]
    layer.round_bases()
    u, v = layer.decompose("down", [3], 8)[:2]
    _, rounded_v = layer.stored_factors("down", 3, u[0], v[0])
    delta, metric = layer._delta("down", 3).detach().double(), layer.metric("down", 3)
    best = refitted(delta, rounded_v, metric)
    assert torch.equal(rounded_v, stored(rounded_v).double())
    others = stored(u[0] @ torch.linalg.lstsq(rounded_v.T, v[0].T).solution.T).double()
    assert error(delta, best, rounded_v, metric) <= error(delta, others, rounded_v, metric)


# clusters and weights


def test_the_whitened_distance_is_its_formula(case):
    view = find_experts(case[0])[0]
    layer = case[1].stats.layers[view.name]
    expected = np.zeros((8, 8))
    for weight, grams in ((view.gate_up_weight, layer.gram_gate_up), (view.down_weight, layer.gram_down)):
        one = np.zeros((8, 8))
        for i in range(8):
            for j in range(8):
                mean = (grams[i] / layer.gram_tokens(i) + grams[j] / layer.gram_tokens(j)) / 2
                root = torch.linalg.cholesky(mean + 1e-12 * torch.eye(len(mean), dtype=torch.float64))
                one[i, j] = float(((weight(i) - weight(j)).detach().double() @ root).norm()) ** 2
        expected += one * 56 / one.sum()
    np.testing.assert_allclose(whitened_distances(view, layer).numpy(), expected, rtol=1e-6, atol=1e-9)


def test_experts_that_fire_together_are_near():
    index = torch.tensor([[0, 1], [0, 1], [0, 2], [3, 4]])
    distances = co_activation_distances(index, 6)
    assert float(distances[0, 1]) == pytest.approx(1 - 2 / math.sqrt(3 * 2))
    assert float(distances[3, 4]) == pytest.approx(0)
    assert float(distances[0, 3]) == float(distances[5, 0]) == 1


def test_new_bases_are_given_their_own_energies(case):
    model, calibration = case
    views = find_experts(model)
    labels = {view.name: torch.arange(8, dtype=torch.int32) % 2 for view in views}
    layer = rebased(model, calibration.batches, calibration.stats, labels, 2).layers[views[0].name]
    inputs = calibration.inputs[views[0].name]
    expected = torch.zeros(2, baseline_cases.INTER, dtype=torch.float64)
    for base in range(2):
        total = torch.zeros(len(inputs.hidden_states), baseline_cases.INTER)
        for expert in range(base, 8, 2):
            gate, up = (inputs.hidden_states @ views[0].gate_up_weight(expert).detach().T).chunk(2, dim=1)
            weight = ((inputs.top_k_index == expert) * inputs.top_k_weights).sum(1, keepdim=True)
            total += weight * torch.nn.functional.silu(gate) * up
        expected[base] = total.double().square().sum(0)
    torch.testing.assert_close(layer.down_energy, expected, rtol=1e-4, atol=1e-6)


def test_router_weighted_grams_are_their_formula(case):
    model, calibration = case
    view = find_experts(model)[0]
    plain = calibration.stats.layers[view.name]
    layer = weighted_stats(model, calibration.batches, calibration.stats, "router").layers[view.name]
    inputs, expert = calibration.inputs[view.name], int(plain.tokens.argmax())
    weight = ((inputs.top_k_index == expert) * inputs.top_k_weights).sum(1).double().square()
    x = inputs.hidden_states.double()
    expected = (x * weight[:, None]).T @ x * float(plain.tokens[expert]) / weight.sum()
    torch.testing.assert_close(layer.gram_gate_up[expert], expected, rtol=1e-4, atol=1e-5)


def test_weighted_grams_are_scaled_back_to_the_number_of_tokens(case):
    layer = next(iter(case[1].stats.layers.values()))
    grams, expert = WeightedGrams(layer), int(layer.tokens.argmax())
    x, weight = random(7, baseline_cases.HIDDEN), random(7, seed=1).square()
    grams.add("gate_up", expert, x[:3], weight[:3])
    grams.add("gate_up", expert, x[3:], weight[3:])
    taken = grams.taken(layer)
    expected = torch.einsum("t,ti,tj->ij", weight, x, x) / weight.sum() * float(layer.tokens[expert])
    torch.testing.assert_close(taken.gram_gate_up[expert], expected)
    assert torch.equal(taken.gram_down, layer.gram_down)  # no weight came


def test_gradient_weights_sum_to_the_trace_of_the_left_gram(case):
    """``Σ ‖δ‖² = tr Σ δδᵀ``."""
    model, calibration = case
    view = find_experts(model)[0]
    layer = calibration.stats.layers[view.name]
    grams = WeightedGrams(layer)
    with view.intercept(_GradientPass(view, layer, grams)), torch.enable_grad():
        for row in torch.cat(calibration.batches):
            logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
            torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").backward()
    for name, mass in grams.mass.items():
        traces = layer.left_gram[name].diagonal(dim1=1, dim2=2).sum(1)
        torch.testing.assert_close(mass, traces, rtol=1e-4, atol=1e-9)
