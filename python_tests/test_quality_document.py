"""The page of the quality study says what its rows say, and nothing else."""

from __future__ import annotations

import copy
import json
import math
import random
import statistics

import numpy as np
import pytest
import quality_helpers
import tiny_models
import torch
from quality_helpers import SIZES, key, plain_row, row
from torch import nn

from benchmarks.quality import checks, document, plots
from benchmarks.quality.checks import Order, Share
from benchmarks.quality.diagnostics import CURVE_POINTS, layer_sensitivity, read_diagnostics, write_diagnostics
from benchmarks.quality.document import write_document
from benchmarks.quality.figures import diagnostics_table
from benchmarks.quality.forward import CONTENDERS, forward_table, forward_times, read_forward
from benchmarks.quality.parts import PARTS, Line
from benchmarks.quality.remarks import ahead_of_default, lowest, steps
from benchmarks.quality.results import Results
from benchmarks.quality.retired import FORMER_DEFAULT
from benchmarks.quality.summary import Summary, mean_of
from d2moe_ext.adapters import find_experts
from d2moe_ext.calibration import calibrate
from d2moe_ext.evaluate import Speed

METHODS = {
    name: lambda model, calibration, ratio: 0 for name in ("paper", "default", "fold", "paper, frequency", "paper, mean")
}
RISES = {"paper": (0.2, 0.3, 0.4), "default": (0.1, 0.1, 0.25), "fold": (0.15, 0.2, 0.1)}


def results_of(folder, rows):
    results = Results(folder)
    for entry in rows:
        results.append(entry)
    return results


def three_seeds(model="alpha", ratio=0.6):
    """Rises of three methods in domain; twice as high out of it."""
    return [
        row(key(model, method, ratio, seed), rise, 2 * rise)
        for method, rises in RISES.items()
        for seed, rise in enumerate(rises)
    ]


def summary_of(folder, rows, methods=METHODS):
    return Summary(results_of(folder, rows), "selection", SIZES, methods)


@pytest.fixture
def summary(tmp_path):
    return summary_of(tmp_path, [plain_row("alpha"), *three_seeds()])


def test_mean_and_spread_are_the_sample_ones():
    values = [0.2, 0.3, 0.7]
    mean = sum(values) / 3
    assert mean_of(values).value == pytest.approx(mean)
    assert mean_of(values).spread == pytest.approx(math.sqrt(sum((value - mean) ** 2 for value in values) / 2))
    assert (str(mean_of([0.2])), str(mean_of([0.1, 0.3]))) == ("0.2000", "0.2000 ± 0.1414")


def test_table_gives_mean_spread_share_and_bytes(summary):
    text = document.document(summary)
    spread = statistics.stdev(RISES["default"])
    assert spread == pytest.approx(math.sqrt((0.05**2 * 2 + 0.1**2) / 2))
    cells = [
        "default",
        f"{0.45 / 3:.4f} ± {spread:.4f} (50 %)",
        f"{0.9 / 3:.4f} ± {2 * spread:.4f} (50 %)",
        "1.234",
    ]
    assert "| " + " | ".join(cells) + " |" in text
    assert f"| paper | {0.9 / 3:.4f} ± 0.1000 (100 %) |" in text
    assert "| method | alpha: in | out | MB |" in text
    # seconds and memory
    assert "| default | 2.0 | 3 |" in text


def test_both_models_stand_side_by_side(tmp_path):
    rows = [plain_row("alpha"), plain_row("beta"), *three_seeds(), row(key("beta", "default"), 0.5, 0.25)]
    text = document.document(summary_of(tmp_path, rows))
    assert "| method | alpha: in | out | MB | beta: in | out | MB |" in text
    line = next(line for line in text.splitlines() if line.startswith("| default | 0."))
    assert line.endswith("| 0.5000 | 0.2500 | 1.234 |")
    paper = next(line for line in text.splitlines() if line.startswith("| paper | 0."))
    assert paper.endswith("| – | – | – |")
    assert "| alpha | 617,500 | 10.00 | 20.00 | i | o |" in text


