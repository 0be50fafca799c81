"""``d2moe analyze``: every diagnostic against its formula, and what is recommended for models made to be plain cases."""

import json
from dataclasses import replace

import pytest
import torch
from cli_helpers import assert_refused, run
from tiny_models import EXPERTS, HIDDEN, INTER, tiny_model, token_ids

from d2moe_ext.adapters import find_experts
from d2moe_ext.advice import LARGEST_ERROR, RATIOS, PredictedError, advise, choose_bases, predict_error
from d2moe_ext.analysis import (
    Routing,
    analyze_layers,
    base_counts,
    cka_matrix,
    energy_retention,
    linear_cka,
    low_column_share,
    mean_off_diagonal,
    top_energy,
)
from d2moe_ext.budget import plan_compression
from d2moe_ext.calibration import calibrate
from d2moe_ext.config import CompressionConfig
from d2moe_ext.shapes import model_shapes


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def analyzed(model):
    stats = calibrate(model, [token_ids(seed, 4, 32) for seed in range(4)], merge="mean")
    return analyze_layers(model, stats), stats


def set_experts(model, gate_up, down):
    """The same experts in every layer: gate_up ``[E, 2I, H]``, down ``[E, H, I]``."""
    with torch.no_grad():
        for view in find_experts(model):
            view.module.gate_up_proj.copy_(gate_up)
            view.module.down_proj.copy_(down)
    return model


def clustered(centres, noise, seed=0):
    """A tiny Mixtral whose expert e stands near centre ``e % centres``."""
    parts = []
    for place, shape in enumerate(((2 * INTER, HIDDEN), (HIDDEN, INTER))):
        centre = random(centres, *shape, seed=seed + place) * 0.3
        own = random(EXPERTS, *shape, seed=seed + 10 + place) * 0.3 * noise
        parts.append(centre[torch.arange(EXPERTS) % centres] + own)
    return set_experts(tiny_model("mixtral"), *parts)


@pytest.mark.parametrize(("rows", "a_columns", "b_columns"), [(9, 5, 7), (9, 20, 4), (6, 6, 30)])
def test_cka_is_the_definition_with_the_centring_matrix(rows, a_columns, b_columns):
    a, b = random(rows, a_columns), random(rows, b_columns, seed=1)
    h = torch.eye(rows, dtype=torch.float64) - 1 / rows

    def hsic(x, y):
        return torch.trace(x @ x.T @ h @ y @ y.T @ h)

    expected = float(hsic(a, b) / (hsic(a, a) * hsic(b, b)).sqrt())
    assert linear_cka(a, b) == pytest.approx(expected, rel=1e-9)
    assert 0.01 < expected < 0.99


@pytest.mark.parametrize("rows", [5, 40])
def test_cka_does_not_see_scale_shift_or_rotation(rows):
    a, b = random(rows, 8), random(rows, 12, seed=1)
    rotation = torch.linalg.qr(random(8, 8, seed=2)).Q
    assert linear_cka(a, a) == pytest.approx(1)
    assert linear_cka(a, -3 * a @ rotation + 2) == pytest.approx(1)
    assert linear_cka(a @ rotation, 7 * b) == pytest.approx(linear_cka(a, b))
    assert linear_cka(a, torch.ones(rows, 3)) == 0.0
    with pytest.raises(ValueError, match=r"linear_cka: a and b must be \[n, p\] and \[n, q\], got \[4, 8\] and"):
        linear_cka(a[:4], b)


def test_cka_of_many_is_that_of_pairs():
    weights = [random(12, 10 + seed, seed=seed) for seed in range(4)]
    matrix = cka_matrix(weights)
    pairs = {(i, j): linear_cka(weights[i], weights[j]) for i in range(4) for j in range(4)}
    for (i, j), value in pairs.items():
        assert float(matrix[i, j]) == pytest.approx(value)
    assert mean_off_diagonal(matrix) == pytest.approx(sum(v for (i, j), v in pairs.items() if i != j) / 12)
    assert mean_off_diagonal(cka_matrix(weights[:1])) == 1.0


def test_cka_of_independent_weights_is_the_share_that_is_stated():
    assert linear_cka(random(100, 300), random(100, 300, seed=1)) == pytest.approx(300 / 400, abs=0.02)


