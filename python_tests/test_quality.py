"""The quality study: what methods are given and may spend, its texts, and its command."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import quality_helpers
import tiny_models
import torch
from torch import nn

from benchmarks.quality import __main__ as command_line
from benchmarks.quality import texts
from benchmarks.quality.methods import package_method, round_stored, stored_bytes
from benchmarks.quality.package_methods import _within_budget
from benchmarks.quality.texts import USES, domain_text, outside_text, parse_texts
from benchmarks.study import Calibration, byte_budget, capture_inputs, model_parameters, stored
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
def calibration(model):
    batches = list(torch.randint(3, 200, (4, 32), generator=torch.Generator().manual_seed(0)).split(2))
    stats = calibrate(model, batches, merge="fisher", left_gram="full")
    return Calibration(batches, stats, capture_inputs(model, batches, find_experts(model)))


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