def test_header_names_texts_judge_machine_and_command(summary, tmp_path):
    text = document.document(summary)
    for part in ("**selection** text", "not yet a judgement", "128 tokens", "windows of 32", "seeds (0, 1, 2)", "a machine"):
        assert part in text
    assert "- calibration text: c\n- measured: 2026-01-02" in text
    assert "```\na command\n```" in text
    test_rows = [plain_row("alpha"), row(key("alpha", "paper"), 0.1, 0.1)]
    judged = results_of(
        tmp_path / "test", [row(key(**{**vars(r.key), "judge": "test"}), r.rise_in, r.rise_out) for r in test_rows]
    )
    page = document.document(Summary(judged, "test", SIZES, METHODS))
    assert "Options were chosen on the selection text" in page


def test_a_failed_row_is_shown(tmp_path):
    rows = [plain_row("alpha"), *three_seeds()]
    rows[2] = row(rows[2].key, failure="the ridge must help, got none.")
    rows += [row(key("alpha", "paper", 0.7), 0.5, 0.5), row(key("alpha", "default", 0.7), failure="it broke.")]
    text = document.document(summary_of(tmp_path, rows))
    assert "| paper | 0.3000 ± 0.1414 (100 %), 1 of 3 seeds failed |" in text
    assert "- paper failed on alpha at ratio 0.6, seed 1: the ridge must help, got none." in text
    assert "| default | failed | failed | – |" in text
    assert "- default failed on alpha at ratio 0.7, seed 0: it broke." in text


def test_only_rows_of_the_judge_the_sizes_and_the_version_count(tmp_path):
    other = [
        key("alpha", "paper", judge="test"),
        key("alpha", "paper", tokens=64),
        key("alpha", "paper", seqlen=16),
        key("alpha", "paper", version=2),
        key("alpha", "gone"),
        key("alpha", "paper", samples=8),
    ]
    summary = summary_of(
        tmp_path, [plain_row("alpha"), *(row(k, 1.0, 1.0) for k in other), row(key("alpha", "paper"), 0.1, 0.1)]
    )
    assert summary.rise("alpha", Line("paper"), 0.6, "in").value == 0.1
    assert summary.rise("alpha", Line("paper", samples=8), 0.6, "in").value == 1.0
    assert summary.rise("alpha", Line("paper", source="out"), 0.6, "in") is None


def test_rows_that_cannot_be_compared_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--write needs rows judged by the selection text at these sizes"):
        summary_of(tmp_path / "none", three_seeds())
    for number, change in enumerate(({"weights": "v"}, {"text_in": "j"}, {"text_calibration": "d"})):
        rows = [plain_row("alpha"), row(key("alpha", "paper")), row(key("alpha", "default", **change))]
        with pytest.raises(ValueError, match="one choice of weights and texts for each model, got several for alpha"):
            summary_of(tmp_path / str(number), rows)


def test_the_page_is_the_same_whatever_the_rows_order(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "BASELINES", {"fold": None})
    rows = [plain_row("alpha"), *three_seeds(), *three_seeds(ratio=0.4)]
    pages = []
    for number in range(2):
        shuffled = list(rows)
        random.Random(number).shuffle(shuffled)
        page = tmp_path / str(number) / "page.md"
        write_document(results_of(tmp_path / f"rows{number}", shuffled), "selection", SIZES, METHODS, page)
        pages.append((page.read_bytes(), (page.parent / "page" / "rise_alpha.png").read_bytes()))
        summary = Summary(Results(tmp_path / f"rows{number}"), "selection", SIZES, METHODS)
        assert [entry.key.seed for entry in summary.rows_of("alpha", Line("paper"), 0.6)] == [0, 1, 2]
    assert pages[0] == pages[1]
    assert b"![rise alpha](page/rise_alpha.png)" in pages[0][0]


def test_notes_by_hand_stand_below_their_part(summary, tmp_path, monkeypatch):
    monkeypatch.setattr(document, "NOTES", tmp_path)
    (tmp_path / "default.md").write_text("Why this is so.\n")
    (tmp_path / "holds.md").write_text("What it means.\n")
    text = document.document(summary)
    part, rest = text.split("\n\nWhy this is so.\n\n")
    assert part.rindex("## The default against") > part.rfind("## Beyond")
    assert "## What holds" in rest.split("What it means.")[0]


