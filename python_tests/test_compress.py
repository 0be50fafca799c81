"""The compressor: what it merges, keeps, whitens and stores, and what it refuses."""

import importlib
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from paper_config import paper_config
from test_calibration import EXPERTS, HIDDEN, INTER, tiny_mixtral, token_ids

import d2moe_ext
from d2moe_ext.adapters import find_experts
from d2moe_ext.budget import plan_compression
from d2moe_ext.calibration import calibrate
from d2moe_ext.compress import compress_experts
from d2moe_ext.experts import D2MoEExperts
from d2moe_ext.layer_compression import LayerCompressor, shrunk_down_gram, shrunk_gate_up_gram
from d2moe_ext.merge import merge_experts, prune_columns
from d2moe_ext.shapes import model_shapes


@pytest.fixture(scope="module")
def calibrated():
    model = tiny_mixtral(num_layers=2)
    return model, calibrate(model, [token_ids(8, 32)], merge="fisher", left_gram="full")


def copy_of(model):
    twin = tiny_mixtral(num_layers=2)
    twin.load_state_dict(model.state_dict())
    return twin


def compressor_of(model, stats, *, rank=None, config=None, **plan_options):
    """The first layer's compressor, with ranks and columns set by hand."""
    config = config or paper_config(0.3, base_sparsity=0.0)
    plan = plan_compression(model_shapes(model), config).layers[0]
    if rank is not None:
        plan = replace(plan, ranks={name: [rank] * EXPERTS for name in plan.ranks})
    view = find_experts(model)[0]
    return LayerCompressor(view, stats.layers[view.name], config, replace(plan, **plan_options))


def routed_input(num_tokens=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, HIDDEN, generator=generator)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(num_tokens)])
    return x, index, torch.rand(num_tokens, 2, generator=generator)


@pytest.mark.parametrize("decomposition", ["whitened", "two_sided", "activation_aware", "plain"])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("gauge_fixed", [False, True])
def test_full_rank_gives_the_layer_back(calibrated, decomposition, joint, pruned, gauge_fixed):
    """Folding puts even the pruned columns back; the dynamic half is off."""
    model, stats = calibrated
    config = paper_config(0.3, base_sparsity=0.0, decomposition=decomposition, joint_gate_up=joint, gauge_fixed=gauge_fixed)
    columns = {"gate_up_kept": 11, "gate_up_keep": 11, "down_kept": 17, "down_keep": 17} if pruned else {}
    experts, reports = compressor_of(model, stats, rank=HIDDEN, config=config, **columns).run()
    call = routed_input()
    with torch.no_grad():
        expected, actual = find_experts(model)[0].module(*call), experts(*call)
    assert float((actual - expected).abs().max()) <= 2e-4 * float(expected.abs().max())
    assert all(error < 1e-6 for report in reports.values() for error in report.relative_error)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("ranks", [[8] * EXPERTS, [3, 0, HIDDEN, *range(1, EXPERTS - 2)]], ids=["even", "ragged"])
def test_gauge_fixing_changes_what_is_stored_and_not_what_is_computed(calibrated, ranks, backend):
    model, stats = calibrated
    forwards, floats = {}, {}
    for gauge_fixed in (False, True):
        config = paper_config(0.3, base_sparsity=0.0, joint_gate_up=True, gauge_fixed=gauge_fixed)
        compressor = compressor_of(model, stats, config=config)
        compressor.plan = replace(compressor.plan, ranks=dict.fromkeys(compressor.plan.ranks, ranks))
        experts, _ = compressor.run()
        experts.check_indices()
        experts.backend = backend
        with torch.no_grad():
            forwards[gauge_fixed] = experts(*routed_input())
        floats[gauge_fixed] = {
            name: getattr(experts, f"{name}_delta_u").numel() + getattr(experts, f"{name}_delta_v").numel()
            for name in ("gate_up", "down")
        }
        assert sum(floats[gauge_fixed].values()) == compressor.plan.delta_parameters
    torch.testing.assert_close(forwards[True], forwards[False], rtol=1e-4, atol=1e-5 * float(forwards[False].abs().max()))
    for name, width in (("gate_up", HIDDEN), ("down", experts.spec.layout.intermediate_size)):
        saved = floats[False][name] - floats[True][name]
        squares = sum(rank**2 for rank in ranks)
        assert squares - width < saved <= squares  # what fills the last row up


def test_the_error_falls_as_ranks_rise(calibrated):
    model, stats = calibrated
    errors = []
    for rank in range(0, HIDDEN + 1, 4):
        _, reports = compressor_of(model, stats, rank=rank).run()
        errors.append([error for name in ("gate", "up", "down") for error in reports[name].relative_error])
    assert errors[0] == pytest.approx([1.0] * len(errors[0]))
    for lower, higher in pairwise(errors):
        assert all(b < a for a, b in zip(lower, higher, strict=True))