def test_energy_retention_is_the_norm_of_the_truncated_matrix():
    weight = random(9, 6)
    u, sigma, v = torch.linalg.svd(weight, full_matrices=False)
    shares = energy_retention(sigma)
    for rank in range(1, 7):
        kept = (u[:, :rank] * sigma[:rank]) @ v[:rank]
        assert float(shares[rank - 1]) == pytest.approx(float(kept.square().sum() / weight.square().sum()))
    assert torch.equal(energy_retention(torch.zeros(2, 3)), torch.ones(2, 3, dtype=torch.float64))
    # 20 values: the top 10, 25 and 50 % are 2, 5 and 10 of them.
    assert top_energy(torch.ones(3, 20)) == pytest.approx([0.1, 0.25, 0.5])


def test_low_columns_are_those_with_the_lowest_metric():
    base, energy = random(5, 10), random(10, seed=1).square()
    metric = sorted((base[:, j].norm() * energy[j].sqrt()).item() ** 2 for j in range(10))
    assert low_column_share(base, energy) == pytest.approx(sum(metric[:3]) / sum(metric))
    assert low_column_share(torch.zeros(5, 10), energy) == 0.0


def test_routing_counts_every_pair():
    routing = Routing.of(torch.tensor([6, 0, 2]))
    assert sum(routing.shares) == pytest.approx(1)
    assert routing.unreached == [1]
    expected = -(0.75 * torch.tensor(0.75).log() + 0.25 * torch.tensor(0.25).log()) / torch.tensor(3.0).log()
    assert routing.entropy == pytest.approx(float(expected), rel=1e-6)
    assert Routing.of(torch.tensor([5, 5, 5])).entropy == pytest.approx(1)
    assert Routing.of(torch.tensor([5])).entropy == 1.0


def test_base_counts_double_up_to_the_experts():
    assert base_counts(6) == [1, 2, 4, 6]
    assert base_counts(8) == [1, 2, 4, 8]
    assert base_counts(1) == [1]


class Layer:
    """A layer's weights, Gram factors and counts by the formulas of the design, without the code under test."""

    def __init__(self, view, stats):
        self.view, self.stats = view, stats
        self.tokens = stats.tokens.double()
        self.weights = {
            "gate_up": [view.gate_up_weight(e).detach().double() for e in range(EXPERTS)],
            "down": [view.down_weight(e).detach().double() for e in range(EXPERTS)],
        }
        pooled = stats.gram_gate_up.sum(0) / self.tokens.sum()
        self.factors = {"gate_up": [], "down": []}
        for expert, tokens in enumerate(self.tokens):
            self.factors["gate_up"].append(self.factor((stats.gram_gate_up[expert] + 32 * pooled) / (tokens + 32)))
            gram, diagonal = stats.gram_down[expert], stats.gram_down[expert].diagonal().mean() / tokens
            own = (gram + 32 * diagonal * torch.eye(INTER, dtype=torch.float64)) / (tokens + 32)
            self.factors["down"].append(self.factor(own))

    @staticmethod
    def factor(gram):
        return torch.linalg.cholesky(gram + 1e-6 * torch.diag(gram.diagonal()))

    def pruned_mean(self, group):
        """The mean without the 5 % (here one) of its columns that eq. 9 ranks lowest."""
        mean = torch.stack(self.weights[group]).mean(0)
        stats = self.stats
        grams = stats.gram_gate_up.diagonal(dim1=1, dim2=2).sum(0) if group == "gate_up" else stats.down_energy[0]
        mean[:, int((mean.norm(dim=0) * grams.sqrt()).argmin())] = 0
        return mean

    def error(self, ranks):
        """``Σ‖truncated‖² / Σ‖W S‖²`` over tokens, the mean over projections."""
        errors = []
        for name, each in ranks.items():
            group = "down" if name == "down" else "gate_up"
            rows = {"gate": slice(0, INTER), "up": slice(INTER, None)}.get(name, slice(None))
            left = total = 0.0
            for expert, rank in enumerate(each):
                weight, factor = self.weights[group][expert], self.factors[group][expert]
                sigma = torch.linalg.svdvals((weight - self.pruned_mean(group))[rows] @ factor)
                left += float(self.tokens[expert] * sigma[rank:].square().sum())
                total += float(self.tokens[expert] * (weight[rows] @ factor).square().sum())
            errors.append(left / total)
        return sum(errors) / len(errors)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "list_moe"])
