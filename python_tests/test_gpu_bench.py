"""What ``make gpu-bench`` measures, keeps and leaves; run on the CPU, with clocks and jobs that are made up."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import pytest
import torch

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import ceilings, jobs, layers, operators, part_calls, parts, whitened
from benchmarks.gpu.jobs import GpuLostError, Job, all_jobs, resume, run_jobs
from benchmarks.gpu.timing import GRAPH, L2Flush, Stopwatch
from benchmarks.performance.gpu import gpu_section
from benchmarks.performance.records import read_gpu_records
from d2moe_ext.bench.timing import Budget, wall_seconds
from tools import gpu_record

COMMIT = "0123abc"
CEILINGS = {"copy": 2e9, "read": 1e9, "read_by": "sum of float32", "bfloat16": 4e9, "float32": 1e9}


def replayed(runs):
    """As a graph does: the output is made when it is recorded."""
    return [partial(lambda output: output, run()) for run in runs]


@pytest.fixture
def watch(monkeypatch):
    """On the CPU, with few and small measurements."""
    monkeypatch.setattr(ceilings, "BYTES", 2**16)
    monkeypatch.setattr(ceilings, "PRODUCT", (8, 16, 32))
    monkeypatch.setattr(operators, "ROUNDS", 3)
    monkeypatch.setattr(operators, "TOKENS", 40)
    monkeypatch.setattr(operators, "FEATURES", 24)
    monkeypatch.setattr(operators, "WEIGHT", (24, 16))
    monkeypatch.setattr(layers, "BUDGET", Budget(3, 0.01, 3))
    return Stopwatch("cpu", L2Flush("cpu", 2**12), wall_seconds, wall_seconds, replayed, 2**34, fake_profiles)


def fake_profiles(subjects):
    """A kernel for each; the layers' is one of those that are parts."""
    call = [["void d2moe_ext::weighted_activation<8>(int)", 1.0, 5.0]]
    about = {"layer": "throughput 0.6, dynamic", "note": None, "calls": [call] * 3, "moved": {"weighted_activation": 100}}
    return [{"subject": subject} | about for subject in subjects]


def record_of(commit=COMMIT, torch_version="2.11"):
    gpu = {"name": "Some GPU", "capability": "9.0", "memory_bytes": 80, "driver": "1"}
    return {"kind": "gpu-bench", "date": "2026-01-31", "commit": commit, "gpu": gpu, "versions": {"torch": torch_version}}


def test_ceilings(watch):
    found = ceilings.measure_ceilings(watch)
    assert set(found) == set(CEILINGS)
    assert all(found[name] > 0 for name in found if name != "read_by")
    floors = ceilings.floors_from(CEILINGS)
    assert (floors.floors.bandwidth, floors.floors.bandwidth_by) == (2e9, "copy")
    assert ceilings.floors_from(CEILINGS | {"read": 3e9}).floors.bandwidth_by == "sum of float32"
    assert floors.runs("bfloat16") == {}


def test_operators(watch):
    rows = [operators.measure_operator(case, CEILINGS, watch) for case in operators.CASES]
    assert [row["note"] for row in rows] == [None] * len(rows)
    assert [row["operator"] for row in rows] == ["gram_update_", "fisher_merge_", *["column_select"] * 3]
    assert rows[0]["flops"] == 40 * 24 * 25
    assert rows[1]["bytes"] == 24 * 16 * (2 * 8 + 2 * 2)
    assert rows[2]["bytes"] == 4096 * 4096 * 2
    assert rows[1]["share"] == pytest.approx(rows[1]["bytes"] / 2e9 / (rows[1]["median_ms"] / 1e3))
    assert rows[-1]["share"] is None
    assert all(row["median_ms"] > 0 and row["rounds"] == 3 for row in rows)


def test_a_wrong_operator_is_not_timed(watch, monkeypatch):
    monkeypatch.setattr("d2moe_ext.ops.gram_update_", lambda gram, x: gram.add_(1.0))
    row = operators.measure_operator(operators.CASES[0], CEILINGS, watch)
    assert row["note"].startswith("wrong: differs from its reference by ")
    assert row["median_ms"] is None


def test_whitened_svd(watch, monkeypatch):
    row = whitened.measure_whitened_svd((2, 12, 8), watch)
    assert row["note"] is None
    assert row["error_over_best"] == pytest.approx(1.0, abs=1e-3)
    assert row["speedup"] == pytest.approx(row["loop_ms"] / row["median_ms"])
    svd = whitened.ops.whitened_svd
    # One component fewer than was asked for.
    monkeypatch.setattr(whitened.ops, "whitened_svd", lambda d, rank, *a, **k: svd(d, rank - 1, *a, **k))
    row = whitened.measure_whitened_svd((2, 12, 8), watch)
    assert row["note"].startswith("wrong: leaves out 1.")
    assert row["median_ms"] is None


