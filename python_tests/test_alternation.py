"""Alternating bases and deltas: the base's step against a direct solve, and the error that may only fall."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from test_adapters import DuckExperts, _block
from test_calibration import tiny_mixtral, token_ids

from d2moe_ext import alternation
from d2moe_ext.adapters import find_experts
from d2moe_ext.alternation import ExpertTarget, base_error, refit_base
from d2moe_ext.budget import SPARSITIES_TRIED, LayerShapes, plan_compression, without_deltas
from d2moe_ext.calibration import LayerStats, calibrate
from d2moe_ext.compress import SPARSITY_TOLERANCE, _ModelCompressor, compress_experts
from d2moe_ext.config import CompressionConfig
from d2moe_ext.layer_compression import LayerCompressor
from d2moe_ext.shapes import model_shapes

OUT, IN = 7, 9
COLUMNS = torch.tensor([0, 2, 3, 5, 8])


def spd(size, generator):
    root = torch.randn(size, 2 * size, generator=generator, dtype=torch.float64)
    return root @ root.T / size


def random_experts(full, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    experts = []
    for scale in (1.0, 0.01, 30.0)[:count]:
        left = scale * spd(OUT, generator)
        target = torch.randn(OUT, IN, generator=generator, dtype=torch.float64)
        experts.append(ExpertTarget(target, spd(IN, generator), left if full else left.diagonal()))
    return experts


def direct_base(experts):
    """``Σ_e B[e] W G[e][P,P] = Σ_e B[e] (T[e] G[e])[:,P]``, written out with Kronecker products."""
    lefts = [e.left.diag() if e.left.dim() == 1 else e.left for e in experts]
    system = sum(torch.kron(left, e.gram[COLUMNS][:, COLUMNS]) for left, e in zip(lefts, experts, strict=True))
    right = sum((left @ e.target @ e.gram)[:, COLUMNS].flatten() for left, e in zip(lefts, experts, strict=True))
    base = torch.zeros(OUT, IN, dtype=torch.float64)
    base[:, COLUMNS] = torch.linalg.solve(system, right).view(OUT, len(COLUMNS))
    return base


def random_base(seed=9):
    base = torch.zeros(OUT, IN, dtype=torch.float64)
    base[:, COLUMNS] = torch.randn(OUT, len(COLUMNS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return base


def test_the_error_is_its_formula():
    (expert,) = random_experts(full=True, count=1)
    base = random_base()
    root_b, root_g = torch.linalg.cholesky(expert.left), torch.linalg.cholesky(expert.gram)
    expected = float((root_b.T @ (expert.target - base) @ root_g).square().sum())
    assert base_error(base, [expert]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("full", [False, True])
def test_enough_steps_reach_the_direct_solution(monkeypatch, full):
    monkeypatch.setattr(alternation, "CONJUGATE_GRADIENT_STEPS", 200)
    experts = random_experts(full)
    solved = refit_base(random_base(), experts, COLUMNS)
    expected = direct_base(experts)
    assert float((solved - expected).norm()) <= 1e-7 * float(expected.norm())


def test_with_equal_left_grams_one_step_is_enough(monkeypatch):
    """Then the preconditioner is the system itself."""
    monkeypatch.setattr(alternation, "CONJUGATE_GRADIENT_STEPS", 1)
    experts = [
        ExpertTarget(expert.target, expert.gram, torch.full((OUT,), 2.0, dtype=torch.float64))
        for expert in random_experts(full=False)
    ]
    expected = direct_base(experts)
    assert float((refit_base(random_base(), experts, COLUMNS) - expected).norm()) <= 1e-10 * float(expected.norm())


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_a_refit_lowers_the_error_and_touches_kept_columns_only(full, seed):
    experts, base = random_experts(full, seed=seed), random_base(seed + 100)
    refitted = refit_base(base, experts, COLUMNS)
    pruned = [column for column in range(IN) if column not in COLUMNS.tolist()]
    assert torch.equal(refitted[:, pruned], base[:, pruned])
    assert base_error(refitted, experts) < 0.9 * base_error(base, experts)


def test_rows_and_layers_without_a_gradient_stay():
    experts = random_experts(full=False)
    for expert in experts:
        expert.left[3] = 0
    base = random_base()
    refitted = refit_base(base, experts, COLUMNS)
    assert torch.equal(refitted[3], base[3])
    assert bool(refitted.isfinite().all())
    nothing = [ExpertTarget(e.target, e.gram, torch.zeros(OUT, dtype=torch.float64)) for e in experts]
    assert torch.equal(refit_base(base, nothing, COLUMNS), base)


def test_a_solved_base_stays():
    experts = random_experts(full=True)
    solved = direct_base(experts)
    assert float((refit_base(solved, experts, COLUMNS) - solved).norm()) <= 1e-9 * float(solved.norm())


@pytest.fixture(scope="module", params=["diagonal", "full"])
def calibrated(request):
    model = tiny_mixtral(num_layers=2)
    return model, calibrate(model, [token_ids(8, 32)], left_gram=request.param)


OPTIONS = [
    {},
    {"joint_gate_up": False},
    {"decomposition": "whitened"},
    {"decomposition": "activation_aware"},
    {"decomposition": "plain"},
    {"base_sparsity": 0.0},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_every_truncation_and_every_refit_lowers_the_same_error(calibrated, options):
    """The refit leaves what it says, and the deltas truncated anew leave no more, by their singular values alone."""
    model, stats = calibrated
    config = CompressionConfig(0.3, **({"base_sparsity": 0.3, "alternations": 4} | options))
    views = find_experts(model)
    tokens = [stats.layers[view.name].tokens.tolist() for view in views]
    compressor = _ModelCompressor(views, stats, plan_compression(model_shapes(model), config, tokens), lambda *step: None)
    left_out = [compressor.choose_ranks("")]
    for _ in range(4):
        left_out.append(compressor.alternate(""))
        left_out.append(_tail(compressor))
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(left_out))
    assert left_out[-1] < 0.97 * left_out[0]


def _tail(compressor):
    """``Σ_{i>r} σ_i²`` at the ranks as they are."""
    return sum(
        float(values[rank:].sum())
        for layer in compressor.layers
        for name, ranks in layer.plan.ranks.items()
        for values, rank in zip(layer.savings(name), ranks, strict=True)
    )


def test_the_report_tells_the_errors(calibrated):
    model, stats = calibrated
    twin = tiny_mixtral(num_layers=2)
    twin.load_state_dict(model.state_dict())
    errors = compress_experts(twin, stats, CompressionConfig(0.3, base_sparsity=0.2, alternations=3)).alternation_errors
    assert len(errors) == 3
    assert errors[0] > errors[1] > errors[2] > 0


@pytest.mark.parametrize("ratio", [0.2, 0.4])
def test_the_base_sparsity_is_the_smallest_among_the_best_predicted(calibrated, ratio):
    """At 0.2 two are nearly as good as each other; at 0.4 the sparsest is best by far."""
    model, stats = calibrated
    views, shapes = find_experts(model), model_shapes(model)
    tokens = [stats.layers[view.name].tokens.tolist() for view in views]
    predicted = {}
    for sparsity in SPARSITIES_TRIED:
        config = CompressionConfig(ratio, base_sparsity=sparsity)
        compressor = _ModelCompressor(views, stats, plan_compression(shapes, config, tokens), lambda *step: None)
        compressor.choose_ranks("")
        compressor.alternate("")
        predicted[sparsity] = compressor.choose_ranks("")
    best = min(predicted.values()) * (1 + SPARSITY_TOLERANCE)
    twin = tiny_mixtral(num_layers=2)
    twin.load_state_dict(model.state_dict())
    chosen = compress_experts(twin, stats, CompressionConfig(ratio)).plan.config.base_sparsity
    assert chosen == min(sparsity for sparsity, error in predicted.items() if error <= best)
    assert len({round(error, 9) for error in predicted.values()}) == len(predicted)


def random_stats(view):
    """Statistics as calibration would take them of any inputs, diagonal left Grams."""
    generator = torch.Generator().manual_seed(3)
    layout = view.layout
    experts, hidden, inter = layout.num_experts, layout.hidden_size, layout.intermediate_size
    return LayerStats(
        expert_to_base=torch.zeros(experts, dtype=torch.int32),
        tokens=torch.full((experts,), 40),
        gate_mass=torch.ones(experts, dtype=torch.float64),
        gram_gate_up=torch.stack([spd(hidden, generator) for _ in range(experts)]),
        gram_down=torch.stack([spd(inter, generator) for _ in range(experts)]),
        down_energy=torch.rand(1, inter, generator=generator, dtype=torch.float64),
        pooled_sample=torch.randn(4, hidden, generator=generator),
        left_gram={
            "gate_up": torch.rand(experts, layout.gate_up_rows, generator=generator, dtype=torch.float64),
            "down": torch.rand(experts, hidden, generator=generator, dtype=torch.float64),
        },
    )


def test_experts_without_a_gate_alternate():
    """Their one delta of gate_up covers all rows, not the second half that up has beside a gate."""
    (view,) = find_experts(_block(DuckExperts()))
    layout = view.layout
    shapes = LayerShapes("experts", layout.num_experts, layout.hidden_size, layout.intermediate_size, 2, gated=False)
    config = CompressionConfig(0.3, base_sparsity=0.3)
    plan = replace(without_deltas(shapes, config, 4), ranks={"up": [2] * 4, "down": [2] * 4})
    layer = LayerCompressor(view, random_stats(view), config, plan)
    with torch.no_grad():
        errors = [layer.alternate() for _ in range(4)]
        experts, _ = layer.run()
    assert errors[-1] < errors[0]
    assert experts.up_delta_u.shape == (8, layout.intermediate_size)
