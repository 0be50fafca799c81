"""Whole models timed: a tiny one end to end in processes of its own, and what is said of wrong ones."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import transformers

from benchmarks.model import command, measure, worker
from benchmarks.model.checkpoints import CONTENDERS, RANDOM_CONFIG, random_model
from benchmarks.model.measure import MEASURED, Sizes, WorkerError, measure_model
from benchmarks.model.worker import generate

SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
SIZES = Sizes(prefill_1=16, prefill_16=8, prompt=4, new_tokens=2)


def contenders(*names):
    return [contender for contender in CONTENDERS if contender.name in names]


def test_a_tiny_model_end_to_end():
    said = []
    names = ["eager", "patched plain", "throughput 0.6, dynamic"]
    rows = measure_model("random", "bfloat16", contenders(*names), 1, SIZES, said.append, SMALL)
    assert [row["contender"] for row in rows] == names
    for row in rows:
        assert (row["model"], row["dtype"], row["passes"], row["note"], row["failed"]) == ("random", "bfloat16", 1, "", False)
        assert all(row[key] > 0 for key in MEASURED)
        assert row["generate_1_vs_best_hf"] == pytest.approx(row["generate_1"] / rows[0]["generate_1"])
        assert row["load_peak_mb"] <= row["peak_mb"]
    assert rows[2]["disk_mb"] < rows[0]["disk_mb"]
    assert any("check" in line for line in said)


def test_a_wrong_contender_is_not_timed(monkeypatch):
    ran = []

    def run(job):
        ran.append((job["implementation"], job["check"]))
        return {"note": "wrong: far off"} if job["check"] else dict.fromkeys(MEASURED, 2.0) | {"note": ""}

    monkeypatch.setattr(measure, "run_job", run)
    rows = measure_model("random", "bfloat16", contenders("eager", "patched plain"), 2, SIZES, lambda line: None, SMALL)
    assert ran == [(None, True), ("eager", False), ("eager", False)]
    assert [row["failed"] for row in rows] == [False, True]
    assert rows[1]["note"] == "wrong: far off"
    assert rows[1]["generate_1"] is None
    assert rows[1]["generate_1_vs_best_hf"] is None


@pytest.mark.parametrize("variant", [None, ("throughput", 0.6)])
def test_a_wrong_operator_is_noticed(variant, tmp_path, monkeypatch):
    random_model(transformers.Qwen3MoeConfig(**{**RANDOM_CONFIG, **SMALL}), torch.float32, variant).save_pretrained(tmp_path)
    job = {"directory": str(tmp_path), "dtype": "float32", "sizes": {"prompt": 8}, "tokens": list(range(8))}
    assert worker.check(job)["note"] == ""
    right = worker.D2MoEExperts.forward

    def forward(self, *arguments):
        return right(self, *arguments) * (1.01 if self.backend == "native" else 1.0)

    monkeypatch.setattr(worker.D2MoEExperts, "forward", forward)
    assert worker.check(job)["note"].startswith("wrong (all columns): its logits differ from the reference's by")


def test_a_process_that_fails_is_one_sentence(tmp_path):
    job = {"directory": str(tmp_path), "dtype": "bfloat16", "implementation": "eager", "check": False, "sizes": {}}
    with pytest.raises(WorkerError) as error:
        measure.run_job(job)
    assert len(str(error.value).splitlines()) == 1


def test_command(monkeypatch, capsys, tmp_path):
    row = {"model": "shipped", "dtype": "bfloat16", "contender": "eager", "note": "failed: it did.", "failed": True}
    numbers = dict.fromkeys([*MEASURED, "generate_1_vs_best_hf"])
    monkeypatch.setattr(measure, "measure_model", lambda *arguments: [row | numbers])
    file = tmp_path / "model.json"
    arguments = ["bench_model", "--model", "shipped", "--write", str(file)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--json"])
    assert command.main() == 1
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert record == json.loads(file.read_text())
    assert record["kind"] == "model"
    assert {"machine", "command", "date", "rows"} <= record.keys()
    assert "shipped, bfloat16, eager: failed: it did." in err
    monkeypatch.setattr(sys, "argv", arguments)
    assert command.main() == 1
    assert "eager" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--model", "x"], ["--dtype", "x"], ["--repeats", "0"], ["--contender", "nobody"]])
def test_bad_input_is_one_sentence(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_model", *arguments])
    assert command.main() == 2
    assert capsys.readouterr().err.startswith(f"bench_model: {arguments[0]} must be")


@pytest.mark.parametrize("variant", [None, ("quality", 0.4), ("throughput", 0.6)])
def test_random_models_are_finite_and_generate(variant):
    config = transformers.Qwen3MoeConfig(**{**RANDOM_CONFIG, **SMALL})
    model = random_model(config, torch.float32, variant)
    ids = torch.arange(6).view(2, 3)
    logits = model(input_ids=ids).logits
    assert logits.isfinite().all()
    assert 0.1 < logits.std() < 10
    assert generate(model, ids, 5).shape == (2, 8)