@pytest.mark.usefixtures("tiny_shapes")
def test_layers(watch):
    held = layers.Layers(watch)
    for tokens in (1, 9):
        rows = held.measure(("Mixtral-8x7B", tokens), CEILINGS)
        by_name = {row["contender"]: row for row in rows}
        plain = ["eager", "grouped_mm", "batched_mm", "uncompressed"]
        assert list(by_name)[:4] == plain
        compressed = {f"{preset} {ratio}" for preset in layers.PRESETS for ratio in (0.4, 0.6)}
        assert compressed <= set(by_name)
        assert {"performance 0.4, loop", "throughput 0.6, loop", "throughput 0.6, dynamic"} <= set(by_name)
        graphs = {name.removesuffix(GRAPH) for name in by_name if name.endswith(GRAPH)}
        ours = {row["contender"] for row in rows if row["kind"] == "native" and not row["contender"].endswith(GRAPH)}
        assert graphs == ({"batched_mm", *ours} if tokens == 1 else set())
        assert all(row["note"] is None and row["median_ms"] > 0 for row in rows)
        assert {(row["shape"], row["tokens"], row["dtype"]) for row in rows} == {("Mixtral-8x7B", tokens, "bfloat16")}
        row = by_name["throughput 0.6"]
        assert row["floor_ms"] == pytest.approx(1e3 * max(row["bytes"] / 2e9, row["flops"] / 4e9), rel=0.1)
        assert "saved_ms" not in row
    assert by_name["batched_mm"]["bytes"] == by_name["eager"]["bytes"]


@pytest.mark.usefixtures("tiny_shapes")
def test_an_operator_without_a_kernel_gives_rows(watch, monkeypatch):
    def missing(*arguments):
        raise NotImplementedError("Could not run 'd2moe_ext::moe_forward' on this device.\nA long list follows.")

    made = layers.variant_contenders

    def without_kernel(*given):
        return [dataclasses.replace(c, run=missing) if c.kind == "native" else c for c in made(*given)]

    monkeypatch.setattr(layers, "variant_contenders", without_kernel)
    rows = layers.Layers(watch).measure(("Mixtral-8x7B", 1), CEILINGS)
    notes = {row["contender"]: row["note"] for row in rows}
    expected = "failed: Could not run 'd2moe_ext::moe_forward' on this device."
    assert notes["throughput 0.6"] == notes["throughput 0.6, dynamic, graph"] == expected
    assert notes["eager"] is None
    assert notes["performance 0.4, loop"] is None


def test_the_most_telling_rows_come_first(watch):
    names = [job.name for job in all_jobs(watch)]
    assert names[0] == "ceilings"
    wanted = [f"layer, {shape}, {tokens}" for shape in ("Mixtral-8x7B", "Qwen3-30B-A3B") for tokens in (1, 64, 4096)]
    assert [name for name in names if name.startswith("layer")][:6] == wanted
    assert len(set(names)) == len(names)
    assert sum(name.startswith("layer") for name in names) == 5 * len(layers.TOKENS)
    assert sum("whitened_svd" in name for name in names) == len(whitened.STACKS)
    found = ["part, low-rank products", "part, sparse base", "profile, Mixtral-8x7B", "profile, Qwen3-30B-A3B"]
    start = names.index(found[0])
    assert names[start - 1 : start + 4] == [wanted[-1], *found]


