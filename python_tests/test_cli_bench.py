"""``d2moe bench`` on a tiny random model and its compressed form."""

from __future__ import annotations

import pytest
from bench_helpers import ROW_FIELDS, measure_little
from cli_helpers import assert_refused, run, run_json

from d2moe_ext.bench import contenders as contenders_module


def test_bench_of_both_directories(tiny_directory, compressed_directory, monkeypatch, capsys):
    measure_little(monkeypatch)
    options = ("--tokens", 1, "--tokens", 5, "--seconds", 0.01)
    plain = run_json(capsys, "bench", tiny_directory, *options)
    assert plain["kind"] == "checkpoint"
    assert [row["tokens"] for row in plain["rows"]] == [1] * 5 + [5] * 5
    assert {row["shape"] for row in plain["rows"]} == {"model.layers.0.mlp.experts"}
    assert all(set(row) == ROW_FIELDS | {"shape"} for row in plain["rows"])
    compressed = run_json(capsys, "bench", compressed_directory, *options, "--layer", 1)
    assert [row["contender"] for row in compressed["rows"][:4]] == [
        "compressed, torch", "compressed", "compressed, dynamic, torch", "compressed, dynamic",
    ]  # fmt: skip
    assert {row["shape"] for row in compressed["rows"]} == {"model.layers.1.mlp.experts"}
    code, out, err = run(capsys, "bench", compressed_directory, "--tokens", 3, "--seconds", 0.01, "--dtype", "bfloat16")
    assert (code, err) == (0, "")
    assert "bfloat16, 3 tokens" in out


def test_bench_reports_a_wrong_output(tiny_directory, monkeypatch, capsys):
    measure_little(monkeypatch)
    monkeypatch.setattr(contenders_module, "_runner", lambda module, dynamic: lambda routed: 2 * module(*routed))
    code, out, err = run(capsys, "bench", tiny_directory, "--tokens", 1, "--seconds", 0.01)
    assert code == 1
    assert "uncompressed: wrong: differs from eager by 1.0e+00" in out
    assert [line.partition(" differs")[0] for line in err.splitlines()] == [
        "d2moe: uncompressed, torch, 1 tokens: wrong:",
        "d2moe: uncompressed, 1 tokens: wrong:",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layer", 2), "--layer must be in 0..1, the model's MoE layers, got 2."),
        (("--tokens", 0), "--tokens must be at least 1, got 0."),
        (("--repeats", 0), "--repeats must be at least 1, got 0."),
        (("--seconds", 0), "--seconds must be greater than 0, got 0.0."),
    ],
)
def test_bench_refuses(tiny_directory, capsys, options, message):
    assert_refused(run(capsys, "bench", tiny_directory, *options), message)


def test_bench_refuses_what_is_no_directory(capsys):
    assert_refused(run(capsys, "bench", "absent"), "DIR must be a model's directory, got 'absent'.")
