"""Sequential calibration: what a layer is fitted to, that it helps behind a compressed prefix, and what it refuses."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tiny_models import EXPERTS, HIDDEN, compress_exactly, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

import d2moe_ext
from d2moe_ext.adapters import find_experts
from d2moe_ext.budget import plan_compression
from d2moe_ext.calibration import calibrate, sequences_of
from d2moe_ext.compress import compress_experts
from d2moe_ext.config import CompressionConfig
from d2moe_ext.experts import D2MoEExperts
from d2moe_ext.layer_compression import LayerCompressor
from d2moe_ext.sequential import (
    Arrivals,
    LayerFit,
    SequentialCompressor,
    carried_over,
    original_arrivals,
)
from d2moe_ext.shapes import model_shapes

RATIO = 0.3
FIXED = {"base_sparsity": 0.2, "alternations": 2}


def silent(stage, done, total):
    pass


def token_ids(batch=16, length=32, seed=0):
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module", params=["mixtral", "list_moe", "gpt_oss"])
def calibrated(request):
    """A fused module, a list of MLPs, and interleaved rows with biases."""
    model = tiny_model(request.param)
    return model, calibrate(model, [token_ids()])


@pytest.fixture(scope="module")
def mixtral():
    model = tiny_model("mixtral")
    return model, calibrate(model, [token_ids()])


def layer_of(model, stats, index=0, **options):
    config = CompressionConfig(RATIO, **(FIXED | options))
    view = find_experts(model)[index]
    return LayerCompressor(view, stats.layers[view.name], config, plan_compression(model_shapes(model), config).layers[index])


@torch.no_grad()
def fit_of(layer, original, prefix, **options):
    return LayerFit(layer, original, prefix, **options)


def arrived(model):
    return original_arrivals(model, [token_ids()], find_experts(model), silent)


def close(actual, expected, tolerance=1e-4):
    assert float((actual.double() - expected.double()).abs().max()) <= tolerance * float(expected.abs().max())


# what a layer is fitted to


def test_a_target_carried_over_is_the_regression_and_tends_to_the_weight():
    weight, x, noise = random(5, 8), random(60, 8, seed=1), random(60, 8, seed=2)
    seen = x + 0.3 * noise
    small, large = 1e-9 * torch.eye(8, dtype=torch.float64), 1e9 * torch.eye(8, dtype=torch.float64)
    target = carried_over(weight, x.T @ seen, seen.T @ seen, small)
    torch.testing.assert_close(target, torch.linalg.lstsq(seen, x @ weight.T).solution.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(carried_over(weight, x.T @ seen, seen.T @ seen, large), weight)


@torch.no_grad()
def test_behind_the_original_prefix_and_gate_and_up_a_layer_keeps_its_weights_and_grams(calibrated):
    model, stats = calibrated
    for index, view in enumerate(find_experts(model)):
        original = arrived(model)[view.name]
        fit = fit_of(layer_of(model, stats, index), original, torch.cat(original.hidden_states))
        fit.carry_gate_up()
        fit.carry_down(compress_exactly(view))
        layer = stats.layers[view.name]
        assert torch.equal(fit.stats.tokens, layer.tokens)
        close(fit.stats.gram_gate_up, layer.gram_gate_up)
        close(fit.stats.gram_down, layer.gram_down)
        for expert in range(EXPERTS):
            close(fit.target.gate_up_weight(expert), view.gate_up_weight(expert))
            close(fit.target.down_weight(expert), view.down_weight(expert))
        assert len(fit.target.carried) == 2 * EXPERTS


@torch.no_grad()
def test_a_target_makes_up_for_what_the_prefix_changes(calibrated):
    """Inputs twice as large: half the weight, and the Gram matrix of what arrives."""
    model, stats = calibrated
    view = find_experts(model)[0]
    original = arrived(model)[view.name]
    layer = layer_of(model, stats)
    fit = fit_of(layer, original, 2 * torch.cat(original.hidden_states), shrinkage=1e-6)
    fit.carry_gate_up()
    expert = int(fit.stats.tokens.argmax())
    close(fit.target.gate_up_weight(expert), view.gate_up_weight(expert) / 2, 1e-2)
    close(fit.stats.gram_gate_up, 4 * layer.stats.gram_gate_up)
    # So much shrinkage that the target is the weight itself.
    fit = fit_of(layer, original, 2 * torch.cat(original.hidden_states), shrinkage=1e9)
    fit.carry_gate_up()
    close(fit.target.gate_up_weight(expert), view.gate_up_weight(expert))


@torch.no_grad()
def test_down_is_fitted_to_what_the_compressed_gate_and_up_compute(calibrated):
    model, stats = calibrated
    view = find_experts(model)[0]
    original = arrived(model)[view.name]
    x = torch.cat(original.hidden_states)
    fit = fit_of(layer_of(model, stats), original, x, shrinkage=1e-4)
    compressed = fit.settled("gate_up")[0].run()[0]
    fit.carry_down(compressed)
    expert = int(fit.stats.tokens.argmax())
    x, bias = x[fit.tokens[expert]], view.gate_up_bias(expert)
    h = view.apply_gate(nn.functional.linear(x, view.gate_up_weight(expert), bias)).double()
    compressed_h = view.apply_gate(compressed.gate_up_rows(x, torch.full((len(x), 1), expert))).double()
    weight = view.down_weight(expert).double()
    best = torch.linalg.lstsq(compressed_h, h @ weight.T).solution.T
    close(fit.target.down_weight(expert), best, 1e-2)
    close(fit.stats.gram_down[expert], compressed_h.T @ compressed_h)
    assert float((best - weight).norm()) > 0.1 * float(weight.norm())


class Twice(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return 2 * self.experts(hidden_states, top_k_index, top_k_weights)


@torch.no_grad()
def test_at_full_rank_gate_and_up_are_their_targets(calibrated):
    """Behind a first layer that passes on something else: what is compressed are the targets, not the weights."""
    model, stats = copy.deepcopy(calibrated[0]), calibrated[1]
    views = find_experts(model)
    original = arrived(model)[views[1].name]
    sequential = SequentialCompressor(model, [token_ids()], views, silent, shrinkage=1)
    layer = layer_of(model, stats, 1)
    views[0].replace(Twice(compress_exactly(views[0])))
    layer.plan = replace(layer.plan, ranks={"gate_up": [HIDDEN] * EXPERTS, "down": [8] * EXPERTS})
    fit = fit_of(layer, original, sequential._prefix(views[1]), shrinkage=1)
    fit.carry_gate_up()
    experts = sequential.compress(layer)[0]
    for expert in range(EXPERTS):
        rows = experts.gate_up_rows(torch.eye(HIDDEN), torch.full((HIDDEN, 1), expert))
        bias = views[1].gate_up_bias(expert)
        weight = (rows if bias is None else rows - bias).T
        close(weight, fit.target.gate_up_weight(expert), 1e-3)
        assert float((weight - views[1].gate_up_weight(expert)).norm()) > 0.005 * float(weight.norm())


# what it does for a model


@torch.no_grad()
def outputs(model, ids):
    """What each MoE block and the model give, by name."""
    seen = {}
    blocks = {name.rpartition(".")[0] for name, m in model.named_modules() if name.endswith(".experts")}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: seen.__setitem__(name, out[0] if isinstance(out, tuple) else out)
        )
        for name in blocks
    ]
    seen["logits"] = model(input_ids=ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return seen


def compressed(model, stats, batches, progress=None, **options):
    twin = copy.deepcopy(model)
    report = compress_experts(twin, stats, CompressionConfig(RATIO, **(FIXED | options)), progress, batches)
    return twin, report


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decomposition": "whitened"},
        {"fold": False, "alternations": 0},
        {"ranks": "uniform", "joint_gate_up": False},
        {"base_sparsity": None, "alternations": 1},
    ],
)
def test_every_layer_is_nearer_to_the_original_on_its_compressed_prefix(calibrated, options):
    model, stats = calibrated
    seen = {
        sequential: compressed(model, stats, [token_ids()], sequential=sequential, **options) for sequential in (False, True)
    }
    # On held-out tokens the model is nearer too, by less.
    for ids, names, share in ((token_ids(), None, 0.98), (token_ids(seed=9), ["logits"], 1.0)):
        expected = outputs(model, ids)
        error = {
            sequential: {name: float((out - expected[name]).norm()) for name, out in outputs(twin, ids).items()}
            for sequential, (twin, _) in seen.items()
        }
        assert len(expected) == 3
        names = names or list(expected)
        assert all(error[True][name] < error[False][name] for name in names)
        assert sum(error[True][name] / error[False][name] for name in names) < share * len(names)
    report = seen[True][1]
    assert report.plan.config.sequential
    assert len(report.alternation_errors) == report.plan.config.alternations
    assert all(later < earlier for earlier, later in pairwise(report.alternation_errors))
    for layer in report.plan.layers:
        experts = seen[True][0].get_submodule(layer.shapes.name)
        assert {name: getattr(experts, f"{name}_delta_rank").tolist() for name in experts.spec.deltas} == layer.ranks


def test_several_bases_and_the_fisher_merge(mixtral):
    model = mixtral[0]
    stats = calibrate(model, [token_ids()], merge="fisher", num_bases=2)
    twin, _ = compressed(model, stats, [token_ids()], merge="fisher", num_bases=2, base_sparsity=0.6, sequential=True)
    assert bool(outputs(twin, token_ids())["logits"].isfinite().all())
    assert next(m for m in twin.modules() if isinstance(m, D2MoEExperts)).gate_up_base.shape[0] == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models(dtype):
    model = tiny_model("mixtral").to(dtype)
    stats = calibrate(model, [token_ids()])
    expected = outputs(model, token_ids())["logits"].float()
    errors = []
    for sequential in (False, True):
        twin, _ = compressed(model, stats, [token_ids()], sequential=sequential)
        assert {p.dtype for p in twin.parameters()} == {dtype}
        errors.append(float((outputs(twin, token_ids())["logits"].float() - expected).norm()))
    assert errors[1] < 0.99 * errors[0]
    original = arrived(model)[find_experts(model)[0].name]
    base = fit_of(layer_of(model, stats), original, torch.cat(original.hidden_states)).settled("down")[0].bases["down"].full
    assert torch.equal(base, base.to(dtype).float())  # as stored, so that the deltas repair what rounding loses


def test_the_model_is_left_as_it_is_found(mixtral):
    model, stats = mixtral
    stages = []
    twin, _ = compressed(model, stats, list(token_ids().split(4)), lambda *step: stages.append(step), sequential=True)
    assert {m.backend for m in twin.modules() if isinstance(m, D2MoEExperts)} == {"torch"}
    assert not twin.training
    for stage, total in (("Original activations", 4), ("Compressed activations", 8), ("Compressing layers", 2)):
        assert [step for step in stages if step[0] == stage] == [(stage, done + 1, total) for done in range(total)]
    assert not any("forward" in m.__dict__ for m in twin.modules())


def test_padding_enters_nothing(mixtral):
    model, _ = mixtral
    ids, mask = token_ids(4, 12), torch.ones(4, 12, dtype=torch.int64)
    mask[1, 8:] = mask[3, 5:] = 0
    rows = [row[keep][None] for row, keep in zip(ids, mask.bool(), strict=True)]
    padded = [{"input_ids": ids.masked_fill(mask == 0, 7), "attention_mask": mask}]
    stats = calibrate(model, rows)
    one, _ = compressed(model, stats, rows, sequential=True)
    other, _ = compressed(model, stats, padded, sequential=True)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


def test_experts_that_no_token_reaches(mixtral):
    model, _ = mixtral
    batches = [torch.tensor([[5, 6] * 10])]
    stats = calibrate(model, batches)
    assert all(0 in layer.tokens.tolist() for layer in stats.layers.values())
    twin, _ = compressed(model, stats, batches, sequential=True)
    assert all(bool(p.isfinite().all()) for p in twin.parameters())
    # Their down is run on the pooled sample, as in calibration.
    layer, view = layer_of(model, stats), find_experts(model)[0]
    original = original_arrivals(model, batches, [view], silent)[view.name]
    fit = fit_of(layer, original, torch.cat(original.hidden_states))
    with torch.no_grad():
        fit.carry_down(compress_exactly(view))
    close(fit.stats.gram_down, layer.stats.gram_down)
    assert bool(outputs(twin, token_ids())["logits"].isfinite().all())


@torch.no_grad()
def test_a_layer_that_no_token_reaches(mixtral):
    model, stats = mixtral
    layer = layer_of(model, stats)
    layer.stats = replace(
        layer.stats,
        tokens=torch.zeros_like(layer.stats.tokens),
        left_gram={name: torch.zeros_like(gram) for name, gram in layer.stats.left_gram.items()},
    )
    fit = fit_of(layer, Arrivals([], [], []), torch.empty(0, HIDDEN))
    fit.carry_gate_up()
    fit.carry_down(compress_exactly(layer.view))
    assert fit.target.carried == {}
    for group in ("gate_up", "down"):
        assert all(bool(p.isfinite().all()) for p in fit.settled(group)[0].run()[0].parameters())


@torch.no_grad()
def test_each_layers_activations_go_when_it_is_done(mixtral):
    model, stats = copy.deepcopy(mixtral[0]), mixtral[1]
    views = find_experts(model)
    sequential = SequentialCompressor(model, sequences_of([token_ids()]), views, silent)
    assert set(sequential.originals) == {view.name for view in views}
    views[0].replace(sequential.compress(layer_of(model, stats))[0])
    assert set(sequential.originals) == {views[1].name}


def test_what_is_compressed_is_saved_and_loaded(calibrated, tmp_path):
    model, stats = copy.deepcopy(calibrated[0]), calibrated[1]
    d2moe_ext.compress(model, stats, CompressionConfig(RATIO, sequential=True, **FIXED), batches=[token_ids()])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert loaded.config.quantization_config.to_dict()["compression"]["sequential"] is True
    assert torch.equal(outputs(loaded, token_ids())["logits"], outputs(model, token_ids())["logits"])


# what it refuses


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (None, r"^compress: sequential=True needs the batches that stats were taken from, got batches=None\.$"),
        ([], r"^compress: batches must hold at least one sequence, got none\.$"),
        ([token_ids(8)], r"^compress: batches must be those of stats, with 512 tokens, got 256\.$"),
        ([torch.rand(2, 3)], r"^compress: a batch must be integer token ids \[B, L\]"),
    ],
)
def test_other_batches_are_refused_before_anything_is_replaced(mixtral, batches, message):
    model, stats = copy.deepcopy(mixtral[0]), mixtral[1]
    with pytest.raises(ValueError, match=message):
        d2moe_ext.compress(model, stats, CompressionConfig(RATIO, sequential=True, **FIXED), batches=batches)
    assert not any(isinstance(m, D2MoEExperts) for m in model.modules())


def test_a_layer_that_runs_twice_is_refused():
    model = tiny_model("list_moe")
    model.layers.append(model.layers[0])
    stats = calibrate(model, [token_ids()])
    with pytest.raises(
        ValueError, match=r"layers that run once in a forward pass, got layers\.0\.mlp\.experts, which ran 2 times"
    ):
        compressed(model, stats, [token_ids()], sequential=True)


class Overflowing(nn.Module):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return torch.full_like(hidden_states, torch.inf)


def test_activations_that_are_not_finite_name_the_layer(mixtral):
    model, stats = copy.deepcopy(mixtral[0]), mixtral[1]
    views = find_experts(model)
    sequential = SequentialCompressor(model, [token_ids()], views, silent)
    layer = layer_of(model, stats, 1)
    views[0].replace(Overflowing())
    with pytest.raises(RuntimeError, match=r"must be finite, got NaN or infinity into model\.layers\.1\.mlp\.experts"):
        sequential.compress(layer)
