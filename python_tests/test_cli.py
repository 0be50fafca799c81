"""``d2moe compress`` on a tiny random model: what it writes, and how the command refuses."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import cli_helpers
import pytest
import torch
from cli_helpers import QUICK, assert_refused, run, run_json
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from d2moe_ext.cli import common, main
from d2moe_ext.cli.output import complete_directory

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def model(tiny_directory):
    return tiny_directory


@pytest.fixture
def text(tiny_text):
    return tiny_text


@pytest.fixture
def compressed(compressed_directory):
    return compressed_directory


def test_help_and_usage_errors_need_no_torch():
    """The package itself is replaced by its bare path here: what is tried is what the command imports."""
    code = "import sys, types; package = types.ModuleType('d2moe_ext'); package.__path__ = [sys.argv[1]]; "
    code += "sys.modules['d2moe_ext'] = package; from d2moe_ext.cli import main; "
    code += "codes = [main(['--help']), main(['compress', '--help']), main(['compress', 'a', 'b'])]; "
    code += "print(codes, sorted({'torch', 'transformers'} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code, str(ROOT / "d2moe_ext")], capture_output=True, text=True, check=True)
    assert printed.stdout.splitlines()[-1] == "[0, 0, 2] []"
    assert "Missing option '--ratio'" in printed.stderr
    for command in ("compress", "eval", "plan", "inspect", "bench", "demo"):
        assert command in printed.stdout


def test_compress_writes_a_model_that_loads(compressed, model):
    names = {path.name for path in compressed.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "d2moe_report.json"} <= names
    report = json.loads((compressed / "d2moe_report.json").read_text())
    assert report["bytes_on_disk"] == (compressed / "model.safetensors").stat().st_size
    assert report["bytes_on_disk"] == pytest.approx(report["plan"]["bytes_after"], rel=0.005)
    assert report["calibration"]["samples"] == 6
    before = AutoModelForCausalLM.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(compressed)
    stored = sum(value.numel() for name, value in loaded.state_dict().items() if name != "lm_head.weight")
    assert stored == report["plan"]["stored_parameters"] <= 0.6 * before.num_parameters()
    assert not list(compressed.parent.glob(".*"))
    assert compressed.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_seed_decides_everything(model, text, tmp_path, capsys):
    outs = [tmp_path / name for name in ("a", "b", "c")]
    for out, seed in zip(outs, (1, 1, 2), strict=True):
        options = ("--ratio", 0.4, "--merge", "mean", "--calibration", text, "--seed", seed, *QUICK)
        assert run(capsys, "compress", model, out, *options)[0] == 0
    first, second, third = (out.joinpath("model.safetensors").read_bytes() for out in outs)
    assert first == second != third


def test_compress_prints_its_report(model, text, tmp_path, capsys):
    options = ("--ratio", 0.3, "--calibration", text, "--preset", "throughput", "--merge", "mean", "--no-fold", *QUICK)
    code, out, err = run(capsys, "compress", model, tmp_path / "out", *options)
    assert (code, err) == (0, "")
    for part in ("parameters stored", "parameters active per token", "on disk", "from the plan", "Relative error"):
        assert part in out


def test_compress_takes_every_option(model, text, tmp_path, capsys):
    options = ("--base-sparsity", 0.2, "--count", "paper", "--merge", "frequency", "--decomposition", "two_sided")
    options += (
        "--ranks",
        "global",
        "--joint-gate-up",
        "--alternations",
        2,
        "--dynamic-pruning",
        "--num-bases",
        2,
        "--dtype",
        "bfloat16",
        *QUICK,
    )
    options += ("--offload-folder", tmp_path / "sums")
    record = run_json(capsys, "compress", model, tmp_path / "out", "--ratio", 0.3, "--calibration", text, *options)
    assert record["config"] == {
        "ratio": 0.3,
        "preset": "quality",
        "base_sparsity": 0.2,
        "count": "paper",
        "merge": "frequency",
        "decomposition": "two_sided",
        "ranks": "global",
        "fold": True,
        "joint_gate_up": True,
        "gauge_fixed": True,
        "factor_dtype": "model",
        "alternations": 2,
        "dynamic_pruning": True,
        "sequential": False,
        "num_bases": 2,
    }
    described = run_json(capsys, "inspect", tmp_path / "out")
    assert set(described["layers"][0]["ranks"]) == {"gate_up", "down"}
    assert described["layers"][0]["num_bases"] == 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert any((tmp_path / "sums").iterdir())


def test_sequential_reads_the_calibration_text_again(model, text, tmp_path, capsys):
    options = ("--ratio", 0.4, "--calibration", text, "--base-sparsity", 0.2, "--alternations", 1, *QUICK)
    weights = {}
    for flag in ("--sequential", "--no-sequential"):
        record = run_json(capsys, "compress", model, tmp_path / flag, *options, flag)
        assert record["config"]["sequential"] is (flag == "--sequential")
        weights[flag] = (tmp_path / flag / "model.safetensors").read_bytes()
    assert weights["--sequential"] != weights["--no-sequential"]
    described = run_json(capsys, "inspect", tmp_path / "--sequential")
    assert set(described["layers"][0]["ranks"]) == {"gate_up", "down"}


@pytest.mark.parametrize("gauge", ["--gauge-fixed", "--whole-factors"])
def test_factors_of_eight_bits_take_the_planned_bytes(model, text, tmp_path, capsys, gauge):
    common_options = ("--ratio", 0.55, gauge, "--base-sparsity", 0.4, "--dtype", "bfloat16")
    options = (*common_options, "--factor-dtype", "int8")
    quick = ("--calibration", text, "--alternations", 1, *QUICK)
    record = run_json(capsys, "compress", model, tmp_path / "out", *options, *quick)
    assert record["config"]["factor_dtype"] == "int8"
    assert record["bytes_on_disk"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert record["bytes_on_disk"] == pytest.approx(record["plan"]["bytes_after"], rel=0.005)
    plan = run_json(capsys, "plan", model, *options)
    assert plan["bytes_after"] == pytest.approx(record["bytes_on_disk"], rel=0.01)
    plain = run_json(capsys, "plan", model, *common_options)
    assert plain["bytes_after"] == pytest.approx(plan["bytes_after"], rel=0.01)
    assert sum(plan["layers"][0]["ranks"]["down"]) > 1.3 * sum(plain["layers"][0]["ranks"]["down"])
    described = run_json(capsys, "inspect", tmp_path / "out")
    assert {layer["factor_dtype"] for layer in described["layers"]} == {"int8"}
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for layer in described["layers"]:
        held = [tensor for name, tensor in tensors.items() if name.startswith(layer["name"].replace("mlp", "block_sparse_moe"))]
        assert layer["bytes"] == sum(tensor.nbytes for tensor in held)
        assert {torch.int8, torch.int32, torch.bfloat16} == {tensor.dtype for tensor in held}


def test_without_a_text_python_is_the_calibration_text(model, tmp_path, capsys):
    record = run_json(capsys, "compress", model, tmp_path / "out", "--ratio", 0.4, "--samples", 1, "--merge", "mean")
    assert record["calibration"] == {"text": "python", "samples": 1, "seqlen": 128, "seed": 0}


def test_a_full_directory_is_replaced_only_when_asked(model, text, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    options = ("compress", model, out, "--ratio", 0.4, "--merge", "mean", "--calibration", text, *QUICK)
    assert_refused(run(capsys, *options), "OUT must be a new or empty directory unless --overwrite")
    assert [path.name for path in out.iterdir()] == ["precious.txt"]
    assert run(capsys, *options, "--overwrite")[0] == 0
    assert not (out / "precious.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("stage", ["d2moe_ext.calibration.calibrate", "d2moe_ext.hf.compress"])
@pytest.mark.parametrize("how", ["failure", "interrupt", "termination"])
def test_what_does_not_end_leaves_nothing(model, text, tmp_path, capsys, monkeypatch, stage, how):
    def end(*args, **options):
        assert list(tmp_path.iterdir())  # the directory being written is there, under another name
        if how == "failure":
            raise ValueError("the layer must be whole, got half of it")
        if how == "interrupt":
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(stage, end)
    options = ("--ratio", 0.4, "--merge", "mean", "--calibration", text, *QUICK)
    result = run(capsys, "compress", model, tmp_path / "out", *options)
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is handler
    if how == "failure":
        assert_refused(result, "the layer must be whole, got half of it")
    else:
        assert result[0] == 130
        assert result[2].split() == ["Interrupted."]


def test_a_directory_that_fails_halfway_is_deleted(tmp_path):
    def fail_halfway():
        with complete_directory(tmp_path / "out") as partial:
            (partial / "half.txt").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_halfway()
    assert not list(tmp_path.iterdir())


def test_a_fault_of_the_program_keeps_its_traceback(model, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("a fault")

    monkeypatch.setattr("d2moe_ext.calibration.calibrate", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        main(["compress", str(model), str(tmp_path / "out"), "--ratio", "0.4", *QUICK])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--ratio", "1.5"), ("ratio must lie between 0 and 1, got 1.5",)),
        (("--ratio", "much"), ("Invalid value for '--ratio'",)),
        (("--ratio", "0.97"), ("ratio must lie between 0 and 0.", "got 0.97")),
        (("--ratio", "0.4", "--merge", "mode"), ("--merge", "mode")),
        (("--ratio", "0.4", "--base-sparsity", "1"), ("base_sparsity must be at least 0 and below 1, got 1.0",)),
        (("--ratio", "0.4", "--decomposition", "plain", "--ranks", "global"), ("needs decomposition='two_sided'",)),
        (("--ratio", "0.4", "--calibration", "absent.txt"), ("--calibration must be a text file, got 'absent.txt'",)),
        (("--ratio", "0.4", "--samples", "0"), ("--samples must be at least 1, got 0",)),
        (("--ratio", "0.4", "--batch-size", "0"), ("--batch-size must be at least 1, got 0",)),
        (("--ratio", "0.4", "--seqlen", "1"), ("--seqlen must be at least 2 and at most 128", "got 1")),
        (("--ratio", "0.4", "--seqlen", "129"), ("--seqlen must be at least 2 and at most 128", "got 129")),
        (("--ratio", "0.4", "--num-bases", "9"), ("num_bases must be at most",)),
        (("--ratio", "0.4", "--device", "tpu"), ("--device must be cpu, cuda or cuda:N, got 'tpu'",)),
        (("--ratio", "0.4", "--device", "cuda:x"), ("--device must be cpu, cuda or cuda:N, got 'cuda:x'",)),
        (("--ratio", "0.4", "--device", "cuda:99"), ("--device must be a device that this machine and this torch have", "99")),
        (("--ratio", "0.4", "--folded"), ("--folded",)),
        (("--ratio", "0.4", "--preset", "performance", "--sequential"), ("sequential needs dynamic_pruning=False",)),
    ],
)
def test_compress_refuses(model, tmp_path, capsys, options, parts):
    assert_refused(run(capsys, "compress", model, tmp_path / "out", *options), *parts)
    assert not list(tmp_path.iterdir())


def test_compress_refuses_a_text_that_is_too_short_or_no_text(model, tmp_path, capsys):
    out, short, binary = tmp_path / "out", tmp_path / "short.txt", tmp_path / "binary.txt"
    short.write_text("three words only")
    binary.write_bytes(b"\xff\xfe\x00")
    options = ("compress", model, out, "--ratio", 0.4, "--seqlen", 128, "--calibration")
    assert_refused(run(capsys, *options, short), "--calibration must hold at least --seqlen=128 tokens, got ")
    assert_refused(run(capsys, *options, binary), "--calibration must be a UTF-8 text file", "binary.txt")
    assert not out.exists()


def test_models_that_cannot_be_read_are_refused(model, compressed, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("not a directory")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((model / "config.json").read_text())
    cut = tmp_path / "cut"
    cut.mkdir()
    for path in model.iterdir():
        content = path.read_bytes()
        (cut / path.name).write_bytes(content[: len(content) // 2] if path.suffix == ".safetensors" else content)

    def compress(source, out="out"):
        return run(capsys, "compress", source, tmp_path / out, "--ratio", 0.4)

    assert_refused(compress(tmp_path / "absent"), "MODEL must be a model directory or the name of a model on the hub")
    assert_refused(compress(tmp_path / "file"), "MODEL must be a model directory")
    assert_refused(compress(tmp_path / "empty"), "MODEL must be a directory with a config.json", "which has none")
    assert_refused(compress(broken), "model", "could not be loaded")
    assert_refused(compress(cut), "model", "could not be loaded")
    assert_refused(compress(compressed), "MODEL must be neither compressed nor quantized")
    assert_refused(compress(model, "file"), "OUT must be a directory", "which is a file")
    overwrite = run(capsys, "compress", model, model.parent, "--ratio", 0.4, "--overwrite")
    assert_refused(overwrite, "OUT must not hold the model that is read")


def test_a_dense_model_is_refused(tmp_path, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 300}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path / "dense")
    cli_helpers.tokenizer().save_pretrained(tmp_path / "dense")
    assert run(capsys, "compress", tmp_path / "dense", tmp_path / "out", "--ratio", 0.4)[0] == 2
    assert run(capsys, "plan", tmp_path / "dense", "--ratio", 0.4)[0] == 2


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ("ratio must lie between 0 and 1, got 2.0.", "ratio must lie between 0 and 1, got 2.0."),
        ("no file\n\nfound", "no file found."),
        ("It is not there. Try another.", "It is not there."),
        ("Is it v2.9.0 or e.g. older?", "Is it v2.9.0 or e.g. older?"),
    ],
)
def test_errors_are_cut_to_one_sentence(message, sentence):
    assert common.one_sentence(message) == sentence


def test_progress_draws_nothing_into_a_pipe(capsys):
    with common.progress_bar() as progress:
        progress("stage", 1, 2)
    assert capsys.readouterr().err == ""


def test_the_default_is_the_quality_preset_and_lands_where_the_plan_says(model, text, tmp_path, capsys):
    record = run_json(capsys, "compress", model, tmp_path / "out", "--ratio", 0.4, "--calibration", text, *QUICK)
    assert record["config"]["preset"] == "quality"
    assert record["config"]["base_sparsity"] is not None
    assert len(record["alternation_errors"]) == record["config"]["alternations"] > 0
    planned = run_json(capsys, "plan", model, "--ratio", 0.4)
    assert record["bytes_on_disk"] == pytest.approx(record["plan"]["bytes_after"], rel=0.005)
    assert record["plan"]["compressed_parameters"] == pytest.approx(planned["compressed_parameters"], rel=0.005)
    described = run_json(capsys, "inspect", tmp_path / "out")
    assert set(described["layers"][0]["ranks"]) == {"gate_up", "down"}
