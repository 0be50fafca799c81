"""What a forward must read and do, counted by hand, and the rates that turn it into time."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from bench_helpers import measure_little
from tiny_models import EXPERTS, HIDDEN, INTER, compress_exactly, tiny_model

from d2moe_ext.adapters import find_experts
from d2moe_ext.bench.costs import Cost, covered, forward_cost
from d2moe_ext.bench.floors import Floors, Gauges
from d2moe_ext.bench.machine import available_memory, describe_machine, last_level_cache
from d2moe_ext.experts import D2MoEExperts
from d2moe_ext.spec import DeltaSpec, ExpertsSpec, GroupSpec

# Three tokens, two experts each: experts 0, 1, 2 are touched by 3, 2 and 1 pairs.
INDEX = torch.tensor([[0, 1], [0, 2], [1, 0]])
PAIRS = 6
EXPERT = 3 * HIDDEN * INTER
FLOAT = 4
ENDS = 2 * 3 * HIDDEN * FLOAT  # x read, y written


@pytest.fixture
def view():
    return find_experts(tiny_model("mixtral"))[0]


def with_rank(view, rank, *, gauge_fixed=False, factor_dtype="model", shared=False, bases=1, kept=None, keep=None):
    """Compressed experts whose deltas all have one rank; ``shared``: one V for all experts."""
    layout = view.layout
    groups = [GroupSpec(bases, kept or size, keep or kept or size) for size in (HIDDEN, INTER)]
    deltas, lengths = {}, {}
    for name, inputs in (("gate", HIDDEN), ("up", HIDDEN), ("down", INTER)):
        lengths[name] = rank * (inputs - rank) if gauge_fixed else rank
        owners = 1 if shared else EXPERTS
        rows = -(-owners * lengths[name] // inputs) if gauge_fixed else owners * rank
        deltas[name] = DeltaSpec(EXPERTS * rank, rows)
    spec = ExpertsSpec(layout, *groups, deltas, gauge_fixed=gauge_fixed, factor_dtype=factor_dtype)
    module = D2MoEExperts(spec, view, dtype=torch.float32)
    every = torch.arange(EXPERTS, dtype=torch.int32)
    for name in deltas:
        getattr(module, f"{name}_delta_rank").fill_(rank)
        getattr(module, f"{name}_delta_u_start").copy_(every * rank)
        getattr(module, f"{name}_delta_v_start").copy_(every * (0 if shared else lengths[name]))
    for group in ("gate_up", "down"):
        getattr(module, f"{group}_expert_to_base").copy_(every % bases)
    return module


def test_plain_layer(view):
    cost = forward_cost(D2MoEExperts.uncompressed(view), INDEX)
    assert cost == Cost(3 * EXPERT * FLOAT + ENDS, 2 * PAIRS * EXPERT)


def test_ids_of_no_expert_cost_nothing(view):
    module = D2MoEExperts.uncompressed(view)
    assert forward_cost(module, torch.tensor([[0, EXPERTS], [-1, 0]])) == Cost(
        EXPERT * FLOAT + 2 * 2 * HIDDEN * FLOAT, 2 * 2 * EXPERT
    )


def test_one_base_is_read_once_and_multiplied_once_a_token(view):
    rank = 5
    factors = rank * (2 * (HIDDEN + INTER) + HIDDEN + INTER)
    cost = forward_cost(with_rank(view, rank), INDEX)
    assert cost.bytes == (EXPERT + 3 * factors) * FLOAT + ENDS
    assert cost.flops == 2 * (3 * EXPERT + PAIRS * factors)


def test_two_bases(view):
    # Experts 0 and 2 have base 0, expert 1 base 1: (token, base) pairs are 2 + 1 + 2.
    cost = forward_cost(with_rank(view, 0, bases=2), INDEX)
    assert cost == Cost(2 * EXPERT * FLOAT + ENDS, 2 * 5 * EXPERT)


def test_dynamic_pruning_reads_only_what_it_multiplies(view):
    module = with_rank(view, 0, kept=20, keep=12)
    rows = 2 * INTER + HIDDEN
    assert forward_cost(module, INDEX) == Cost(rows * 12 * FLOAT + ENDS, 2 * 3 * rows * 12)
    module.dynamic = False
    assert forward_cost(module, INDEX) == Cost(rows * 20 * FLOAT + ENDS, 2 * 3 * rows * 20)


def test_gauge_fixed_factors_leave_an_identity_out(view):
    rank = 5
    whole = rank * (2 * (HIDDEN + INTER) + HIDDEN + INTER)
    factors = whole - 3 * rank * rank
    cost = forward_cost(with_rank(view, rank, gauge_fixed=True), INDEX)
    assert cost.bytes == (EXPERT + 3 * factors + 3 * 3 * rank) * FLOAT + ENDS  # pivots are int32
    assert cost.flops == 2 * (3 * EXPERT + PAIRS * factors)


def test_a_shared_v_is_read_once(view):
    rank = 5
    v, u = rank * (2 * HIDDEN + INTER), rank * (2 * INTER + HIDDEN)
    cost = forward_cost(with_rank(view, rank, shared=True), INDEX)
    assert cost.bytes == (EXPERT + v + 3 * u) * FLOAT + ENDS
    assert cost.flops == 2 * (3 * EXPERT + PAIRS * (u + v))


@pytest.mark.parametrize("gauge_fixed", [False, True])
def test_int8_factors_take_a_byte_and_their_scales(view, gauge_fixed):
    rank = 5
    elements = rank * (2 * (HIDDEN + INTER) + HIDDEN + INTER) - (3 * rank * rank if gauge_fixed else 0)
    beside = 2 * 3 * rank + (3 * rank if gauge_fixed else 0)  # scales of U and V; pivots
    cost = forward_cost(with_rank(view, rank, gauge_fixed=gauge_fixed, factor_dtype="int8"), INDEX)
    assert cost.bytes == (EXPERT + 3 * beside) * FLOAT + 3 * elements + ENDS


def test_biases_of_touched_experts_are_read():
    view = find_experts(tiny_model("gpt_oss"))[0]
    cost = forward_cost(D2MoEExperts.uncompressed(view), INDEX)
    assert cost.bytes == 3 * (EXPERT + 2 * INTER + HIDDEN) * FLOAT + ENDS


def test_a_norm_after_each_expert_keeps_downs_base_from_being_shared(view):
    module = with_rank(view, 0)
    module.spec = dataclasses.replace(module.spec, layout=dataclasses.replace(view.layout, has_post_expert_norm=True))
    assert forward_cost(module, INDEX).flops == 2 * (3 * 2 * INTER * HIDDEN + PAIRS * HIDDEN * INTER)


def test_exact_compression_stores_what_is_counted(view):
    """Every expert touched: all stored factors and bases are read."""
    module = compress_exactly(view, pruned=4)
    index = torch.arange(EXPERTS).view(-1, 2)
    stored = sum(t.numel() * t.element_size() for name, t in module.named_parameters())
    assert forward_cost(module, index).bytes == stored + 2 * index.shape[0] * HIDDEN * FLOAT


def test_covered():
    assert covered([(0, 3), (0, 3), (10, 2), (2, 2)]) == 6
    assert covered([(5, 0), (0, 10), (2, 3)]) == 10
    assert covered([]) == 0


def test_floors(monkeypatch):
    measure_little(monkeypatch)
    gauges = Gauges(["float32", "bfloat16", "float32"])
    floors = gauges.floors
    assert floors.bandwidth > 0
    assert set(floors.rates) == {"float32", "bfloat16"}
    assert min(floors.rates.values()) > 0
    assert floors.threads == torch.get_num_threads()
    read, product = gauges.runs("bfloat16")
    again = gauges.floors_of({read: [2.0, 1.0, 4.0], product: [0.5]}, "bfloat16")
    assert again.bandwidth == 2**20 / 2.0
    assert again.rates == {"bfloat16": 2 * 8 * 16 * 32 / 0.5}
    assert (again.bandwidth_by, again.threads) == (floors.bandwidth_by, floors.threads)
    for run in gauges.runs("float32").values():
        assert run(None).dtype == torch.float32 or floors.bandwidth_by.startswith(("sum of int64", "largest of int32"))


def test_the_longer_time_is_the_floor():
    floors = Floors(bandwidth=100.0, bandwidth_by="", rates={"float32": 10.0}, threads=1)
    assert floors.seconds(Cost(200, 10), "float32") == 2.0
    assert floors.seconds(Cost(200, 30), "float32") == 3.0


def test_machine(monkeypatch, tmp_path):
    assert "cores" in describe_machine()
    assert available_memory() is None or available_memory() > 2**20
    for number, size in enumerate(("48K", "32M", "nonsense")):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}" / "size").write_text(f"{size}\n")
    monkeypatch.setattr("d2moe_ext.bench.machine._CACHES", tmp_path)
    assert last_level_cache() == 32 * 2**20
    monkeypatch.setattr("d2moe_ext.bench.machine._CACHES", tmp_path / "absent")
    assert last_level_cache() == 64 * 2**20
