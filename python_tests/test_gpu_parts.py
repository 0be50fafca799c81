"""The parts of a forward that ``make gpu-bench`` measures: its calls run here at small sizes, its profiles are made up."""

from __future__ import annotations

import json
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks.gpu import part_calls, parts, profiled, profiles
from benchmarks.gpu.moved import moved_bytes
from benchmarks.gpu.part_calls import LowRankSize, low_rank_call, low_rank_cost, sparse_base_call
from benchmarks.gpu.profiled import Targets, measured_layers, profile_subject, write_profiles
from benchmarks.gpu.profiles import KernelRun, kernel_runs, profile_calls, profile_elsewhere, summary
from benchmarks.gpu.timing import L2Flush, Stopwatch
from d2moe_ext.bench.timing import wall_seconds
from tools.limited_run import Ran

CEILINGS = {"copy": 2e9, "read": 1e9, "read_by": "sum of float32", "bfloat16": 4e9, "float32": 1e9}
SMALL = LowRankSize(tokens=12, top_k=2, experts=4, inputs=10, outputs=14, rank=8)


def replayed(runs):
    return [partial(lambda output: output, run()) for run in runs]


def stopwatch(profile):
    return Stopwatch("cpu", L2Flush("cpu", 2**12), wall_seconds, wall_seconds, replayed, 2**34, profile)


def found(subject, calls, layer=None, moved=None):
    return {"subject": subject, "layer": layer, "note": None, "calls": calls, "moved": moved or {}}


def call_of(*runs):
    """A call of kernels that follow each other, from names and microseconds."""
    made, now = [], 100.0
    for name, duration in runs:
        made.append([name, now, duration])
        now += duration + 1.0
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_rank_call_is_the_references(dtype):
    call = low_rank_call(SMALL, "cpu", dtype)
    limit = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert call.error() < limit
    x, index = call.arguments["hidden_states"], call.arguments["top_k_index"]
    # What is no low-rank product is the base's only column.
    bare = partial(torch.zeros_like, call.arguments["delta_u"][0])
    base = low_rank_call(SMALL, "cpu", dtype)
    base.arguments["delta_u"] = [bare()]
    outer = x[:, :1] @ call.arguments["gate_up_base"][0].T
    torch.testing.assert_close(base.run(), outer.repeat_interleave(2, dim=0), rtol=limit, atol=limit)
    # Experts' own rows, ragged around the rank.
    assert SMALL.ranks == [6, 7, 9, 10]
    assert call.arguments["delta_u_start"][0].tolist() == call.arguments["delta_v_start"][0].tolist() == [0, 6, 13, 22]
    assert call.arguments["delta_u"][0].shape == (32, 14)
    assert call.arguments["delta_v"][0].shape == (32, 10)
    assert index.shape == (12, 2)


def test_low_rank_cost_by_hand():
    # Expert 0 (rank 6) has two pairs, expert 3 (rank 10) one; experts 1 and 2 none.
    size = LowRankSize(tokens=3, top_k=1, experts=4, inputs=10, outputs=14, rank=8)
    cost = low_rank_cost(size, torch.tensor([[0], [3], [0]]), 2)
    assert cost.flops == 2 * (2 * 6 + 1 * 10) * (10 + 14)
    assert cost.bytes == 2 * (3 * 10 + (6 + 10) * (10 + 14) + 3 * 14)


def test_low_rank_sizes_of_the_models():
    sizes = [part_calls.low_rank_size(shape, 256) for shape in parts.SHAPES]
    assert sizes == [LowRankSize(4096, 2, 8, 4096, 2 * 14336, 256), LowRankSize(1024, 8, 128, 2048, 2 * 768, 256)]
    assert [(min(size.ranks), max(size.ranks), sum(size.ranks) / size.experts) for size in sizes] == [(192, 320, 256.0)] * 2


@pytest.mark.parametrize("tokens", [1, 4, 16])
@pytest.mark.parametrize("keep", [24, 12])
def test_sparse_base_call_is_the_references(tokens, keep):
    call = sparse_base_call(tokens, keep, 24, 40, "cpu", torch.float32)
    assert call.error() < 1e-6
    assert call.arguments["gate_up_base"].stride(1) == 1
    assert call.run().shape == (tokens, 40)
    assert call.dynamic == (keep == 12) == ("choice" in call.contains)
    whole = sparse_base_call(tokens, 24, 24, 40, "cpu", torch.float32)
    assert torch.equal(whole.run(), call.run()) == (keep == 24)
    assert call.cost.bytes == 4 * (keep * 40 + tokens * 24)
    assert call.cost.flops == 2 * tokens * keep * 40


