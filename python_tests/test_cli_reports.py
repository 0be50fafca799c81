"""``d2moe eval``, ``plan``, ``inspect`` and ``demo`` on a tiny random model."""

import json
from pathlib import Path

import pytest
from cli_helpers import assert_refused, run, run_json
from transformers import MixtralConfig

from d2moe_ext.cli import common
from d2moe_ext.cli.demo_job import METHODS, RATIOS, DemoSizes, run_demo


@pytest.fixture
def model(tiny_directory):
    return tiny_directory


@pytest.fixture
def text(tiny_text):
    return tiny_text


@pytest.fixture
def compressed(compressed_directory):
    return compressed_directory


def test_eval_of_both_models(model, compressed, text, capsys):
    options = ("--text", text, "--seqlen", 32, "--max-tokens", 200)
    before = run_json(capsys, "eval", model, *options)
    after = run_json(capsys, "eval", compressed, *options)
    assert before["tokens"] == after["tokens"] == 199
    assert (before["dynamic_pruning"], before["compressed"], before["native_operators"]) == (False, False, False)
    assert (after["dynamic_pruning"], after["compressed"], after["native_operators"]) == (True, True, True)
    assert after["batch_size"] == 1
    assert before["perplexity"] > 1
    assert after["perplexity"] > 1


def test_eval_with_and_without_native_operators_and_dynamic_pruning(model, compressed, text, capsys):
    options = ("--text", text, "--seqlen", 32, "--max-tokens", 100)
    native = run_json(capsys, "eval", compressed, *options)
    plain = run_json(capsys, "eval", compressed, *options, "--no-patch")
    # One float32 sum in another order per layer.
    assert native["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-4)
    assert plain["native_operators"] is False
    static = run_json(capsys, "eval", compressed, *options, "--no-dynamic")
    assert (static["dynamic_pruning"], static["batch_size"]) == (False, 8)
    original = run_json(capsys, "eval", model, *options)
    patched = run_json(capsys, "eval", model, *options, "--patch", "--stride", 32)
    assert patched["native_operators"] is True
    assert patched["perplexity"] == pytest.approx(original["perplexity"], rel=1e-4)


def test_eval_prints_a_table(model, text, capsys):
    code, out, err = run(capsys, "eval", model, "--text", text, "--seqlen", 32, "--stride", 16, "--max-tokens", 64)
    assert (code, err) == (0, "")
    assert "perplexity" in out
    assert "32, 16" in out


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--seqlen", 500), "--seqlen must be at least 2 and at most 128, the model's longest sequence, got 500"),
        (("--seqlen", 32, "--stride", 33), "stride must lie between 1 and window=32, got 33"),
        (("--max-tokens", 1), "--text must hold at least 2 tokens, got 1"),
        (("--batch-size", 0), "batch_size must be at least 1, got 0"),
    ],
)
def test_eval_refuses(model, text, capsys, options, part):
    assert_refused(run(capsys, "eval", model, "--text", text, *options), part)


def test_eval_refuses_a_missing_text(model, capsys):
    assert_refused(run(capsys, "eval", model), "--text")
    assert_refused(run(capsys, "eval", model, "--text", "absent.txt"), "--text must be a text file, got 'absent.txt'")


def test_plan_needs_no_weights_and_agrees_with_compress(model, compressed, tmp_path, capsys):
    alone = tmp_path / "config.json"
    alone.write_text((model / "config.json").read_text())
    options = ("--ratio", 0.4, "--preset", "performance")
    plan = run_json(capsys, "plan", alone, *options)
    report = json.loads((compressed / "d2moe_report.json").read_text())["plan"]
    for key in ("total_parameters", "compressed_parameters", "delta_share", "bytes_before", "bytes_after"):
        assert plan[key] == pytest.approx(report[key], rel=1e-3), key
    assert plan["bytes_before"] == pytest.approx((model / "model.safetensors").stat().st_size, rel=0.005)
    assert plan == run_json(capsys, "plan", model, *options)


@pytest.mark.parametrize(
    ("sparsity", "ratio", "preserved"),
    # Paper, Table 12: the share of the deltas that Mixtral-8x7B keeps, in percent.
    [(0.1, 0.2, 68.05), (0.1, 0.6, 26.62), (0.6, 0.2, 74.30), (0.6, 0.8, 12.18)],
)
def test_plan_of_mixtral_8x7b_is_the_papers_table(tmp_path, capsys, sparsity, ratio, preserved):
    MixtralConfig().save_pretrained(tmp_path)
    options = ("--ratio", ratio, "--base-sparsity", sparsity, "--count", "paper")
    plan = run_json(capsys, "plan", tmp_path / "config.json", *options)
    assert plan["total_parameters"] == 46_702_792_704
    assert 100 * plan["delta_share"] == pytest.approx(preserved, abs=0.05)