def output_error(view, experts, name, stats):
    """``Σ_e tr((W − Ŵ) G[e] (W − Ŵ)ᵀ)`` of the down projection, the error on the calibration tokens."""
    total = 0.0
    for expert in range(EXPERTS):
        rank, start = int(experts.down_delta_rank[expert]), int(experts.down_delta_u_start[expert])
        u, v = (part[start : start + rank].double() for part in (experts.down_delta_u, experts.down_delta_v))
        approximation = experts.down_base[0].double() + u.T @ v
        difference = view.down_weight(expert).double() - approximation
        total += float((difference @ stats.gram_down[expert] * difference).sum().detach())
    return total


def test_whitening_misses_least_on_the_calibration_tokens(calibrated):
    model, stats = calibrated
    view = find_experts(model)[0]
    errors = {}
    for decomposition in ("whitened", "activation_aware", "plain"):
        config = paper_config(0.3, base_sparsity=0.0, decomposition=decomposition)
        experts, _ = compressor_of(model, stats, rank=4, config=config).run()
        errors[decomposition] = output_error(view, experts, "down", stats.layers[view.name])
    assert errors["whitened"] < errors["activation_aware"] < errors["plain"]


def test_folding_repairs_part_of_what_pruning_removed(calibrated):
    model, stats = calibrated
    call = routed_input(200)
    with torch.no_grad():
        expected = find_experts(model)[0].module(*call)
        columns = {"gate_up_kept": 12, "gate_up_keep": 12, "down_kept": 18, "down_keep": 18}
        error = {}
        for fold in (True, False):
            for rank in (8, HIDDEN):
                config = paper_config(0.3, base_sparsity=0.0, fold=fold)
                experts, _ = compressor_of(model, stats, rank=rank, config=config, **columns).run()
                error[fold, rank] = float((experts(*call) - expected).norm() / expected.norm())
    assert error[True, 8] < error[False, 8]
    # At full rank folding puts all of it back, and the paper's order none of it.
    assert error[True, HIDDEN] < 1e-3 < 0.1 < error[False, HIDDEN]


@pytest.mark.parametrize("merge", ["fisher", "frequency", "mean"])
def test_merges_are_weighted_means(calibrated, merge):
    model, stats = calibrated
    view = find_experts(model)[0]
    layer = stats.layers[view.name]
    weights = torch.stack([view.down_weight(e).detach() for e in range(EXPERTS)])
    merged = merge_experts(lambda e: view.down_weight(e).detach(), "down", layer, merge)
    if merge == "fisher":
        expected = layer.fisher_weighted["down"] / layer.fisher_sum["down"]
    else:
        share = layer.tokens.float() if merge == "frequency" else torch.ones(EXPERTS)
        expected = (weights * share[:, None, None]).sum(0, keepdim=True) / share.sum()
    torch.testing.assert_close(merged, expected)


def test_where_nothing_was_reached_the_merge_is_the_plain_mean(calibrated):
    model, stats = calibrated
    view = find_experts(model)[0]
    layer = stats.layers[view.name]
    unreached = replace(
        layer,
        tokens=torch.zeros_like(layer.tokens),
        fisher_sum={k: v.index_fill(2, torch.tensor([3]), 0) for k, v in layer.fisher_sum.items()},
        fisher_weighted={k: v.index_fill(2, torch.tensor([3]), 0) for k, v in layer.fisher_weighted.items()},
    )
    mean = merge_experts(view.gate_up_weight, "gate_up", unreached, "mean")
    torch.testing.assert_close(merge_experts(view.gate_up_weight, "gate_up", unreached, "frequency"), mean)
    fisher = merge_experts(view.gate_up_weight, "gate_up", unreached, "fisher")
    torch.testing.assert_close(fisher[..., 3], mean[..., 3])
    assert not torch.allclose(fisher[..., 4], mean[..., 4])


def test_columns_are_kept_by_equation_9():
    full = torch.randn(2, 5, 9)
    energy = torch.rand(2, 9, dtype=torch.float64)
    pruned = prune_columns(full, energy, 4)
    for base in range(2):
        metric = full[base].norm(dim=0) * energy[base].sqrt()
        assert sorted(metric.topk(4).indices.tolist()) == pruned.columns[base].tolist()
        assert torch.equal(pruned.stored[base], full[base][:, pruned.columns[base].long()])
        masked = pruned.masked(base)
        assert int((masked != 0).any(0).sum()) == 4
        assert torch.equal(masked[:, pruned.columns[base].long()], pruned.stored[base])


