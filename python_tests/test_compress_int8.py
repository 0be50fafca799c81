"""Compression to factors of eight bits: what is stored of them, how near it is, and what it is counted as."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from paper_config import paper_config
from test_calibration import HIDDEN, tiny_mixtral, token_ids
from test_compress import compressor_of, copy_of, routed_input

from d2moe_ext.calibration import calibrate
from d2moe_ext.compress import compress_experts
from d2moe_ext.experts import D2MoEExperts
from d2moe_ext.reference.whitened_svd import ridged_gram


@pytest.fixture(scope="module")
def calibrated():
    model = tiny_mixtral(num_layers=2)
    return model, calibrate(model, [token_ids(8, 32)], merge="fisher", left_gram="full")


def whole_factors(experts, name, expert):
    """U and V of a delta as they are read, ``[out, r]`` and ``[r, in]`` float64, with V's identity written out."""
    rank, u, v = (int(getattr(experts, f"{name}_delta_{part}")[expert]) for part in ("rank", "u_start", "v_start"))
    u_rows, v_rows, u_scale, v_scale = (
        getattr(experts, f"{name}_delta_{part}").double() for part in ("u", "v", "u_scale", "v_scale")
    )
    factor_u = (u_scale[u : u + rank, None] * u_rows[u : u + rank]).T
    if not experts.spec.gauge_fixed:
        return factor_u, v_scale[v : v + rank, None] * v_rows[v : v + rank]
    pivots = getattr(experts, f"{name}_delta_pivots")[u : u + rank].tolist()
    inputs = v_rows.shape[1]
    others = [column for column in range(inputs) if column not in pivots]
    factor_v = torch.zeros(rank, inputs, dtype=torch.float64)
    factor_v[:, others] = v_scale[u : u + rank, None] * v_rows.flatten()[v : v + rank * len(others)].view(rank, len(others))
    factor_v[range(rank), pivots] = 1.0
    return factor_u, factor_v


@pytest.mark.parametrize("gauge_fixed", [False, True])
@pytest.mark.parametrize("decomposition", ["whitened", "two_sided", "activation_aware", "plain"])
def test_u_of_eight_bits_is_the_best_for_the_v_that_is_stored(calibrated, decomposition, gauge_fixed):
    model, stats = calibrated
    factors = {"factor_dtype": "int8", "gauge_fixed": gauge_fixed, "joint_gate_up": True}
    config = paper_config(0.3, base_sparsity=0.0, decomposition=decomposition, **factors)
    compressor = compressor_of(model, stats, config=config)
    ranks = [5, 0, HIDDEN, 1]
    compressor.plan = replace(compressor.plan, ranks={"gate_up": ranks, "down": ranks})
    experts, _ = compressor.run()
    experts.check_indices()
    for name in ("gate_up", "down"):
        assert getattr(experts, f"{name}_delta_u").dtype == getattr(experts, f"{name}_delta_v").dtype == torch.int8
        for expert in (0, 2, 3):
            u, v = whole_factors(experts, name, expert)
            delta = compressor._delta(name, expert).detach().double()
            gram = None if decomposition == "plain" else compressor._gram(name, expert)
            root = torch.linalg.cholesky(ridged_gram(gram, v.shape[1], 1e-6, delta))
            best = torch.linalg.lstsq((v @ root).T, (delta @ root).T).solution.T
            # Nearest to it: half a scale, which is rounded up by 1 / 128 at most, and what the two solvers differ by.
            half = best.abs().amax(0) / 127 * (1 + 2**-7) / 2
            assert bool(((u - best).abs() <= half + 1e-6 * best.abs().max()).all()), (name, expert)


@pytest.mark.parametrize("gauge_fixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eight_bits_change_little_at_equal_ranks(calibrated, gauge_fixed, dtype):
    model, _ = calibrated
    twin = copy_of(model).to(dtype)
    stats = calibrate(twin, [token_ids(8, 32)], merge="fisher")
    outputs = {}
    for factor_dtype in ("model", "int8"):
        config = paper_config(0.3, base_sparsity=0.0, gauge_fixed=gauge_fixed, factor_dtype=factor_dtype)
        experts, _ = compressor_of(twin, stats, rank=HIDDEN - 2, config=config).run()
        x, index, weights = routed_input()
        call = (x.to(dtype), index, weights.to(dtype))
        with torch.no_grad():
            outputs[factor_dtype] = experts(*call).float()
            experts.backend = "native"
            native = experts(*call).float()
        assert float((native - outputs[factor_dtype]).norm()) <= 8 * torch.finfo(dtype).eps * float(native.norm())
    difference = float((outputs["int8"] - outputs["model"]).norm() / outputs["model"].norm())
    assert 0 < difference < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gauge_fixed", [False, True])
def test_factors_of_eight_bits_are_paid_by_their_bytes(calibrated, dtype, gauge_fixed):
    model, _ = calibrated
    twin = copy_of(model).to(dtype)
    stats = calibrate(twin, [token_ids(8, 32)], merge="frequency", left_gram="diagonal")
    options = {"decomposition": "two_sided", "ranks": "global", "merge": "frequency", "fold": True, "joint_gate_up": True}
    reports, before = {}, sum(p.numel() for p in twin.parameters())
    for factor_dtype in ("int8", "model"):
        model_now = copy_of(model).to(dtype)
        config = paper_config(0.5, base_sparsity=0.5, gauge_fixed=gauge_fixed, factor_dtype=factor_dtype, **options)
        reports[factor_dtype] = compress_experts(model_now, stats, config)
        held = {4: 0, dtype.itemsize: 0, 1: 0}
        buffers = (
            b for m in model_now.modules() if isinstance(m, D2MoEExperts) for k, b in m.named_buffers() if "norms" not in k
        )
        for tensor in (*model_now.parameters(), *buffers):
            held[tensor.dtype.itemsize] += tensor.numel()
        indices = sum(layer.index_elements for layer in reports[factor_dtype].plan.layers)
        stored = sum(size * count for size, count in held.items()) - indices * (4 - dtype.itemsize)
        # A projection's last parameter may be filled in part.
        assert 0 <= reports[factor_dtype].plan.stored_parameters * dtype.itemsize - stored < 4 * dtype.itemsize
        assert 0.985 * 0.5 * before <= reports[factor_dtype].plan.stored_parameters <= 0.5 * before
    ranks = {
        key: [r for layer in report.plan.layers for row in layer.ranks.values() for r in row] for key, report in reports.items()
    }
    assert sum(ranks["int8"]) > 1.4 * sum(ranks["model"])


def test_the_bytes_of_a_parameter_can_be_those_of_another_dtype(calibrated):
    """A float32 model that will be stored in bfloat16: two elements of eight bits are a parameter, not four."""
    model, stats = calibrated
    config = paper_config(0.3, factor_dtype="int8")
    own = compress_experts(copy_of(model), stats, config)
    other = compress_experts(copy_of(model), stats, config, element_size=2)
    assert [plan.layers[0].int8_per_parameter for plan in (own.plan, other.plan)] == [4, 2]
    assert sum(own.plan.layers[0].ranks["down"]) > sum(other.plan.layers[0].ranks["down"])