def test_plot_shows_the_best_rivals_and_survives_a_fall(tmp_path, monkeypatch):
    names = ["r1", "r2", "r3", "r4"]
    monkeypatch.setattr(plots, "BASELINES", dict.fromkeys(names))
    rows = [plain_row("alpha"), row(key("alpha", "default"), -0.1, 0.2)]
    rows += [
        row(key("alpha", name, ratio), rise)
        for name, rise in zip(names, (0.4, 0.1, 0.3, 0.2), strict=True)
        for ratio in (0.4, 0.6)
    ]
    rows.append(row(key("alpha", "r1", 0.7), 0.01))
    summary = summary_of(tmp_path / "rows", rows, dict.fromkeys([*METHODS, *names], METHODS["paper"]))
    assert [line.method for line in plots._best_rivals(summary, "alpha")] == ["r2", "r4", "r3"]
    (image,) = plots.draw_rises(summary, tmp_path)
    assert image.read_bytes().startswith(b"\x89PNG")


# what holds


def order(summary, *methods, relation="<"):
    (inside, outside) = Order("a claim", methods, (relation,) * (len(methods) - 1), (0.6,)).verdicts(summary)
    assert (inside.domain, outside.domain) == ("in", "out")
    return inside.verdict


def test_orders_are_judged_by_the_means(summary):
    assert order(summary, "default", "paper") == "holds"
    assert order(summary, "paper", "default") == "does not hold, by 0.1500"
    # means 0.15 and 0.15
    assert order(summary, "default", "fold", relation="≤") == "holds"
    assert order(summary, "default", "fold").startswith("does not hold, by 0.0000, less than the spread")
    assert order(summary, "default", "paper, mean") == "not measured"
    (verdict, _) = Order("c", ("default", "paper"), ("<",), (0.6,)).verdicts(summary)
    assert verdict.numbers == "0.1500 ± 0.0866; 0.3000 ± 0.1000"


def test_shares_are_held_against_their_limit(summary):
    verdicts = [next(Share("default", 0.6, "in", limit).verdicts(summary)) for limit in (0.5001, 0.4999)]
    assert [v.verdict for v in verdicts] == ["holds", "does not hold"]
    assert verdicts[0].numbers == "50.0 %"
    assert next(Share("default", 0.5, "in", 0.4).verdicts(summary)).verdict == "not measured"


def test_where_the_papers_pipeline_cannot_go_its_nearest_row_stands_in(tmp_path):
    rows = [plain_row("alpha"), row(key("alpha", "default", 0.75, 0), 0.3, 0.3), row(key("alpha", "paper", 0.7, 0), 0.1, 0.1)]
    share = Share("default", 0.75, "in", 0.6)
    assert next(share.verdicts(summary_of(tmp_path / "far", rows))).verdict == "not measured"
    rows.append(row(key("alpha", "paper", 0.749, 0), 0.6, 0.6))
    verdict = next(share.verdicts(summary_of(tmp_path / "near", rows)))
    assert (verdict.verdict, verdict.numbers) == ("holds", "50.0 % of the paper's rise at 0.749, as 0.75 is out of its reach")
    rows.append(row(key("alpha", "paper", 0.75, 0), 0.4, 0.4))
    assert next(share.verdicts(summary_of(tmp_path / "same", rows))).numbers == "75.0 %"


def test_section_counts_what_holds(summary, monkeypatch):
    monkeypatch.setattr(checks, "SHARES", (Share("default", 0.6, "in", 0.6), Share("default", 0.6, "out", 0.4)))
    monkeypatch.setattr(checks, "ORDERS", (Order("c", ("default", "gone"), ("<",), (0.6,)),))
    text = document.document(summary)
    assert "1 of 4 hold, 1 do not, 2 were not measured." in text
    assert "| default: at most 60 % of the paper's rise | alpha | 0.6 | in | 50.0 % | holds |" in text


