"""Rows of the study: measured once, kept, resumed, and asked for by parts and methods."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import cli_helpers
import pytest
import quality_helpers
import torch

from benchmarks.quality.machine import peak_growth
from benchmarks.quality.methods import all_methods, round_stored
from benchmarks.quality.parts import PARTS, Line
from benchmarks.quality.results import UNCOMPRESSED, Results
from benchmarks.quality.retired import RETIRED
from benchmarks.quality.runner import Task, of_methods, tasks_of
from benchmarks.study import byte_budget, method_version
from d2moe_ext.adapters import find_experts
from d2moe_ext.bench.machine import describe_machine
from d2moe_ext.cli.common import load_model


@pytest.fixture(scope="module")
def small_directory(tmp_path_factory):
    """One layer of three experts, where only the study itself is looked at."""
    sizes = {"num_hidden_layers": 1, "num_local_experts": 3, "hidden_size": 32, "intermediate_size": 48}
    return cli_helpers.save_model(tmp_path_factory.mktemp("model") / "small", **sizes)


def tasks(*methods, ratios=(0.5,), seeds=1):
    return [Task(Line(method), ratio, seed) for seed in range(seeds) for method in methods for ratio in ratios]


class Counted:
    """A method that spends the budget and scales the experts, and counts its calls."""

    def __init__(self, factor=1.0, version=1):
        self.factor, self.version, self.calls = factor, version, []

    def __call__(self, model, calibration, ratio):
        self.calls.append(ratio)
        with torch.no_grad():
            for view in find_experts(model):
                for parameter in view.parameters():
                    parameter.mul_(self.factor)
        return byte_budget(model, ratio)


def refuse(model, calibration, ratio):
    raise RuntimeError("the Gram matrix must be definite, got -1.\nAnd a second sentence.")


def overspend(model, calibration, ratio):
    return byte_budget(model, ratio) + 1


def log_perplexity(model, tokens, window):
    """Natural logarithm of the perplexity, token by token."""
    total = 0.0
    for begin in range(0, len(tokens) - 1, window):
        end = min(begin + window, len(tokens) - 1)
        logits = model(tokens[None, begin:end]).logits[0].double()
        total -= float(logits.log_softmax(-1).gather(1, tokens[begin + 1 : end + 1, None]).sum())
    return total / (len(tokens) - 1)


@torch.no_grad()
def test_rise_is_log_perplexity_over_the_uncompressed_model(small_directory, tmp_path):
    methods = {"same": Counted(), "half": Counted(0.5)}
    laboratory = quality_helpers.laboratory(small_directory, tmp_path, methods)
    same, half = laboratory.run(tasks("same", "half"))[1:]
    assert (same.rise_in, same.rise_out) == (0.0, 0.0)
    plain = load_model(str(small_directory), "float32")
    round_stored(plain)
    halved = copy.deepcopy(plain)
    Counted(0.5)(halved, None, 0.5)
    for domain, rise in (("in", half.rise_in), ("out", half.rise_out)):
        tokens = laboratory.judging[domain]
        assert len(tokens) == quality_helpers.SIZES.tokens
        expected = log_perplexity(halved, tokens, 32) - log_perplexity(plain, tokens, 32)
        assert rise == pytest.approx(expected, abs=1e-5)
        assert abs(expected) > 1e-3
    assert half.bytes == half.budget == byte_budget(plain, 0.5)
    assert half.key.text_in.startswith("selection.txt (")


def test_a_study_resumes_where_it_was_interrupted(small_directory, tmp_path):
    stop = Counted()

    def interrupted(model, calibration, ratio):
        raise KeyboardInterrupt

    first = Counted()
    asked = tasks("first", "stop", ratios=(0.4, 0.5), seeds=2)
    with pytest.raises(KeyboardInterrupt):
        quality_helpers.laboratory(small_directory, tmp_path, {"first": first, "stop": interrupted}).run(asked)
    assert first.calls == [0.4, 0.5]
    lines = (tmp_path / "results" / "small.jsonl").read_text().splitlines()
    assert [json.loads(line)["method"] for line in lines] == [UNCOMPRESSED, "first", "first"]
    laboratory = quality_helpers.laboratory(small_directory, tmp_path, {"first": first, "stop": stop})
    assert len(laboratory.run(asked)) == 6
    assert (first.calls, stop.calls) == ([0.4, 0.5] * 2, [0.4, 0.5] * 2)
    assert laboratory.run(asked) == []
    assert {row.key.seed for row in Results(tmp_path / "results").rows.values()} == {0, 1}


def test_another_version_judge_or_number_of_samples_is_another_row(small_directory, tmp_path):
    method = Counted()
    laboratory = quality_helpers.laboratory(small_directory, tmp_path, {"method": method})
    laboratory.run(tasks("method"))
    other = laboratory.run([Task(Line("method", samples=2), 0.5, 0), Task(Line("method", source="out"), 0.5, 0)])
    assert {(row.key.samples, row.key.source) for row in other} == {(2, "calibration"), (4, "out")}
    assert len(method.calls) == 3
    method.version = 2
    assert method_version(method) == 2
    laboratory.run(tasks("method"))
    assert len(method.calls) == 4
    quality_helpers.laboratory(small_directory, tmp_path, {"method": method}, "test").run(tasks("method"))
    assert len(method.calls) == 5
    assert len(Results(tmp_path / "results").rows) == 7  # two of them uncompressed


def test_two_texts_judge_one_compressed_model(small_directory, tmp_path):
    method = Counted(0.5)
    first = quality_helpers.laboratory(small_directory, tmp_path, {"method": method}, "selection")
    alone = first.run(tasks("method"))
    both = quality_helpers.laboratory(small_directory, tmp_path, {"method": method}, "test", "selection")
    rows = both.run(tasks("method", ratios=(0.5, 0.6)))
    assert [(row.key.method, row.key.ratio, row.key.judge) for row in rows] == [
        (UNCOMPRESSED, 0.0, "test"),
        ("method", 0.5, "test"),  # the selection text's row was there
        ("method", 0.6, "test"),
        ("method", 0.6, "selection"),
    ]
    assert method.calls == [0.5, 0.5, 0.6]
    test, selection = rows[2:]
    assert (selection.rise_in, selection.rise_out) == (alone[1].rise_in, alone[1].rise_out)  # halving knows no ratio
    assert test.rise_in != selection.rise_in
    assert test.key.text_in.startswith("test.txt (")
    assert (test.bytes, test.seconds) == (selection.bytes, selection.seconds)


def test_calibration_follows_seed_samples_and_source(small_directory, tmp_path):
    laboratory = quality_helpers.laboratory(small_directory, tmp_path, {})
    first, again = (laboratory.calibration(0, 4, "calibration") for _ in range(2))
    assert sum(len(batch) for batch in first.batches) == 4
    assert all(torch.equal(a, b) for a, b in zip(first.batches, again.batches, strict=True))
    for other in (laboratory.calibration(1, 4, "calibration"), laboratory.calibration(0, 4, "out")):
        assert not torch.equal(first.batches[0], other.batches[0])
    assert (first.stats.merge, first.stats.left_gram, first.stats.num_tokens) == ("fisher", "full", 4 * 32)
    assert all(len(inputs.hidden_states) == 4 * 32 for inputs in first.inputs.values())


def test_a_failed_row_is_kept_with_its_sentence(small_directory, tmp_path):
    laboratory = quality_helpers.laboratory(small_directory, tmp_path, {"refuse": refuse, "overspend": overspend})
    _, refused, overspent = laboratory.run(tasks("refuse", "overspend"))
    assert refused.failure == "the Gram matrix must be definite, got -1."
    budget = byte_budget(laboratory.model, 0.5)
    assert overspent.failure == f"overspend must store at most {budget} bytes at ratio 0.5, got {budget + 1}."
    assert (refused.rise_in, refused.bytes) == (None, None)
    assert Results(tmp_path / "results").rows[refused.key] == refused
    assert laboratory.run(tasks("refuse", "overspend")) == []
    laboratory.methods = {"refuse": Counted(), "overspend": overspend}
    assert [row.failure for row in laboratory.run(tasks("refuse"), retry_failed=True)] == [None]


def test_damaged_results_are_refused(tmp_path):
    (tmp_path / "m.jsonl").write_text(quality_helpers.plain_row("m").to_json() + "\n{}\n")
    with pytest.raises(ValueError, match="--results must hold rows of a study, got line 2 of m.jsonl"):
        Results(tmp_path)


def test_tasks_are_those_of_the_parts():
    methods = all_methods()
    found = tasks_of(["merge"], None, 2, methods)
    assert len(found) == 2 * len(PARTS["merge"].lines) * len(PARTS["merge"].ratios)
    assert {task.ratio for task in tasks_of(["merge"], [0.3], 1, methods)} == {0.3}
    assert len(tasks_of(None, [0.5], 1, methods)) == sum(
        line.method not in RETIRED for part in PARTS.values() for line in part.lines
    )
    assert tasks_of(["retired"], None, 1, methods) == []
    for arguments, message in (
        ((["x"], None, 1, methods), "--part must be one of default, "),
        ((["merge"], None, 1, {}), "got merge without 'paper'."),
        ((["merge"], [1.0], 1, methods), "--ratio must lie between 0 and 1, got 1.0."),
        ((["merge"], None, 0, methods), "--seeds must be at least 1, got 0."),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            tasks_of(*arguments)


def test_tasks_of_some_methods():
    found = tasks_of(["merge"], None, 2, all_methods())
    chosen = of_methods(found, ["paper", "paper, mean"])
    assert {task.line.method for task in chosen} == {"paper", "paper, mean"}
    assert len(chosen) == 2 * 2 * len(PARTS["merge"].ratios)
    with pytest.raises(ValueError, match="--method must be a method of the parts that are run, got 'naee'."):
        of_methods(found, ["paper", "naee"])


def test_memory_growth_is_the_peak_of_the_step_alone():
    if not Path("/proc/self/clear_refs").exists():
        assert peak_growth(lambda: 1) == (1, None)
        return
    torch.ones(50_000_000)  # 200 MB before the step, freed again
    result, growth = peak_growth(lambda: float(torch.ones(20_000_000).sum()))
    assert result == 20_000_000
    assert 75e6 < growth < 120e6
    assert "cores" in describe_machine()