def test_rows_of_calls(monkeypatch):
    monkeypatch.setattr(parts, "ROUNDS", 3)
    calls = {"low-rank products": low_rank_call(SMALL, "cpu")}
    for keep in (24, 12):
        calls[keep] = sparse_base_call(4, keep, 24, 40, "cpu")
    monkeypatch.setattr(parts, "part_call", lambda subject, device: calls[subject.get("keep", subject["what"])])
    low_rank = {"what": "low-rank products", "shape": "Mixtral-8x7B", "rank": 8}
    sparse = [{"what": "sparse base", "shape": "Mixtral-8x7B", "channels": 24, "tokens": 4, "keep": keep} for keep in (24, 12)]
    own = [("zeros", 9.0), ("grouped_product<V>", 10.0), ("sort_rows", 9.0), ("grouped_product<U>", 30.0)]

    def profile(subjects):
        return [found(subjects[0], [call_of(*own)] * 3), *[found(subject, [call_of(*own[:2])]) for subject in subjects[1:2]]]

    rows = parts.measure_calls([low_rank, *sparse], CEILINGS, stopwatch(profile))
    assert all(row["note"] is None and row["call_us"] > 0 for row in rows)
    assert (rows[0]["own_us"], rows[0]["own_each_us"], rows[0]["own_note"]) == (40.0, [10.0, 30.0], None)
    assert rows[0]["own_share"] == pytest.approx(rows[0]["flops"] / 4e9 / 40e-6)
    assert rows[0]["call_share"] == pytest.approx(rows[0]["flops"] / 4e9 / (rows[0]["call_us"] / 1e6))
    assert rows[0]["floor_us"] == pytest.approx(1e6 * max(rows[0]["flops"] / 4e9, rows[0]["bytes"] / 2e9))
    assert rows[0]["case"] == "24 pairs, 10 inputs, ranks 6 to 10, 14 outputs"
    assert rows[1]["own_note"] == "failed: grouped_product ran 1 times a call in the profile, not 2"
    assert rows[2]["own_note"] == "failed: not profiled"
    assert rows[1]["call_share"] == pytest.approx(rows[1]["bytes"] / 2e9 / (rows[1]["call_us"] / 1e6))
    assert (rows[1]["over_all"], rows[2]["over_all"]) == (None, rows[2]["call_us"] / rows[1]["call_us"])
    assert [row["case"] for row in rows[1:]] == [f"4 tokens, {keep} of 24 channels, 40 outputs" for keep in (24, 12)]
    assert not {"own_launches", "launches"} & {name for row in rows for name in row}
    json.dumps(rows)


def test_only_the_bases_own_product_counts(monkeypatch):
    monkeypatch.setattr(parts, "ROUNDS", 3)
    monkeypatch.setattr(parts, "part_call", lambda subject, device: sparse_base_call(1, 24, 24, 40, device))
    subject = {"what": "sparse base", "shape": "x", "channels": 24, "tokens": 1, "keep": 24}
    calls = [call_of(("grouped_product", time), ("grouped_product", 99.0)) for time in (4.0, 6.0, 5.0)]
    (row,) = parts.measure_calls([subject], CEILINGS, stopwatch(lambda subjects: [found(subject, calls)]))
    assert (row["own_us"], row["own_each_us"]) == (5.0, [5.0])
    assert row["own_share"] == pytest.approx(row["bytes"] / 2e9 / 5e-6)


def test_a_call_that_fails_or_is_wrong_is_a_row(monkeypatch):
    def broken(subject, device):
        if subject["tokens"] == 1:
            raise RuntimeError("out of memory\nmore")
        return sparse_base_call(4, 24, 24, 40, device)

    monkeypatch.setattr(parts, "part_call", broken)
    monkeypatch.setattr(part_calls.reference, "moe_gate_up_forward", lambda **arguments: torch.ones(4, 40))
    subjects = [{"what": "sparse base", "shape": "x", "channels": 24, "tokens": tokens, "keep": 24} for tokens in (1, 4)]
    rows = parts.measure_calls(subjects, CEILINGS, stopwatch(lambda subjects: []))
    assert rows[0]["note"] == "failed: out of memory"
    assert rows[1]["note"].startswith("wrong: differs from its reference by ")
    assert [(row["call_us"], row["own_us"], row["own_note"]) for row in rows] == [(None, None, None)] * 2


def test_subjects():
    assert [(s["shape"], s["rank"]) for s in parts.low_rank_subjects()] == [(s, r) for s in parts.SHAPES for r in (256, 512)]
    sparse = parts.sparse_base_subjects()
    assert [(s["tokens"], s["keep"]) for s in sparse] == [(t, keep) for t in (1, 4, 16) for keep in (4096, 2048)]
    assert sorted(s["tokens"] for s in parts.layer_subjects("x")) == [1, 16, 64, 512, 4096]


