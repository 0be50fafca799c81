"""Ideas on top of the default: what they store, and that each keeps what its formula promises."""

from __future__ import annotations

import copy

import baseline_cases
import numpy as np
import pytest
import torch

from benchmarks.quality.beyond import BEYOND
from benchmarks.quality.beyond.pipeline import Compressor, compress_stored, diagonal
from benchmarks.quality.beyond.quantised import INT8_FACTORS, Int8FactorsLayer, quantised
from benchmarks.quality.beyond.storage import BFLOAT16, Storage, choose_ranks
from benchmarks.quality.beyond.stored_layer import StoredLayer, refitted
from benchmarks.quality.methods import all_methods, stored_bytes
from benchmarks.quality.package_methods import package_method
from benchmarks.quality.retired import RETIRED
from benchmarks.study import Calibration, byte_budget, capture_inputs
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


def int8_bytes(experts):
    factors = [getattr(experts, f"{n}_delta_{part}") for n in experts.spec.deltas for part in "uv"]
    bases = 2 * (experts.gate_up_base.numel() + experts.down_base.numel())
    return bases + sum(factor.numel() + 2 * len(factor) for factor in factors)


@pytest.mark.parametrize(
    ("storage", "layer_class", "experts_bytes"),
    [
        (BFLOAT16, StoredLayer, lambda experts: 2 * sum(p.numel() for p in experts.parameters())),
        (INT8_FACTORS, Int8FactorsLayer, int8_bytes),
    ],
)
def test_the_bytes_are_those_of_the_tensors_and_nearly_the_budget(case, storage, layer_class, experts_bytes):
    model = copy.deepcopy(case[0])
    budget = byte_budget(model, RATIO)
    count = compress_stored(model, diagonal(case[1].stats), RATIO, storage, layer_class, **FIXED)
    assert count == recounted(model, experts_bytes)
    assert 0.97 * budget < count <= budget


@pytest.mark.parametrize("options", [{"sequential": True}, {"joint_gate_up": False}, {"num_bases": 2}])
def test_a_method_stays_within_the_budget(case, options):
    model = copy.deepcopy(case[0])
    count = package_method(**options, **FIXED)(model, case[1], RATIO)
    assert count == stored_bytes(model) <= byte_budget(case[0], RATIO)


def test_every_idea_has_a_name_of_its_own():
    assert len(set(map(id, BEYOND.values()))) == len(BEYOND) > 10
    assert BEYOND.items() <= all_methods().items()
    assert not RETIRED.keys() & all_methods().keys()


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


# eight bits


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