def test_targets_are_those_of_the_study():
    limits = {(share.ratio, share.domain): share.limit for share in checks.SHARES}
    assert {ratio: limits[ratio, "in"] for ratio in (0.5, 0.6, 0.7, 0.75)} == {0.5: 0.4, 0.6: 0.4, 0.7: 0.6, 0.75: 0.6}
    assert {ratio: limits[ratio, "out"] for ratio in (0.6, 0.7, 0.75)} == {0.6: 0.6, 0.7: 0.65, 0.75: 0.65}


# sentences


def test_remarks_compare_seed_by_seed(summary):
    lines = (Line("paper"), Line("default"), Line("fold", "folded"))
    assert lowest(summary, lines[:2], [0.6])[0] == "- Least rise on alpha, in domain: default at 0.6 (0.1500 below paper)."
    down, mixed = steps(summary, lines, [0.6])
    change = [-0.1, -0.2, -0.15]
    assert f"alpha in domain at 0.6: {statistics.fmean(change):+.4f} ± {statistics.stdev(change):.4f}" in down
    assert "**default** against paper, over shared seeds: lower by more than the spread in 2 of 2" in down
    assert "**folded** against default, over shared seeds: lower by more than the spread in 0 of 2" in mixed


def test_remarks_say_where_the_default_is_beaten(tmp_path, summary):
    lines = (Line("paper"), Line("default"))
    assert ahead_of_default(summary, lines, [0.6]) == ["- Nothing here is ahead of the default."]
    assert ahead_of_default(summary, lines, [0.7]) == []
    rows = [plain_row("alpha"), row(key("alpha", "default"), 0.3, 0.1), row(key("alpha", "fold"), 0.1, 0.2)]
    beaten = ahead_of_default(summary_of(tmp_path / "beaten", rows), (Line("default"), Line("fold")), [0.6])
    assert beaten == ["- fold is ahead of the default on alpha, in domain, at 0.6, by 0.2000."]


def test_parts_hold_what_the_study_asks_for():
    assert {"default", "merge", "decomposition", "samples", "source", "beyond", "rivals"} <= set(PARTS)
    assert {0.4, 0.5, 0.6, 0.7, 0.75} <= set(PARTS["default"].ratios)
    for part in PARTS.values():
        assert len(set(part.lines)) == len(part.lines) == len({line.name for line in part.lines})


def test_rows_of_retired_methods_stand_in_the_page(tmp_path):
    rows = [plain_row("alpha"), row(key("alpha", FORMER_DEFAULT), 0.25, 0.5), row(key("alpha", "refit U"), 0.75, 0.5)]
    page = document.document(summary_of(tmp_path, rows))
    assert "| refit U | 0.7500 |" in page
    assert "Least rise on alpha, in domain: former default at 0.6 (0.5000 below refit U)." in page


# figures