@pytest.fixture
def layers(tiny_shapes):
    """Hidden 64, intermediate 128, 8 experts of which a token takes 2."""
    return measured_layers("Mixtral-8x7B", "cpu")


def test_moved_bytes_by_hand(layers):
    index = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7], [0, 7]])
    plain, compressed = (moved_bytes(module, index) for module in layers.values())
    ids, pairs, lists = 5 * 2 * 8, 10, 8 * 4
    activation = ids + pairs * 4 + pairs * 3 * 128 * 2
    sort = ids + pairs * 4 + 9 * 4
    # A base for each expert: its rows are pairs, and there are neither sums nor deltas.
    combine = ids + lists + (10 + 5) * 64 * 2
    assert plain == {"weighted_activation": activation, "combine_tokens": combine, "sort_rows": sort}
    # One base: a row for each token, the deltas' for each pair.
    combine, sums = ids + lists + (5 + 10 + 5) * 64 * 2, ids + lists + (10 + 5) * 128 * 2
    expected = {"weighted_activation": activation, "combine_tokens": combine, "base_sums": sums, "sort_rows": sort}
    assert compressed == expected
    assert "sort_rows" not in moved_bytes(layers["uncompressed"], index[:4])


def test_moved_bytes_of_shared_bases(layers):
    module = next(module for name, module in layers.items() if name != "uncompressed")
    module.spec = SimpleNamespace(layout=module.spec.layout, deltas={}, down=SimpleNamespace(num_bases=2))
    module.down_expert_to_base = torch.tensor([0, 1] * 4, dtype=torch.int32)
    # The first token's experts share base 0, the second's have one each: three rows.
    index = torch.tensor([[0, 2], [1, 4]])
    assert moved_bytes(module, index)["base_sums"] == 4 * 8 + 8 * 4 + (4 + 3) * 128 * 2
    assert moved_bytes(module, index)["combine_tokens"] == 4 * 8 + 8 * 4 + (3 + 2) * 64 * 2


def test_layers_run_as_they_are_loaded(layers):
    assert list(layers) == ["uncompressed", "throughput 0.6, dynamic"]
    assert all(module.backend == "native" and module.dynamic for module in layers.values())


@pytest.mark.usefixtures("tiny_shapes")
def test_profiles_of_layers(tmp_path):
    subjects = [{"what": "layer", "shape": "Mixtral-8x7B", "tokens": tokens} for tokens in (1, 6)]
    shapes_run = []

    def profile(run):
        shapes_run.append(tuple(run().shape))
        return [[KernelRun("sort_rows", 1.0, 2.0)]] * 2

    write_profiles(subjects, tmp_path / "found", Targets("cpu"), profile)
    lines = [json.loads(line) for line in (tmp_path / "found").read_text().splitlines()]
    assert [line["subject"] for line in lines] == [subjects[0]] * 2 + [subjects[1]] * 2
    assert [line["layer"] for line in lines] == ["uncompressed", "throughput 0.6, dynamic"] * 2
    assert shapes_run == [(1, 64)] * 2 + [(6, 64)] * 2
    assert lines[0]["calls"] == [[["sort_rows", 1.0, 2.0]]] * 2
    assert "base_sums" in lines[3]["moved"]


def test_a_profile_that_fails_is_a_line_and_others_follow(monkeypatch):
    monkeypatch.setattr(profiled, "low_rank_size", lambda shape, rank: SMALL)
    subject = {"what": "low-rank products", "shape": "x", "rank": 8}

    def fails(run):
        raise RuntimeError("CUPTI_ERROR\nmore")

    (line,) = profile_subject(subject, Targets("cpu"), fails)
    assert line == {"subject": subject, "layer": None, "note": "failed: CUPTI_ERROR"}
    (line,) = profile_subject(subject, Targets("cpu"), lambda run: [[], []])
    assert line["note"] == "failed: the profiler saw no kernel"
    (line,) = profile_subject({"what": "something"}, Targets("cpu"), fails)
    assert "got 'something'" in line["note"]
    sparse = {"what": "sparse base", "shape": "Mixtral-8x7B", "tokens": 1, "keep": 2048}
    monkeypatch.setattr(profiled, "sparse_base_call", lambda *given: sparse_base_call(1, 2, 4, 6, "cpu"))
    (line,) = profile_subject(sparse, Targets("cpu"), lambda run: [[run().shape]])
    assert line["note"] is None