def test_predicted_errors_are_those_of_the_plans_truncation(family):
    model = tiny_model(family)
    layers, stats = analyzed(model)
    by_hand = [Layer(view, stats.layers[view.name]) for view in find_experts(model)]
    shapes = model_shapes(model)
    config = CompressionConfig(ratio=0.3, preset="performance")
    plan = plan_compression(shapes, config, [layer.routing.tokens for layer in layers])
    errors = [layer.error(planned.ranks) for layer, planned in zip(by_hand, plan.layers, strict=True)]
    predicted = predict_error(layers, shapes, 0.3)
    assert predicted.error == pytest.approx((sum(errors) / len(errors)) ** 0.5, rel=1e-4)
    assert predicted.worst_error == pytest.approx(max(errors) ** 0.5, rel=1e-4)
    assert predicted.worst_layer == by_hand[errors.index(max(errors))].view.name


def test_diagnostics_of_a_layer_are_their_formulas():
    model = clustered(2, 0.5)
    layers, stats = analyzed(model)
    found, view = layers[1], find_experts(model)[1]
    layer = Layer(view, stats.layers[view.name])
    top, explained = {}, {1: [], 2: []}
    for group, weights in layer.weights.items():
        factors, mean = layer.factors[group], torch.stack(weights).mean(0)
        quarter = round(0.25 * min(weights[0].shape))
        for part, matrices in (("experts", weights), ("base", [mean] * EXPERTS), ("deltas", [w - mean for w in weights])):
            for kind in ("plain", "whitened"):
                sigmas = [
                    torch.linalg.svdvals(m @ s if kind == "whitened" else m) for m, s in zip(matrices, factors, strict=True)
                ]
                shares = [float(sigma[:quarter].square().sum() / sigma.square().sum()) for sigma in sigmas]
                top.setdefault((part, kind), []).append(sum(shares) / EXPERTS)
        total = sum((w @ s).square().sum() for w, s in zip(weights, factors, strict=True))
        for bases, shares in explained.items():
            means = [torch.stack(weights[e % bases :: bases]).mean(0) for e in range(EXPERTS)]
            left = sum(((w - m) @ s).square().sum() for w, m, s in zip(weights, means, factors, strict=True))
            shares.append(float(1 - left / total))
        rows = [w.T if group == "gate_up" else w for w in weights]
        pairs = [linear_cka(rows[i], rows[j]) for i in range(EXPERTS) for j in range(i)]
        assert found.cka[group] == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)
    for (part, kind), shares in top.items():
        assert found.retention[part][kind][1] == pytest.approx(sum(shares) / 2, rel=1e-4), (part, kind)
    for bases, shares in explained.items():
        assert found.explained[bases] == pytest.approx(sum(shares) / 2, rel=1e-4)
    assert found.explained[6] == pytest.approx(1)
    assert found.cka_independent == {"gate_up": 48 / 80, "down": 24 / 56}


def test_identical_experts_want_one_base_and_the_largest_ratio():
    model = clustered(1, 0.0)
    layers, _ = analyzed(model)
    for layer in layers:
        assert layer.explained[1] == pytest.approx(1)
        assert layer.cka == pytest.approx({"gate_up": 1, "down": 1})
    advice = advise(layers, model_shapes(model))
    reachable = [entry.ratio for entry in advice.predictions if entry.num_bases == 1 and entry.error is not None]
    assert advice.num_bases == 1
    assert advice.ratio == max(reachable) > min(reachable)


def test_two_clusters_of_experts_want_two_bases():
    model = clustered(2, 0.05)
    layers, _ = analyzed(model)
    advice = advise(layers, model_shapes(model))
    assert advice.num_bases == 2
    chosen = next(entry for entry in advice.predictions if (entry.num_bases, entry.ratio) == (2, advice.ratio))
    assert chosen.error < LARGEST_ERROR
    larger = [entry for entry in advice.predictions if entry.num_bases == 2 and entry.ratio > advice.ratio]
    assert all(entry.error is None or entry.error >= LARGEST_ERROR for entry in larger)
    for layer in layers:
        assert layer.explained[1] < 0.9
        assert layer.explained[2] > 0.99