@torch.no_grad()
def test_sensitivity_is_the_rise_of_one_compressed_layer():
    model = tiny_models.tiny_model("mixtral")
    damaged = copy.deepcopy(model)
    for view, factor in zip(find_experts(damaged), (1.0, 0.5), strict=True):
        for parameter in view.parameters():
            parameter.mul_(factor)
    ids = tiny_models.token_ids(length=20)

    def judge(network: nn.Module) -> float:
        return math.exp(nn.functional.cross_entropy(network(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))

    expected = math.log(judge(damaged)) - math.log(judge(model))
    first, second = layer_sensitivity(model, damaged, judge)
    assert first == 0.0
    assert second == pytest.approx(expected, abs=1e-6)
    assert abs(expected) > 1e-4


def test_diagnostics_are_kept_drawn_and_right(tiny_directory, tmp_path):
    laboratory = quality_helpers.laboratory(tiny_directory, tmp_path, {})
    write_diagnostics(laboratory, tmp_path / "results")
    (record,) = read_diagnostics(tmp_path / "results")
    view = find_experts(laboratory.model)[1]
    layer = record["layers"][1]
    weights = torch.stack([view.gate_up_weight(e).detach() for e in range(8)]).double().numpy()
    # Figure 1, by the formula: hidden channels are the samples.
    first, second = (weights[e].T - weights[e].T.mean(0) for e in (0, 1))
    aligned = np.linalg.norm(first.T @ second) ** 2
    aligned /= np.linalg.norm(first.T @ first) * np.linalg.norm(second.T @ second)
    assert layer["gate_up"]["cka"][0][1] == pytest.approx(aligned, rel=1e-6)
    # Figure 2: experts as they are, and the base whose experts share one spectrum.
    sigma = np.linalg.svd(weights, compute_uv=False)
    kept = (sigma[:, :32] ** 2).sum(1) / (sigma**2).sum(1)
    curve = layer["gate_up"]["energy"]["experts"]["plain"]
    assert len(curve) == CURVE_POINTS
    assert curve[50] == pytest.approx(kept.mean(), rel=1e-6)  # 32 of 64
    stats = calibrate(laboratory.model, laboratory.calibration(0, 4, "calibration").batches, merge="fisher").layers[view.name]
    base = (stats.fisher_weighted["gate_up"] / stats.fisher_sum["gate_up"])[0].double().numpy()
    sigma = np.linalg.svd(base, compute_uv=False)
    assert layer["gate_up"]["energy"]["base"]["plain"][50] == pytest.approx(
        (sigma[:32] ** 2).sum() / (sigma**2).sum(), rel=1e-4
    )
    sigma = np.linalg.svd(weights - base, compute_uv=False)
    kept = (sigma[:, :32] ** 2).sum(1) / (sigma**2).sum(1)
    assert layer["gate_up"]["energy"]["deltas"]["plain"][50] == pytest.approx(kept.mean(), rel=1e-4)
    for group in ("gate_up", "down"):
        for curves in layer[group]["energy"].values():
            for values in curves.values():
                assert values[0] == 0.0
                assert values[-1] == pytest.approx(1.0)
                assert values == sorted(values)
        for name in ("cka_u", "cka_v"):
            matrix = np.array(layer[group][name])
            np.testing.assert_allclose(matrix, matrix.T)
            np.testing.assert_allclose(matrix.diagonal(), 1.0)
            assert 0 <= matrix[0, 1] < 1
    results = results_of(tmp_path / "results", [plain_row("tiny"), row(key("tiny", "paper"))])
    page = tmp_path / "page.md"
    write_document(results, "selection", SIZES, METHODS, page)
    for kind in ("experts", "energy", "factors", "layers"):
        assert f"![{kind} tiny](page/{kind}_tiny.png)" in page.read_text()
        assert (tmp_path / "page" / f"{kind}_tiny.png").stat().st_size > 5000
    head, lines = diagnostics_table(record)
    assert [len(line) for line in lines] == [len(head)] * 2
    pairs = np.array(layer["down"]["cka_v"])[~np.eye(8, dtype=bool)]
    assert lines[1][6] == f"{pairs.mean():.3f}"
    assert lines[1][7] == f"{record['sensitivity'][1]:.4f}"
    json.dumps(record, allow_nan=False)


class Speeds:
    """Models that are timed are numbers here: each call gives the next of a model's speeds."""

    def __init__(self):
        self.calls = []

    def __call__(self, model):
        self.calls.append(model)
        turn = self.calls.count(model)
        return Speed(prefill=model * turn, generate=model / turn)


def test_forward_times_are_medians_of_turns():
    measure = Speeds()
    times = forward_times({"a": 10.0, "b": 100.0}, measure, 3)
    assert measure.calls == [10.0, 100.0] * 3
    assert times == {"a": {"prefill": 20.0, "generate": 5.0}, "b": {"prefill": 200.0, "generate": 50.0}}


def test_the_page_shows_the_forwards_times(tmp_path, summary):
    times = {name: {"prefill": 1000.4 + place, "generate": 50.6 + place} for place, name in enumerate(CONTENDERS)}
    (tmp_path / "alpha.forward.json").write_text(
        json.dumps({"model": "alpha", "ratio": 0.6, "rounds": 5, "times": times}), encoding="utf-8"
    )
    records = read_forward(tmp_path)
    assert forward_table(records)[1][-1] == ["default", "1,003", "54"]
    page = document.document(summary, forward=records)
    assert "| the paper's pipeline | 1,002 | 53 |" in page
    assert "What the forward costs" not in document.document(summary)