def answer(monkeypatch, text, code=0, output=""):
    """A profiling process that leaves ``text``."""

    def run(command, folder, seconds, environment):
        assert command[:3] == [sys.executable, "-m", "benchmarks.gpu.profiled"]
        assert seconds == profiles.SECONDS
        with open(command[4], "w") as file:
            file.write(text(json.loads(command[3])))
        return Ran(code, output, 1.0)

    monkeypatch.setattr(profiles, "run_limited", run)


def test_a_profiling_process_that_dies_leaves_what_it_had(monkeypatch):
    first, second = {"what": "layer", "tokens": 1}, {"what": "layer", "tokens": 64}

    def text(subjects):
        assert subjects == [first, second]
        return json.dumps(found(first, [])) + "\n" + '{"subject": {"wh'

    answer(monkeypatch, text, -11, "a line\nSegmentation fault\n")
    entries = profile_elsewhere([first, second])
    assert entries[0] == found(first, [])
    note = "failed: the profiling process: exit code -11; a line; Segmentation fault"
    assert entries[1:] == [{"subject": second, "layer": None, "note": note}]


def test_a_profiling_process_without_a_gpu():
    """A real one; what stops it is said."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (entry,) = profile_elsewhere([{"what": "layer", "shape": "Mixtral-8x7B", "tokens": 1}])
    assert entry["note"].startswith("failed: the profiling process: exit code 1;")


def event(name, start, duration, device=DeviceType.CUDA, annotation=False):
    interval = SimpleNamespace(start=start, elapsed_us=lambda: duration)
    return SimpleNamespace(name=name, device_type=device, is_user_annotation=annotation, time_range=interval)


def test_what_a_profiler_saw(monkeypatch):
    events = [event("b", 5.0, 2.0), event("launch", 0.0, 9.0, DeviceType.CPU), event("a", 1.0, 3.0)]
    events.append(event("range", 0.0, 9.0, annotation=True))
    assert kernel_runs(events) == [KernelRun("a", 1.0, 3.0), KernelRun("b", 5.0, 2.0)]
    order = []

    class Session:
        def __init__(self, activities):
            assert [activity.name for activity in activities] == ["CUDA"]

        def __enter__(self):
            order.append("session")
            return self

        def __exit__(self, *error):
            order.append("end")

        def events(self):
            return events

    monkeypatch.setattr(profiles, "profile", Session)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    calls = profile_calls(lambda: order.append("run"), lambda: order.append("flush"), calls=2)
    assert calls == [kernel_runs(events)] * 2
    assert order == ["flush", "wait", "session", "run", "wait", "end"] * 3


def test_summary_by_hand():
    calls = [call_of(("a", 10.0), ("b", 4.0), ("a", 20.0)), call_of(("a", 12.0), ("b", 6.0), ("a", 22.0))]
    result = summary(calls)
    assert (result["forwards"], result["busy_us"], result["span_us"]) == (2, 37.0, 39.0)
    assert result["kernels"] == [
        {"name": "a", "calls": 2, "us": 32.0, "share": 32 / 37},
        {"name": "b", "calls": 1, "us": 5.0, "share": 5 / 37},
    ]


def test_rows_of_profiles():
    moved = {"sort_rows": 100, "weighted_activation": 4000, "base_sums": 6000}
    call = call_of(("void d2moe::weighted_activation<8>(x)", 4.0), ("void d2moe::sort_rows(x)", 3.0))

    def profile(subjects):
        lost = {"subject": subjects[-1], "layer": None, "note": "failed: lost"}
        return [found(subject, [call] * 3, "plain", moved) for subject in subjects[:-1]] + [lost]

    rows = parts.measure_profiles("Mixtral-8x7B", CEILINGS, stopwatch(profile))
    profiles_of = [row for row in rows if row["table"] == "profile"]
    assert [(row["tokens"], row["note"]) for row in profiles_of] == [
        *((tokens, None) for tokens in (64, 4096, 1, 16)), (512, "failed: lost")
    ]  # fmt: skip
    assert profiles_of[0]["busy_us"] == 7.0
    by_part = {(row["part"], row["tokens"]): row for row in rows if row["table"] == "part"}
    assert {tokens for _, tokens in by_part} == {64, 4096}
    sort, gated = by_part["routing", 64], by_part["gated activation", 4096]
    assert (sort["own_us"], sort["own_share"], sort["bytes"]) == (3.0, None, 100)
    assert (gated["own_us"], gated["layer"], gated["case"]) == (4.0, "plain", "weighted_activation")
    assert gated["own_share"] == pytest.approx(4000 / 2e9 / 4e-6)
    sums = by_part["gate-weighted sum for the base", 64]
    assert (sums["own_us"], sums["own_note"]) == (None, "failed: no kernel of this name in the profile")