@pytest.mark.usefixtures("tiny_shapes")
def test_the_page_shows_what_is_measured(watch, monkeypatch, tmp_path):
    monkeypatch.setattr(whitened, "STACKS", ((2, 12, 8),))
    monkeypatch.setattr(operators, "CASES", operators.CASES[:2])
    monkeypatch.setattr(layers, "cells", lambda: [("Mixtral-8x7B", 1)])
    monkeypatch.setattr(layers, "FIRST_SHAPES", ("Mixtral-8x7B",))
    monkeypatch.setattr(parts, "ROUNDS", 3)
    monkeypatch.setattr(parts, "SHAPES", ("Mixtral-8x7B",))
    monkeypatch.setattr(parts, "RANKS", (32,))
    monkeypatch.setattr(part_calls, "PAIRS", 8)
    record = record_of() | {"rows": []}
    path = tmp_path / "gpu-bench-some-gpu.json"
    assert run_jobs(all_jobs(watch), record, path, lambda: 1e6, lambda name: None, lambda: None) == []
    text = gpu_section(read_gpu_records(tmp_path), tmp_path)
    assert "failed: grouped_product ran 0 times" in text  # as the made-up profiles have it
    assert text.count("failed") == 1 + len(parts.sparse_base_subjects())
    for line in ("| gram_update_, bfloat16", "| fisher_merge_, bfloat16", "| whitened_svd, float32, 2 of 12 x 8", "| eager |"):
        assert line in text
    assert "| 1 token, throughput 0.6: at least 1.5 times as fast as the best HF contender | Mixtral-8x7B |" in text
    assert "| throughput 0.4, dynamic, graph |" in text
    assert "| sparse base | Mixtral-8x7B, 16 tokens, 32 of 64 channels, 256 outputs |" in text
    assert "| low-rank products | Mixtral-8x7B, 8 pairs, 64 inputs, ranks 24 to 40, 256 outputs |" in text
    assert "| gated activation | Mixtral-8x7B, throughput 0.6, dynamic, 4,096 tokens | – | – | – | 5.00 |" in text
    assert "| `weighted_activation` | 1 · 5.00 · 100% |" in text


class Jobs:
    """Jobs by name and the seconds that they take on a clock of their own."""

    def __init__(self, limit=100.0, **seconds):
        self.now, self.limit, self.done = 0.0, limit, []
        self.jobs = [
            Job(name, "ceilings" if name == "ceilings" else "operator", s, self.measure(name, s)) for name, s in seconds.items()
        ]

    def measure(self, name, seconds):
        def run(found):
            assert found == {} if name == "ceilings" else found["copy"] == 1.0
            self.now += seconds
            self.done.append(name)
            return [{"copy": 1.0}] if name == "ceilings" else [{"a": 1}, {"a": 2}]

        return run

    def run(self, path, record, still_there=lambda: None):
        return run_jobs(self.jobs, record, path, lambda: self.limit - self.now, lambda name: None, still_there)


def started(path, **about):
    record = record_of(**about)
    record["rows"] = resume(path, record)
    return record


def test_what_was_measured_is_kept(tmp_path):
    path = tmp_path / "new" / "gpu-bench.json"
    first = Jobs(limit=30.0, ceilings=5, a=10, b=10, c=10)
    assert first.run(path, started(path)) == ["c"]
    assert first.done == ["ceilings", "a", "b"]
    rows = json.loads(path.read_text())["rows"]
    assert rows[0] == {"job": "ceilings", "table": "ceilings", "copy": 1.0}
    assert rows[1:3] == [{"job": "a", "table": "operator", "a": 1}, {"job": "a", "table": "operator", "a": 2}]
    second = Jobs(limit=30.0, ceilings=5, a=10, b=10, c=10)
    assert second.run(path, started(path)) == []
    assert second.done == ["c"]
    assert len(json.loads(path.read_text())["rows"]) == 7
    for other in ({"commit": "7654321"}, {"torch_version": "2.12"}):
        assert started(path, **other)["rows"] == []


def test_a_job_that_does_not_fit_is_not_begun(tmp_path):
    path = tmp_path / "gpu-bench.json"
    some = Jobs(limit=30.0, ceilings=5, long=40, short=10)
    assert some.run(path, started(path)) == ["long"]
    assert some.done == ["ceilings", "short"]


def test_a_job_is_expected_to_take_as_long_as_others_of_its_kind(tmp_path, monkeypatch):
    some = Jobs(limit=30.0, ceilings=1, a=15, b=15)
    some.jobs = [dataclasses.replace(job, seconds=1.0) for job in some.jobs]
    monkeypatch.setattr("time.monotonic", lambda: some.now)
    assert some.run(tmp_path / "a.json", started(tmp_path / "a.json")) == ["b"]
    assert some.done == ["ceilings", "a"]


def test_nothing_is_measured_without_ceilings(tmp_path):
    some = Jobs(limit=30.0, ceilings=40, a=10)
    assert some.run(tmp_path / "a.json", started(tmp_path / "a.json")) == ["ceilings", "a"]
    assert some.done == []

    def fails(found):
        raise RuntimeError("no memory")

    some.jobs[0] = Job("ceilings", "ceilings", 1.0, fails)
    with pytest.raises(RuntimeError, match="no memory"):
        some.run(tmp_path / "a.json", started(tmp_path / "a.json"))


def failing(some, message):
    def fails(found):
        raise RuntimeError(message)

    some.jobs[1] = dataclasses.replace(some.jobs[1], measure=fails)
    return some