def test_plan_prints_tables_and_refuses(model, compressed, capsys):
    code, out, err = run(capsys, "plan", model, "--ratio", 0.4, "--dtype", "bfloat16")
    assert (code, err) == (0, "")
    assert "FLOPs per token" in out
    assert_refused(run(capsys, "plan", compressed, "--ratio", 0.4), "must be neither compressed nor quantized")
    assert_refused(run(capsys, "plan", model, "--ratio", 0), "ratio must lie between 0 and 1, got 0.0")
    assert_refused(run(capsys, "plan", "absent", "--ratio", 0.4), "must be a model directory")


def test_plan_counts_bytes_by_dtype(model, capsys):
    whole, half = (run_json(capsys, "plan", model, "--ratio", 0.4, "--dtype", dtype) for dtype in ("float32", "bfloat16"))
    assert whole["bytes_per_token_before"] == 2 * half["bytes_per_token_before"]


def test_inspect_reads_what_compress_wrote(compressed, capsys):
    record = run_json(capsys, "inspect", compressed)
    plan = json.loads((compressed / "d2moe_report.json").read_text())["plan"]
    assert record["parameters"] == plan["stored_parameters"]
    assert record["compression"]["ratio"] == 0.4
    for layer, planned in zip(record["layers"], plan["layers"], strict=True):
        assert {key: layer[key] for key in planned} == planned
    code, out, err = run(capsys, "inspect", compressed)
    assert (code, err) == (0, "")
    assert "model.layers" in out


def test_inspect_refuses_what_is_not_compressed(model, tmp_path, capsys):
    assert_refused(run(capsys, "inspect", model), "quantization_config")
    assert_refused(run(capsys, "inspect", tmp_path), "config.json")


@pytest.fixture(scope="module")
def demo(tiny_directory, tmp_path_factory):
    """The demo's result, what it reported on the way, and where it wrote."""
    calls, out = [], tmp_path_factory.mktemp("demo") / "demo-out"
    sizes = DemoSizes(window=32, calibration_windows=4, heldout_tokens=65, prefill_tokens=64, new_tokens=5)
    network, tokenizer = common.load_model(str(tiny_directory)), common.load_tokenizer(str(tiny_directory))
    result = run_demo(network, tokenizer, tiny_directory, out, lambda *call: calls.append(call), sizes)
    return result, calls, out


def test_the_demo_runs_the_whole_job(model, demo):
    result, calls, out = demo
    labels = [row.label for row in result.rows]
    assert labels == ["original", *(f"{ratio}: {method}" for ratio in RATIOS for method in METHODS)]
    original, *compressed = result.rows
    assert original.bytes_on_disk == (model / "model.safetensors").stat().st_size
    for row in result.rows:
        assert row.bytes_on_disk == pytest.approx(row.bytes_planned, rel=0.005)
        full = row.label.endswith(("original", "quality"))
        assert [value is not None for value in (row.prefill, row.generate, row.prompt, row.passage)] == [full] * 4
    for ratio, rows in zip(RATIOS, (compressed[:3], compressed[3:]), strict=True):
        target = (1 - ratio) * original.parameters
        assert all(0.995 * target <= row.parameters <= target for row in rows)
        assert rows[1].parameters == rows[2].parameters
    assert {path.name for path in out.iterdir()} == {Path(row.directory).name for row in compressed}
    assert result.tokens == 64
    stages = {stage for stage, _, _ in calls}
    assert {"Gram matrices", "original: evaluate", "0.6: mean + plain SVD: evaluate"} <= stages


def test_the_demo_prints_one_table_or_json(model, demo, capsys, monkeypatch):
    result, _, out = demo
    asked = []
    monkeypatch.setattr("d2moe_ext.cli.demo_job.run_demo", lambda *arguments: asked.append(arguments) or result)
    code, printed, err = run(capsys, "demo", "--model", model, "--out", out)
    assert (code, err) == (0, "")
    assert printed.count("Before and after compression") == 1
    for row in result.rows:
        assert row.label in printed
        assert f"{row.bytes_on_disk:,}" in printed
    assert run_json(capsys, "demo", "--model", model, "--out", out) == json.loads(json.dumps(result.to_dict()))
    assert [arguments[2:4] for arguments in asked] == [(model, out)] * 2


def test_the_demo_refuses_a_missing_model(capsys):
    assert_refused(run(capsys, "demo", "--model", "absent"), "MODEL must be a model directory", "got 'absent'")