def test_the_column_metric_is_a_product_of_norms_not_of_a_norm_and_an_energy():
    """Column 0: 3·√1 = 3 against column 1: 1·√4 = 2; with the energy itself column 1 would win."""
    pruned = prune_columns(torch.tensor([[[3.0, 1.0]]]), torch.tensor([[1.0, 4.0]], dtype=torch.float64), 1)
    assert pruned.columns.tolist() == [[0]]


def test_deltas_are_whitened_with_the_shrunk_grams(calibrated):
    """The pooled Gram is per token: over all experts' inputs, divided by all their tokens."""
    model, stats = calibrated
    compressor = compressor_of(model, stats)
    layer = compressor.stats
    pooled = sum(layer.gram_gate_up[e] for e in range(EXPERTS)) / int(layer.tokens.sum())
    expected = (layer.gram_gate_up[1] + 32 * pooled) / (int(layer.tokens[1]) + 32)
    torch.testing.assert_close(compressor._gram("gate", 1), expected)
    torch.testing.assert_close(compressor._gram("down", 1), shrunk_down_gram(layer, 1))


def test_shrinkage_is_the_designs(calibrated):
    _, stats = calibrated
    layer = next(iter(stats.layers.values()))
    pooled = layer.gram_gate_up.sum(0) / layer.tokens.sum()
    n = int(layer.tokens[1])
    torch.testing.assert_close(shrunk_gate_up_gram(layer, pooled, 1), (layer.gram_gate_up[1] + 32 * pooled) / (n + 32))
    down = layer.gram_down[1]
    own = torch.eye(INTER, dtype=torch.float64) * down.diagonal().mean() / n
    torch.testing.assert_close(shrunk_down_gram(layer, 1), (down + 32 * own) / (n + 32))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"preset": "throughput"},
        {"joint_gate_up": True},
        {"fold": False},
        {"decomposition": "two_sided"},
        {"decomposition": "two_sided", "ranks": "global"},
        {"merge": "mean", "decomposition": "plain"},
    ],
)
def test_the_model_holds_what_the_plan_says(calibrated, options):
    model, stats = calibrated
    twin = copy_of(model)
    config = paper_config(0.3, **options)
    report = compress_experts(twin, stats, config)
    held = sum(p.numel() for p in twin.parameters()) + sum(
        b.numel() for m in twin.modules() if isinstance(m, D2MoEExperts) for k, b in m.named_buffers() if "norms" not in k
    )
    assert held == report.plan.stored_parameters == report.to_dict()["plan"]["stored_parameters"]
    assert 0.98 * 0.7 <= held / sum(p.numel() for p in model.parameters()) <= 0.7
    ids = token_ids(2, 16, seed=9)
    with torch.no_grad():
        logits = twin(input_ids=ids).logits
    assert bool(logits.isfinite().all())
    if options.get("ranks") == "global":
        ranks = [r for layer in report.plan.layers for row in layer.ranks.values() for r in row]
        assert len(set(ranks)) > 1


def test_several_bases():
    model = tiny_mixtral(num_layers=1)
    stats = calibrate(model, [token_ids(8, 32)], merge="fisher", num_bases=2)
    report = compress_experts(model, stats, paper_config(0.15, num_bases=2, base_sparsity=0.2))
    experts = find_module(model)
    assert experts.gate_up_base.shape[0] == experts.down_columns.shape[0] == 2
    assert sorted(set(experts.gate_up_expert_to_base.tolist())) == [0, 1]
    assert report.raised_ridges == []
    with torch.no_grad():
        assert bool(model(input_ids=token_ids(1, 16)).logits.isfinite().all())


def find_module(model):
    return next(module for module in model.modules() if isinstance(module, D2MoEExperts))


def test_an_expert_never_routed_gets_finite_factors(calibrated):
    model, stats = calibrated
    name = find_experts(model)[0].name
    layer = stats.layers[name]
    silent = replace(
        layer,
        tokens=layer.tokens.index_fill(0, torch.tensor([2]), 0),
        gram_gate_up=layer.gram_gate_up.index_fill(0, torch.tensor([2]), 0),
        left_gram={k: v.index_fill(0, torch.tensor([2]), 0) for k, v in layer.left_gram.items()},
    )
    patched = replace(stats, layers={**stats.layers, name: silent})
    for options in ({}, {"decomposition": "two_sided", "ranks": "global"}, {"decomposition": "activation_aware"}):
        twin = copy_of(model)
        report = compress_experts(twin, patched, paper_config(0.3, **options))
        assert all(bool(p.isfinite().all()) for p in twin.parameters())
        if options.get("ranks") == "global":
            assert all(row[2] == 0 for row in report.plan.layers[0].ranks.values())