@pytest.mark.parametrize(
    ("errors", "best"),
    [
        ({1: 0.20, 2: 0.19, 4: 0.21}, 1),  # less than a tenth better
        ({1: 0.20, 2: 0.17, 4: 0.16}, 2),
        ({1: 0.20, 2: 0.17, 4: 0.15}, 4),
        ({1: 0.20, 2: 0.25, 4: 0.15}, 4),
        ({1: 1e-3, 2: 1e-4, 4: None}, 1),  # below bfloat16's rounding there is nothing to win
    ],
)
def test_more_bases_must_earn_their_place(errors, best):
    rows = {bases: [PredictedError(RATIOS[0], bases, error)] for bases, error in errors.items()}
    chosen, reason = choose_bases(rows[1][0], rows)
    assert chosen.num_bases == best
    assert f"1: {errors[1]:.3f}, 2: {errors[2]:.3f}" in reason


def test_experts_without_anything_in_common_get_a_warning():
    model = clustered(EXPERTS, 0.0)
    layers, _ = analyzed(model)
    advice = advise(layers, model_shapes(model))
    assert (advice.num_bases, advice.ratio, advice.preset) == (1, RATIOS[0], "quality")
    assert "is not below 0.25, so expect to pay in quality" in advice.reasons["ratio"]


def test_columns_that_carry_nothing_allow_the_throughput_preset():
    gate_up, down = random(EXPERTS, 2 * INTER, HIDDEN), random(EXPERTS, HIDDEN, INTER, seed=1)
    gate_up[:, :, : HIDDEN // 2] *= 0.01
    down[:, :, : INTER // 2] *= 0.01
    model = set_experts(tiny_model("mixtral"), gate_up, down)
    layers, _ = analyzed(model)
    assert advise(layers, model_shapes(model)).preset == "throughput"


def test_a_model_of_few_experts_has_no_ratio():
    model = clustered(1, 0.1)
    layers, _ = analyzed(model)
    shapes = model_shapes(model)
    advice = advise(layers, replace(shapes, total_parameters=20 * shapes.total_parameters))
    assert advice.ratio is None
    assert "No ratio from 0.2 up can be reached" in advice.reasons["ratio"]


def test_statistics_of_another_kind_are_refused():
    model = tiny_model("mixtral")
    stats = calibrate(model, [token_ids()], merge="mean", num_bases=2)
    with pytest.raises(ValueError, match="analyze: stats must be taken for num_bases=1, got statistics for 2"):
        analyze_layers(model, stats)
    with pytest.raises(ValueError, match="analyze: stats must hold every MoE layer of the model, got none of model.layers.0"):
        analyze_layers(model, replace(stats, num_bases=1, layers={}))


QUICK = ("--samples", "6", "--seqlen", "32", "--batch-size", "3")


def no_constants(name):
    raise AssertionError(f"{name} is not JSON")


def test_analyze_prints_strict_json(tiny_directory, tiny_text, capsys):
    code, out, err = run(capsys, "analyze", tiny_directory, "--calibration", tiny_text, *QUICK, "--json")
    assert (code, err) == (0, "")
    record = json.loads(out, parse_constant=no_constants)
    assert record["calibration"] == {"text": str(tiny_text), "samples": 6, "seqlen": 32, "seed": 0}
    assert len(record["layers"]) == 2
    for layer in record["layers"]:
        assert sum(layer["routing"]["shares"]) == pytest.approx(1)
        assert sum(layer["routing"]["tokens"]) == 6 * 32 * 2
        assert list(layer["explained_by_bases"]) == ["1", "2", "4", "8"]
    advice = record["advice"]
    assert advice["ratio"] in RATIOS
    assert set(advice["reasons"]) == {"num_bases", "ratio", "preset"}
    assert len(advice["predictions"]) == 3 * len(RATIOS)


def test_analyze_prints_tables_and_reasons(tiny_directory, tiny_text, capsys):
    code, out, err = run(capsys, "analyze", tiny_directory, "--calibration", tiny_text, *QUICK)
    assert (code, err) == (0, "")
    for part in ("CKA between experts", "deltas, whitened", "model.layers.1.mlp.experts", "Expected relative error"):
        assert part in out
    for part in ("--num-bases 1", "--ratio 0", "--preset quality", "heuristic", "6 M and 22 M"):
        assert part in out


def test_analyze_refuses(compressed_directory, tiny_directory, tiny_text, capsys):
    assert_refused(run(capsys, "analyze", compressed_directory), "MODEL must be neither compressed nor quantized")
    assert_refused(
        run(capsys, "analyze", tiny_directory, "--samples", 0, "--calibration", tiny_text),
        "--samples must be at least 1, got 0",
    )
    assert_refused(run(capsys, "analyze", tiny_directory, "--calibration", "absent"), "--calibration must be a text file")
