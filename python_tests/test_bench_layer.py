"""Contenders of one layer: that they agree, that a wrong one is not timed, and what a row says."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
import torch
from bench_helpers import FLOORS, ROW_FIELDS, measure_little, quick_setting
from tiny_models import compress_exactly, tiny_model

from benchmarks.layer import command, growth, shapes, sweep
from benchmarks.layer.fill import compressed_experts, fill_, plain_experts
from d2moe_ext.adapters import find_experts
from d2moe_ext.bench.contenders import as_stored, compressed_contenders, expert_loop, make_inputs, plain_contenders
from d2moe_ext.bench.layer import measure_cell, relative_error, tolerance, wrong_rows
from d2moe_ext.bench.record import make_record, shown_command
from d2moe_ext.bench.timing import SLOW, Budget, quartiles, time_contenders, time_rounds
from d2moe_ext.experts import D2MoEExperts


@pytest.fixture
def view():
    return find_experts(tiny_model("mixtral"))[0]


def inputs_of(view, tokens=5, dtype=torch.float32):
    return make_inputs(view.layout, 2, tokens, dtype)


def by_name(rows):
    return {row["contender"]: row for row in rows}


def test_rows_of_a_layer(view):
    module = compress_exactly(view, pruned=4, dynamic=4)
    runs = plain_contenders(view, torch_too=True) + compressed_contenders(module, "some 0.4", loop=True, torch_too=True)
    rows = by_name(measure_cell(runs, inputs_of(view), quick_setting()))
    plain = ["eager", "grouped_mm", "batched_mm", "uncompressed, torch", "uncompressed"]
    compressed = ["some 0.4, torch", "some 0.4, loop", "some 0.4", "some 0.4, dynamic, torch", "some 0.4, dynamic"]
    assert list(rows) == plain + compressed
    for row in rows.values():
        assert set(row) == ROW_FIELDS
        assert row["note"] is None
        assert (row["tokens"], row["dtype"], row["threads"]) == (5, "float32", 1)
        assert row["rounds"] == 3
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert row["share_of_floor"] == pytest.approx(row["floor_ms"] / row["median_ms"])
        assert row["floor_ms"] >= 1e3 * row["bytes"] / FLOORS.bandwidth * 0.99
    best = rows["eager"]["best_hf"]
    assert rows[best]["speed_over_hf"] == 1.0
    assert rows[best]["median_ms"] == min(rows[name]["median_ms"] for name in plain[:3])
    assert rows["uncompressed"]["relative_error"] < 1e-5
    assert rows["eager"]["relative_error"] is None
    assert rows["some 0.4, dynamic"]["bytes"] < rows["some 0.4"]["bytes"]
    assert [name for name, row in rows.items() if row["saved_ms"] is not None] == compressed[3:]
    json.dumps(list(rows.values()), allow_nan=False)


def test_a_wrong_output_is_reported_and_not_timed(view):
    runs = plain_contenders(view)
    calls = []

    def wrong(routed):
        calls.append(1)
        return 1.1 * runs[-1].run(routed)

    rows = measure_cell([*runs[:-1], dataclasses.replace(runs[-1], run=wrong)], inputs_of(view), quick_setting())
    assert calls == [1]
    assert rows[-1]["note"].startswith("wrong: differs from eager by 1.0e-01, more than ")
    assert rows[-1]["median_ms"] is None
    assert rows[-1]["floor_ms"] > 0
    assert wrong_rows(rows) == [rows[-1]]
    assert all(row["median_ms"] for row in rows[:-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tolerance(dtype):
    torch.manual_seed(0)
    expected = torch.randn(64, 64)
    assert relative_error(expected.to(dtype), expected) < tolerance(dtype, dynamic=False) < tolerance(dtype, dynamic=True) < 0.2
    assert relative_error(expected * float("nan"), expected) == float("inf")


def test_batched_mm_is_skipped_where_its_weights_do_not_fit(view):
    per_pair = 3 * view.layout.hidden_size * view.layout.intermediate_size * 4
    runs = plain_contenders(view, batched_limit=10 * per_pair)
    few, many = (by_name(measure_cell(runs, inputs_of(view, tokens), quick_setting())) for tokens in (5, 6))
    assert few["batched_mm"]["note"] is None
    assert many["batched_mm"]["note"] == "skipped: gathers 0.0 GiB of weights, more than 0.0 GiB"
    assert many["batched_mm"]["median_ms"] is None
    assert not wrong_rows(list(many.values()))


def test_an_implementation_that_fails_is_noted(view):
    def fails(routed):
        raise RuntimeError("not for this machine")

    runs = plain_contenders(view)
    runs[1] = dataclasses.replace(runs[1], run=fails)
    rows = measure_cell(runs, inputs_of(view), quick_setting())
    assert rows[1]["note"] == "failed: not for this machine"
    broken = dataclasses.replace(runs[-1], run=fails)
    with pytest.raises(RuntimeError, match="not for this machine"):
        measure_cell([runs[0], broken], inputs_of(view), quick_setting())


def test_each_implementation_runs_and_the_configuration_is_left_as_it_was(view, monkeypatch):
    seen = []
    forward = type(view.module).forward
    monkeypatch.setattr(
        type(view.module), "forward", lambda self, *a: (seen.append(self.config._experts_implementation), forward(self, *a))[1]
    )
    before = view.module.config._experts_implementation
    for contender in plain_contenders(view)[:3]:
        contender.run(inputs_of(view)[0])
    assert seen == ["eager", "grouped_mm", "batched_mm"]
    assert view.module.config._experts_implementation == before


def test_a_list_of_experts():
    view = find_experts(tiny_model("list_moe"))[0]
    rows = measure_cell(plain_contenders(view, torch_too=True), inputs_of(view), quick_setting())
    assert [row["contender"] for row in rows] == ["expert list", "uncompressed, torch", "uncompressed"]
    assert all(row["note"] is None for row in rows)


def test_the_loop_refuses_factors_that_the_paper_does_not_have(view):
    spec = compress_exactly(view).spec
    gauge_fixed = D2MoEExperts(dataclasses.replace(spec, gauge_fixed=True), view, dtype=torch.float32)
    with pytest.raises(ValueError, match="expert_loop needs gated experts with whole floating factors"):
        expert_loop(gauge_fixed)


def test_as_stored_keeps_its_layout(view):
    module = compress_exactly(view, pruned=4, dynamic=4)
    twin = as_stored(module)
    module.set_backend("native")
    assert twin.backend == "torch"
    assert twin.gate_up_base.is_contiguous()
    assert twin.down_delta_u.data_ptr() == module.down_delta_u.data_ptr()
    twin.dynamic = False
    assert module.dynamic


def test_rounds():
    assert Budget(30, 10.0, 3).rounds(1.0, 3) == 9
    assert Budget(30, 10.0, 3).rounds(100.0, 3) == 3
    assert Budget(30, 10.0, 3).rounds(1e-9, 3) == 30
    assert Budget(1, 10.0, 3).rounds(1.0, 3) == 1
    order = []
    runs = {name: lambda given, name=name: order.append((name, given)) for name in "ab"}
    seconds = time_rounds(runs, [0, 1], 3, lambda: order.append("flush"))
    calls = [call for call in order if call != "flush"]
    assert calls == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 0), ("b", 0)]
    assert order[::2] == ["flush"] * 6
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0]) == (1.5, 2.0, 2.5)


def test_a_slow_contender_takes_no_rounds_from_the_others():
    calls = []

    def busy(name, seconds):
        def run(given):
            calls.append((name, given))
            until = time.perf_counter() + seconds
            while time.perf_counter() < until:
                pass

        return run

    runs = {"quick": busy("quick", 1e-3), "slow": busy("slow", 2 * SLOW * 1e-3)}
    seconds = time_contenders(runs, [0, 1, 2], Budget(9, 1.0, 3), lambda: None, {"gauge": busy("gauge", 1e-2)})
    assert {name: len(times) for name, times in seconds.items()} == {"quick": 9, "slow": 3, "gauge": 9}
    assert [given for name, given in calls if name == "quick"] == [0, 1, 2] * 3
    assert [given for name, given in calls if name == "slow"] == [0, 1, 2]
    once = time_contenders(runs, [0, 1, 2], Budget(1, 1.0, 3), lambda: None, {})
    assert {name: len(times) for name, times in once.items()} == {"quick": 1, "slow": 1}


def test_shown_command_names_no_folder_of_this_machine(tmp_path):
    assert shown_command("d2moe", ["bench", str(tmp_path / "a b"), "--tokens", "1"]) == "d2moe bench 'a b' --tokens 1"
    made = make_record("layer", [], FLOORS, "x")
    assert set(made) == {"kind", "machine", "command", "date", "versions", "floors", "rows"}


def test_shapes_are_those_of_the_published_models():
    totals = {"Mixtral-8x7B": 46.7, "Phi-3.5-MoE": 41.9, "DeepSeek-MoE-16B": 16.4, "Qwen1.5-MoE-A2.7B": 14.3}
    for shape, billions in (totals | {"Qwen3-30B-A3B": 30.5}).items():
        assert round(shapes.shapes_of(shape).total_parameters / 1e9, 1) == billions
    layout = shapes.layer_view("DeepSeek-MoE-16B").layout
    assert (layout.hidden_size, layout.intermediate_size, layout.num_experts) == (2048, 1408, 64)
    assert [shapes.top_k_of(shape) for shape in shapes.SHAPES] == [2, 2, 6, 4, 8]
    plan = shapes.layer_plan("Qwen3-30B-A3B", "quality", 0.6)
    spec = shapes.spec_of(plan, shapes.layer_view("Qwen3-30B-A3B"))
    assert spec.gauge_fixed
    assert spec.delta_order == ("gate_up", "down")
    assert spec.gate_up.keep == spec.gate_up.kept


def test_groups_fit_into_memory():
    shape, variants = "Qwen3-30B-A3B", list(shapes.VARIANTS)
    plain, first = sweep.shape_bytes(shape, 4), sweep.variant_bytes(shape, variants[0], 4)
    assert plain == 128 * 3 * 2048 * 768 * 4
    assert sweep.groups_of(shape, variants, 4, 2**40) == [variants]
    assert sweep.groups_of(shape, variants, 4, plain) == [[variant] for variant in variants]
    assert sweep.groups_of(shape, variants[:3], 4, plain + 2 * first + first // 10)[0] == variants[:2]
    assert sweep.groups_of(shape, [], 4, plain) == [[]]


def test_sweep(tiny_shapes):
    lines = []
    wanted = sweep.Sweep(["Mixtral-8x7B"], ["bfloat16"], [1, 9])
    cells = list(sweep.measure_sweep(wanted, quick_setting(), lines.append))
    assert lines == [f"Mixtral-8x7B, bfloat16, {count} tokens: 16 contenders" for count in (1, 9)]
    rows = [row for cell in cells for row in cell]
    assert len(rows) == 32
    assert not wrong_rows(rows)
    names = [row["contender"] for row in cells[0]]
    assert {"eager", "performance 0.4, loop", "throughput 0.6, dynamic", "quality 0.4"} <= set(names)
    assert {(row["preset"], row["ratio"]) for row in rows} == {(None, None), *shapes.VARIANTS}
    assert {row["shape"] for row in rows} == {"Mixtral-8x7B"}


def test_sweep_of_some_contenders(tiny_shapes):
    wanted = sweep.Sweep(["Mixtral-8x7B"], ["float32"], [3], ["grouped_mm", "throughput 0.6"], memory=1)
    (rows,) = list(sweep.measure_sweep(wanted, quick_setting(), lambda line: None))
    names = [row["contender"] for row in rows]
    assert names == ["grouped_mm", "throughput 0.6, loop", "throughput 0.6", "throughput 0.6, dynamic"]
    assert {row["best_hf"] for row in rows} == {"grouped_mm"}


def test_growth(monkeypatch):
    monkeypatch.setattr(growth, "SWEEPS", {"tokens": (1, 4), "rank": (8, 16)})
    start = growth.Size(tokens=4, experts=4, rank=8, hidden_size=32, intermediate_size=24, top_k=2)
    rows = [row for cell in growth.measure_growth(["float32"], quick_setting(), print, start) for row in cell]
    assert [(row["swept"], row["value"], row["contender"]) for row in rows] == [
        ("tokens", 1, "compressed"), ("tokens", 1, "uncompressed"),
        ("tokens", 4, "compressed"), ("tokens", 4, "uncompressed"),
        ("rank", 8, "compressed"), ("rank", 16, "compressed"),
    ]  # fmt: skip
    fits = growth.exponents(rows)
    assert [(fit["contender"], fit["swept"]) for fit in fits] == [
        ("compressed", "tokens"), ("uncompressed", "tokens"), ("compressed", "rank"),
    ]  # fmt: skip
    assert all(0 < fit["floor"] < 1.1 for fit in fits)


def test_an_exponent_beyond_the_floors_is_flagged():
    assert growth.slope([1, 2, 4], [5, 20, 80]) == pytest.approx(2.0)
    rows = [
        {"dtype": "float32", "contender": c, "swept": "rank", "value": n, "median_ms": n**power, "floor_ms": float(n)}
        for c, power in (("fast", 1.05), ("slow", 1.2))
        for n in (1, 2, 8)
    ]
    assert [(fit["contender"], fit["flagged"]) for fit in growth.exponents(rows)] == [("fast", False), ("slow", True)]


def test_command(tiny_shapes, monkeypatch, tmp_path, capsys):
    measure_little(monkeypatch)
    file, image = tmp_path / "new" / "layer.json", tmp_path / "layer.png"
    options = [
        "--shape",
        "Mixtral-8x7B",
        "--dtype",
        "float32",
        "--tokens",
        "2",
        "--contender",
        "grouped",
        "--contender",
        "quality",
        "--seconds",
        "0.01",
    ]
    monkeypatch.setattr("sys.argv", ["bench_layer", *options, "--write", str(file), "--plot", str(image), "--json"])
    assert command.main() == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(file.read_text())
    assert printed["kind"] == "layer"
    assert [row["contender"] for row in printed["rows"]] == ["grouped_mm", "quality 0.4", "quality 0.6"]
    assert str(tmp_path) not in file.read_text()
    assert image.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("sys.argv", ["bench_layer", *options])
    assert command.main() == 0
    assert "quality 0.6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "Llama"], "--shape must be one of Mixtral-8x7B, "),
        (["--dtype", "float64"], "--dtype must be one of bfloat16, float32, got 'float64'."),
        (["--tokens", "0"], "--tokens must be at least 1, got 0."),
        (["--repeats", "0"], "--repeats must be at least 1, got 0."),
        (["--seconds", "0"], "--seconds must be greater than 0, got 0.0."),
        (["--colour"], "No such option"),
    ],
)
def test_command_refuses(options, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench_layer", *options])
    assert command.main() == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"bench_layer: {message}")
    assert printed.err.count("\n") == 1


def test_random_layers(view):
    weight = torch.empty(300, 200)
    fill_(weight, 0.5)
    assert float(weight.std()) == pytest.approx(0.5, rel=0.02)
    shape = shapes.layer_view("Qwen3-30B-A3B")
    assert shape.module.gate_up_proj.is_meta
    plain = plain_experts(view, torch.bfloat16)
    assert plain.module.down_proj.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32
    spec = dataclasses.replace(compress_exactly(view, num_bases=2, pruned=4).spec)
    rank = spec.deltas["gate"].u_rows // view.layout.num_experts
    filled = compressed_experts(spec, {name: [rank // 2] * view.layout.num_experts for name in spec.delta_order}, torch.float32)
    assert filled(*inputs_of(view)[0]).isfinite().all()


def test_command_for_growth(monkeypatch, tmp_path, capsys):
    measure_little(monkeypatch)
    small = growth.Size(tokens=4, experts=4, rank=8, hidden_size=32, intermediate_size=24, top_k=2)
    monkeypatch.setattr(growth, "SWEEPS", {"rank": (8, 16)})
    monkeypatch.setattr(growth, "START", small)
    image = tmp_path / "growth.png"
    options = ["--growth", "--dtype", "float32", "--seconds", "0.01", "--plot", str(image)]
    monkeypatch.setattr("sys.argv", ["bench_layer", *options])
    assert command.main() == 0
    printed = capsys.readouterr()
    assert "8-16" in printed.out
    assert printed.err.splitlines() == ["growth with rank, float32: 8", "growth with rank, float32: 16"]
    assert image.read_bytes().startswith(b"\x89PNG")
