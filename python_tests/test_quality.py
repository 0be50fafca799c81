"""The quality study: what methods are given and may spend, and that rows are measured once and never lost."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
from pathlib import Path

import cli_helpers
import numpy as np
import pytest
import quality_helpers
import tiny_models
import torch
from torch import nn

from benchmarks.quality import __main__ as command_line
from benchmarks.quality import texts
from benchmarks.quality.machine import describe_machine, peak_growth
from benchmarks.quality.methods import all_methods, package_method, round_stored, stored_bytes
from benchmarks.quality.package_methods import _within_budget
from benchmarks.quality.parts import PARTS, Line
from benchmarks.quality.results import UNCOMPRESSED, Results
from benchmarks.quality.retired import RETIRED
from benchmarks.quality.runner import Task, of_methods, tasks_of
from benchmarks.quality.texts import USES, domain_text, outside_text, parse_texts
from benchmarks.study import Calibration, byte_budget, capture_inputs, method_version, model_parameters, stored
from d2moe_ext.adapters import find_experts
from d2moe_ext.calibration import calibrate
from d2moe_ext.cli.common import load_model
from d2moe_ext.compress import compress_experts
from d2moe_ext.config import CompressionConfig
from d2moe_ext.evaluate import compressed_experts, prunes_dynamically


@pytest.fixture(scope="module")
def model(tiny_directory):
    return load_model(str(tiny_directory), "float32")


@pytest.fixture(scope="module")
def small_directory(tmp_path_factory):
    """One layer of three experts, where only the study itself is looked at."""
    sizes = {"num_hidden_layers": 1, "num_local_experts": 3, "hidden_size": 32, "intermediate_size": 48}
    return cli_helpers.save_model(tmp_path_factory.mktemp("model") / "small", **sizes)


@pytest.fixture(scope="module")
def calibration(model):
    batches = list(torch.randint(3, 200, (4, 32), generator=torch.Generator().manual_seed(0)).split(2))
    stats = calibrate(model, batches, merge="fisher", left_gram="full")
    return Calibration(batches, stats, capture_inputs(model, batches, find_experts(model)))


def tasks(*methods, ratios=(0.5,), seeds=1):
    return [Task(Line(method), ratio, seed) for seed in range(seeds) for method in methods for ratio in ratios]


# what methods are given


@pytest.mark.parametrize("family", ["mixtral", "phimoe", "gpt_oss", "deepseek_v3", "list_moe"])
def test_captured_inputs_are_what_experts_and_router_saw(family):
    model, batches = tiny_models.tiny_model(family), [tiny_models.token_ids(0), tiny_models.token_ids(1)]
    before = [tiny_models.logits(model, ids) for ids in batches]
    captured = capture_inputs(model, batches, find_experts(model), max_tokens=30)
    for view in find_experts(model):
        router = getattr(view.block, "gate", None) or view.block.router
        seen, called = [], []
        handles = [view.block.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0].flatten(0, -2)))]
        if family != "list_moe":
            handles.append(view.module.register_forward_pre_hook(lambda m, args, called=called: called.append(args)))
        for ids in batches:
            tiny_models.logits(model, ids)
        for handle in handles:
            handle.remove()
        inputs = captured[view.name]
        x = torch.cat(seen)[:30]
        logits = nn.functional.linear(x, router.weight, getattr(router, "bias", None))
        tiny_models.assert_close(inputs.router_logits, logits)
        tiny_models.assert_close(inputs.hidden_states, x)
        if family == "list_moe":
            weights, index = logits.softmax(-1).topk(2)
        else:
            index, weights = (torch.cat([args[place] for args in called])[:30] for place in (1, 2))
        tiny_models.assert_close(inputs.top_k_weights, weights)
        assert torch.equal(inputs.top_k_index, index)
        assert (inputs.top_k_index.dtype, inputs.hidden_states.dtype) == (torch.int64, torch.float32)
    assert all(torch.equal(tiny_models.logits(model, ids), out) for ids, out in zip(batches, before, strict=True))


def test_capture_refuses_a_block_without_router_or_logits():
    model, batches = tiny_models.tiny_model("mixtral"), [tiny_models.token_ids()]
    views = find_experts(model)
    block, router = views[1].block, views[1].block.gate

    class OnlyIds(nn.Module):
        def forward(self, x):
            return router(x)[2]

    block.gate = OnlyIds()
    with pytest.raises(
        ValueError, match=r"router of model.layers.1.mlp.experts must return logits \[T, 6\] first, got .*int64"
    ):
        capture_inputs(model, batches, views)
    del block.gate
    with pytest.raises(ValueError, match="must have a router named gate or router, got MixtralSparseMoeBlock without one"):
        capture_inputs(model, batches, views)


# what methods may spend


def test_stored_keeps_eight_bits_of_the_mantissa():
    x = torch.tensor([1 + 2**-7, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-9, -3.14159265, 0.0, 1e-30])
    mantissa, exponent = np.frexp(x.double().numpy())
    nearest_even = np.round(mantissa * 2**8) * 2.0**-8  # numpy rounds halves to even, as bfloat16 does
    np.testing.assert_array_equal(stored(x).double().numpy(), np.ldexp(nearest_even, exponent))
    assert stored(x).dtype == torch.float32


def test_budget_counts_the_whole_model_and_tied_weights_once(model):
    embedding, layers = 300 * 64, 2
    attention = 64 * 64 * 2 + 64 * 32 * 2
    experts = 8 * 3 * 64 * 96
    total = embedding + layers * (attention + experts + 8 * 64 + 2 * 64) + 64
    assert model_parameters(model) == total
    assert byte_budget(model, 0.6) == 2 * math.floor(0.4 * total)


@pytest.mark.parametrize("options", [{}, {"preset": "performance", "base_sparsity": 0.3}, {"joint_gate_up": False}])
@pytest.mark.parametrize("ratio", [0.3, 0.45, 0.6])
def test_package_bytes_are_the_tensors_and_within_the_budget(model, calibration, options, ratio):
    compressed = copy.deepcopy(model)
    size = package_method(**options)(compressed, calibration, ratio)
    tensors = {t.data_ptr(): t for t in compressed.state_dict().values() if t.numel()}.values()
    assert size == sum(t.numel() * (4 if t.dtype == torch.int32 else 2) for t in tensors)
    assert 0.99 * byte_budget(model, ratio) <= size <= byte_budget(model, ratio)


def test_an_index_counts_four_bytes(model, calibration):
    """A budget that float-sized indices would just meet is not overrun by real ones."""
    compressed = copy.deepcopy(model)
    package_method(base_sparsity=0.3)(compressed, calibration, 0.5)
    indices = sum(t.numel() for m in compressed_experts(compressed) for t in m.state_dict().values() if t.dtype == torch.int32)
    at_the_edge = 1 - (stored_bytes(compressed) / 2 - indices) / model_parameters(model) - 1e-9
    again = copy.deepcopy(model)
    assert package_method(base_sparsity=0.3)(again, calibration, at_the_edge) <= byte_budget(model, at_the_edge)
    assert stored_bytes(compressed) > byte_budget(model, at_the_edge)


def test_package_method_is_compression_then_rounding(model, calibration):
    compressed, expected = copy.deepcopy(model), copy.deepcopy(model)
    package_method(preset="performance")(compressed, calibration, 0.5)
    assert prunes_dynamically(compressed)
    compress_experts(expected, calibration.stats, CompressionConfig(0.5 + 1e-3, preset="performance"))
    for mine, other in zip(compressed_experts(compressed), compressed_experts(expected), strict=True):
        assert mine.backend == "native"
        base = mine.down_base
        assert torch.equal(base, other.down_base.bfloat16().float())
        assert not torch.equal(base, other.down_base)
        # eq. 9 with what is stored
        torch.testing.assert_close(mine.down_column_norms, base.norm(dim=1), rtol=1e-6, atol=0)
    assert all(torch.equal(p, p.bfloat16().float()) for p in compressed.parameters())


@pytest.mark.parametrize("options", [{"preset": "performance", "merge": "fisher_frequency"}, {"num_bases": 2}])
def test_options_with_other_statistics_take_them_from_the_same_sequences(model, calibration, options):
    compressed, expected = copy.deepcopy(model), copy.deepcopy(model)
    size = package_method(**options)(compressed, calibration, 0.4)
    left = None if "preset" in options else "diagonal"
    taken = {"merge": options.get("merge", "frequency"), "num_bases": options.get("num_bases", 1), "left_gram": left}
    stats = calibrate(expected, calibration.batches, **taken)
    compress_experts(expected, stats, _within_budget(expected, CompressionConfig(0.4, **options)))
    round_stored(expected)
    for mine, other in zip(compressed_experts(compressed), compressed_experts(expected), strict=True):
        assert torch.equal(mine.gate_up_base, other.gate_up_base)
    assert size <= byte_budget(model, 0.4)
    # Another calibration must not be served by what was kept of this one.
    short = Calibration(calibration.batches[:1], calibration.stats, {})
    again = copy.deepcopy(model)
    package_method(**options)(again, short, 0.4)
    pairs = zip(compressed_experts(compressed), compressed_experts(again), strict=True)
    assert not all(torch.equal(a.down_delta_u, b.down_delta_u) for a, b in pairs)


# rows


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


# texts


def test_uses_share_no_text(tmp_path):
    sources = quality_helpers.write_texts(tmp_path)
    thirds = [outside_text(sources, use) for use in USES]
    assert "".join(text.content for text in thirds) == Path(sources["out"]).read_text()
    assert all(text.content.endswith("\n") for text in thirds[:2])
    assert max(len(text.content) for text in thirds) - min(len(text.content) for text in thirds) < 100
    assert len({text.label for text in thirds}) == 3
    python = {use: domain_text({use: "python"}, use).content for use in USES}
    heldout = texts._heldout()
    for text in heldout.values():
        assert (text in python["selection"]) != (text in python["test"])
    assert len(python["selection"]) + len(python["test"]) == sum(map(len, heldout.values())) + 2 * (len(heldout) - 2)
    # Not sorted by name: one kind would come first, and a study reads the first tokens only.
    places = [python["test"].index(text) for _, text in sorted(heldout.items()) if text in python["test"]]
    assert places != sorted(places)
    assert outside_text({"out": "headers"}, "test").content.count("namespace c10") > 5


def test_texts_are_asked_for_by_their_use(tmp_path):
    assert parse_texts(["test=a=b", "out=python"]) == {"test": "a=b", "out": "python"}
    for option in ("train=a", "test", "test="):
        with pytest.raises(ValueError, match=f"at most once, got '{option}'"):
            parse_texts([option])
    with pytest.raises(ValueError, match="as selection=FILE, got test"):
        domain_text({"test": "x"}, "selection")
    with pytest.raises(ValueError, match="as out=FILE, got none"):
        outside_text({}, "test")


# the command


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["quality", *map(str, arguments)])
    return command_line.main()


def test_command_runs_a_part_writes_the_page_and_resumes(tiny_directory, tmp_path, monkeypatch, capsys):
    given = [word for use, path in quality_helpers.write_texts(tmp_path).items() for word in ("--text", f"{use}={path}")]
    sizes = ("--samples", 4, "--seqlen", 32, "--tokens", 128, "--window", 32, "--results", tmp_path / "rows")
    what = ("--part", "default", "--ratio", 0.5, "--seeds", 1)
    page = tmp_path / "docs" / "quality.md"
    assert run(monkeypatch, "--model", tiny_directory, *given, *sizes, *what, "--write", page) == 0
    assert "3 rows measured, 0 of them failed" in capsys.readouterr().err
    assert run(monkeypatch, "--model", tiny_directory, *given, *sizes, *what) == 0
    assert "0 rows measured" in capsys.readouterr().err
    written = page.read_text()
    assert str(tmp_path) not in written
    assert "--text calibration=calibration.txt" in written
    before = {file.name: file.read_bytes() for file in (tmp_path / "docs").rglob("*.*")}
    assert "rise_tiny.png" in before
    page.unlink()
    assert run(monkeypatch, *sizes, "--write", page) == 0
    assert {file.name: file.read_bytes() for file in (tmp_path / "docs").rglob("*.*")} == before


def test_command_refuses_in_one_sentence(tiny_directory, tmp_path, monkeypatch, capsys):
    given = [word for use, path in quality_helpers.write_texts(tmp_path).items() for word in ("--text", f"{use}={path}")]
    for arguments, message in (
        ([], "--model or --write must be given, got neither."),
        (["--model", tmp_path], "--model must be a directory with a config.json, got "),
        (
            ["--model", tiny_directory, "--seqlen", 32, "--window", 32],
            "--text must give a text for calibration as calibration=FILE, got none.",
        ),
        (["--model", tiny_directory, "--seqlen", 32, "--window", 256], "--window must be at least 2 and at most 128"),
        (["--model", tiny_directory, "--seqlen", 32, "--window", 32, *given], "--tokens must be at most"),
        (["--results", tmp_path, "--write", tmp_path / "x.md"], "--write needs rows judged by the selection text"),
        (["--judge", "other"], "'other' is not one of 'selection', 'test'"),
    ):
        assert run(monkeypatch, *arguments) == 2
        err = capsys.readouterr().err
        assert err.startswith("quality: ")
        assert message in err
        assert err.count("\n") == 1


def test_command_says_that_a_row_failed(tiny_directory, tmp_path, monkeypatch, capsys):
    given = [word for use, path in quality_helpers.write_texts(tmp_path).items() for word in ("--text", f"{use}={path}")]
    sizes = ("--samples", 4, "--seqlen", 32, "--tokens", 128, "--window", 32, "--results", tmp_path / "rows")
    # Nothing this small can lose 99 % of its parameters.
    what = ("--part", "default", "--ratio", 0.99, "--seeds", 1)
    assert run(monkeypatch, "--model", tiny_directory, *given, *sizes, *what) == 1
    assert "failed: ratio must lie between 0 and" in capsys.readouterr().err