def test_a_job_that_fails_has_a_row(tmp_path):
    path = tmp_path / "a.json"
    some = failing(Jobs(ceilings=1, a=1, b=1), "CUDA out of memory. Tried to\nallocate")
    assert some.run(path, started(path)) == []
    rows = json.loads(path.read_text())["rows"]
    assert rows[1] == {"job": "a", "table": "operator", "note": "failed: CUDA out of memory. Tried to"}
    assert some.done == ["ceilings", "b"]


def test_a_bug_of_a_job_does_not_end_the_run(tmp_path):
    some = Jobs(ceilings=1, a=1, b=1)
    some.jobs[1] = dataclasses.replace(some.jobs[1], measure=lambda found: found["no such entry"])
    record = started(tmp_path / "a.json")
    assert some.run(tmp_path / "a.json", record) == []
    assert record["rows"][1]["note"] == "failed: KeyError: 'no such entry'"
    assert some.done == ["ceilings", "b"]


def test_a_lost_gpu_ends_the_run_and_its_job_is_not_tried_again(tmp_path):
    path = tmp_path / "a.json"
    some = failing(Jobs(ceilings=1, a=1, b=1), "an illegal memory access was encountered")

    def lost():
        if "ceilings" in some.done and len(json.loads(path.read_text())["rows"]) == 1:
            raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(GpuLostError, match="must answer after a, but it failed: an illegal memory access"):
        some.run(path, started(path), lambda: lost() if path.is_file() else None)
    assert [row["job"] for row in json.loads(path.read_text())["rows"]] == ["ceilings", "a"]
    again = Jobs(ceilings=1, a=1, b=1)
    assert again.run(path, started(path)) == []
    assert again.done == ["b"]


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": []}'])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    path = tmp_path / "gpu-bench.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"gpu-bench.json must be a record of this benchmark, got something else\."):
        resume(path, record_of())


@pytest.fixture
def fake_gpu(monkeypatch, watch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(gpu_record, "describe_gpu", lambda: record_of()["gpu"])
    monkeypatch.setattr("benchmarks.gpu.timing.gpu_stopwatch", lambda: watch)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(run_jobs, "__defaults__", (lambda: None,))


def run_program(monkeypatch, *options):
    monkeypatch.setattr("sys.argv", ["gpu", *options])
    return program.main()


def test_program(fake_gpu, monkeypatch, tmp_path, capsys):
    wrong = {"a": {"contender": "x", "note": "wrong: differs"}, "b": {"note": None}}
    made = [Job("ceilings", "ceilings", 1.0, lambda found: [dict(CEILINGS)])]
    made += [Job(name, "layer", 5.0, lambda found, row=row: [row]) for name, row in wrong.items()]
    monkeypatch.setattr(jobs, "all_jobs", lambda watch: [made[0], made[2]])
    options = ["--results", str(tmp_path / "new"), "--commit", COMMIT]
    assert run_program(monkeypatch, *options, "--limit", "3") == 0
    assert "left for another run: b" in capsys.readouterr().out
    assert run_program(monkeypatch, *options, "--started", "0") == 0
    assert "left for another run: b" in capsys.readouterr().out
    assert run_program(monkeypatch, *options) == 0
    assert "s: b" in capsys.readouterr().out
    monkeypatch.setattr(jobs, "all_jobs", lambda watch: made)
    assert run_program(monkeypatch, *options) == 1
    assert "a: x wrong: differs" in capsys.readouterr().err
    (file,) = (tmp_path / "new").iterdir()
    assert file.name == "gpu-bench-some-gpu.json"
    assert [row["job"] for row in json.loads(file.read_text())["rows"]] == ["ceilings", "b", "a"]


def test_program_ends_where_the_gpu_is_lost(fake_gpu, monkeypatch, tmp_path, capsys):
    def lost(*arguments):
        raise GpuLostError("The GPU must answer after a, got nothing.")

    monkeypatch.setattr(jobs, "run_jobs", lost)
    assert run_program(monkeypatch, "--results", str(tmp_path), "--commit", COMMIT) == 1
    assert capsys.readouterr().err == "gpu_bench: The GPU must answer after a, got nothing.\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--results must name a folder, got ''."),
        (["--results", "r"], "--commit must be 7 to 40 hexadecimal digits, got ''."),
        (["--results", "r", "--commit", COMMIT, "--limit", "0"], "--limit must be greater than 0, got 0.0."),
        (["--results", "r", "--commit", COMMIT], "torch must find a GPU, got none with torch "),
    ],
)
def test_bad_input(options, message, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run_program(monkeypatch, *options) == 2
    assert capsys.readouterr().err.startswith(f"gpu_bench: {message}")