def test_a_singular_gram_still_compresses(calibrated):
    model, stats = calibrated
    name = find_experts(model)[0].name
    x = torch.randn(2, HIDDEN, dtype=torch.float64)
    singular = replace(stats.layers[name], gram_gate_up=(x.T @ x).expand(EXPERTS, -1, -1).contiguous())
    twin = copy_of(model)
    compress_experts(twin, replace(stats, layers={**stats.layers, name: singular}), paper_config(0.3))
    assert all(bool(p.isfinite().all()) for p in twin.parameters())


def test_weights_that_are_not_finite_are_named_and_nothing_is_replaced(calibrated):
    model, stats = calibrated
    twin = copy_of(model)
    twin.model.layers[1].mlp.experts.down_proj.data[3, 0, 0] = math.inf
    with pytest.raises(
        ValueError, match=r"weights must be finite, got NaN or infinity in down of expert 3 of model\.layers\.1"
    ):
        compress_experts(twin, stats, paper_config(0.3))
    assert not any(isinstance(m, D2MoEExperts) for m in twin.modules())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            paper_config(0.3, merge="fisher_frequency"),
            "taken for merge='fisher_frequency', got those for 'fisher'",
        ),
        (paper_config(0.3, num_bases=2), "taken for num_bases=2, got statistics for 1"),
        (paper_config(0.97), "ratio must lie between 0 and"),
    ],
)
def test_statistics_for_other_options_are_refused(calibrated, config, message):
    model, stats = calibrated
    with pytest.raises(ValueError, match=message):
        compress_experts(copy_of(model), stats, config)


def test_statistics_of_another_model_or_without_left_grams_are_refused(calibrated):
    model, stats = calibrated
    with pytest.raises(ValueError, match=r"stats must hold every MoE layer of the model, got none of model\.layers\.2"):
        compress_experts(tiny_mixtral(num_layers=3), stats, paper_config(0.3))
    with pytest.raises(ValueError, match="needs stats taken with left_gram, got left_gram=None"):
        compress_experts(copy_of(model), replace(stats, left_gram=None), paper_config(0.3, decomposition="two_sided"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_compress(calibrated, dtype):
    model, _ = calibrated
    twin = copy_of(model).to(dtype)
    stats = calibrate(twin, [token_ids(8, 32)], merge="fisher")
    compress_experts(twin, stats, paper_config(0.3))
    assert find_module(twin).down_base.dtype == dtype
    with torch.no_grad():
        assert bool(twin(input_ids=token_ids(1, 16)).logits.isfinite().all())


def test_the_public_compress_refuses_compressed_and_patched_models(calibrated):
    model, stats = calibrated
    twin = copy_of(model)
    d2moe_ext.patch_model(twin)
    with pytest.raises(ValueError, match="the model must not be patched, got a patched one"):
        d2moe_ext.compress(twin, stats, paper_config(0.3))
    d2moe_ext.unpatch_model(twin)
    d2moe_ext.compress(twin, stats, paper_config(0.3))
    with pytest.raises(ValueError, match="the model must be neither compressed nor quantized, got one with d2moe"):
        d2moe_ext.compress(twin, stats, paper_config(0.3))


def test_a_failure_to_factor_names_the_operator(calibrated):
    """A Gram that no ridge mends: the operator's own sentence, before the layer is replaced."""
    model, stats = calibrated
    name = find_experts(model)[0].name
    layer = stats.layers[name]
    indefinite = torch.eye(HIDDEN, dtype=torch.float64) - 3 * torch.full((HIDDEN, HIDDEN), 1 / HIDDEN, dtype=torch.float64)
    broken = replace(layer, gram_gate_up=1e3 * indefinite.expand(EXPERTS, -1, -1).contiguous())
    twin = copy_of(model)
    with pytest.raises(RuntimeError, match="whitened_svd: gram must be positive semi-definite"):
        compress_experts(twin, replace(stats, layers={**stats.layers, name: broken}), paper_config(0.3))
    assert not any(isinstance(m, D2MoEExperts) for m in twin.modules())


def test_the_least_sparse_base_within_a_tenth_of_the_least_error_is_taken(calibrated, monkeypatch):
    model, stats = calibrated
    module = importlib.import_module("d2moe_ext.compress")
    errors = {0.0: 1.2, 0.2: 1.09, 0.4: 1.05, 0.6: 1.0, 0.9: 1.02}

    class Predicted(module._ModelCompressor):
        def choose_ranks(self, stage):
            return errors[self.plan.config.base_sparsity]

    monkeypatch.setattr(module, "_ModelCompressor", Predicted)
    shapes, tokens = model_shapes(model), [layer.tokens.tolist() for layer in stats.layers.values()]
    config = paper_config(0.3, alternations=0, base_sparsity=None)
    arguments = (find_experts(model), stats, replace(config, base_sparsity=None), shapes, tokens, lambda *progress: None)
    assert module._choose_base_sparsity(*arguments) == 0.2
    errors[0.2] = 1.11
    assert module._choose_base_sparsity(*arguments) == 0.4
