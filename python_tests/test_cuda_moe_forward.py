"""moe_forward and its halves on a GPU: the CPU's own tests on it, and what only a GPU's forms of the products do."""

from __future__ import annotations

import pytest
import torch
from gpu import DEVICE, on_device, through_device
from moe_forward_cases import Layer, assert_within, dense_forward, make_layer
from test_moe_forward import test_any_layer_equals_dense_weights_token_by_token
from test_moe_forward_contract import (
    test_a_non_finite_token_spoils_no_other,
    test_activations_over_the_range_of_float32,
    test_error_is_no_worse_than_twice_torchs_own,
    test_every_value_of_eight_bits_is_scaled_and_rounded_once,
    test_factors_of_eight_bits_larger_than_is_widened_at_once,
    test_products_larger_than_a_block,
    test_results_round_to_nearest_even_for_every_value_of_the_dtype,
)
from test_moe_forward_halves import (
    test_down_per_pair_is_neither_weighted_nor_summed,
    test_down_per_pair_prunes_by_the_scores_of_its_pairs,
    test_down_scores_are_taken_on_the_weighted_sums,
    test_each_half_equals_dense_weights,
    test_rows_of_ids_that_are_no_expert_are_zero_and_never_read,
    test_scores_count_a_token_once_per_base_and_only_tokens_of_that_base,
    test_ties_and_nan_in_scores_keep_the_lower_columns_and_the_nan,
)

from d2moe_ext import ops

# The CPU's tests, which pytest finds here by their names.
__all__ = [
    "test_a_non_finite_token_spoils_no_other",
    "test_activations_over_the_range_of_float32",
    "test_any_layer_equals_dense_weights_token_by_token",
    "test_down_per_pair_is_neither_weighted_nor_summed",
    "test_down_per_pair_prunes_by_the_scores_of_its_pairs",
    "test_down_scores_are_taken_on_the_weighted_sums",
    "test_each_half_equals_dense_weights",
    "test_error_is_no_worse_than_twice_torchs_own",
    "test_every_value_of_eight_bits_is_scaled_and_rounded_once",
    "test_factors_of_eight_bits_larger_than_is_widened_at_once",
    "test_products_larger_than_a_block",
    "test_results_round_to_nearest_even_for_every_value_of_the_dtype",
    "test_rows_of_ids_that_are_no_expert_are_zero_and_never_read",
    "test_scores_count_a_token_once_per_base_and_only_tokens_of_that_base",
    "test_ties_and_nan_in_scores_keep_the_lower_columns_and_the_nan",
]
pytestmark = pytest.mark.cuda
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def operators_through_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("moe_forward", "moe_gate_up_forward", "moe_down_forward"):
        monkeypatch.setattr(ops, name, through_device(getattr(ops, name)))


def by_channel(layer: Layer) -> Layer:
    """Bases laid out as the native backend holds them where they are pruned by the batch: channel by channel."""
    arguments = dict(layer.arguments)
    for name in ("gate_up_base", "down_base"):
        arguments[name] = arguments[name].transpose(1, 2).contiguous().transpose(1, 2)
    return Layer(arguments, layer.gated)


def assert_exact(layer: Layer) -> None:
    dtype = layer.arguments["hidden_states"].dtype
    dense = dense_forward(layer, dtype)
    assert dense.gap > 1.05
    assert_within(ops.moe_forward(**layer.arguments), dense.output, dense.output_error)


# Pairs one by one; sorted rows; one base by cuBLAS, of masked rows of x; of gathered channels.
@pytest.mark.parametrize("tokens", [1, 4, 5, 16, 17, 90, 1030])
@pytest.mark.parametrize("bases", [(1, 1), (2, 1), (4, 2)])
@pytest.mark.parametrize("keep", [(1.0, 1.0), (0.5, 0.6)])
@pytest.mark.usefixtures("poisoned_memory")
def test_bases_by_channel(tokens: int, bases: tuple[int, int], keep: tuple[float, float]) -> None:
    for dtype in DTYPES:
        sizes = {"tokens": tokens, "experts": 4, "hidden": 40, "inter": 24, "kept": (0.8, 0.75)}
        layer = make_layer(11, bases=bases, keep=keep, dtype=dtype, sentinels=True, **sizes)
        if dense_forward(layer, dtype).gap > 1.05:
            assert_exact(by_channel(layer))


# As many experts as are sorted by several rounds of a warp's lanes; more rows than a warp takes at once; empty experts.
@pytest.mark.parametrize(("experts", "tokens"), [(1, 70), (33, 40), (130, 300), (300, 6)])
@pytest.mark.parametrize("bases", [1, 3, None])
@pytest.mark.usefixtures("poisoned_memory")
def test_many_experts(experts: int, tokens: int, bases: int | None) -> None:
    count = experts if bases is None else min(bases, experts)
    sizes = {"tokens": tokens, "top_k": min(experts, 5), "experts": experts, "hidden": 16, "inter": 8}
    assert_exact(make_layer(12, bases=(count, count), dtype=torch.bfloat16, sentinels=True, duplicates=True, **sizes))


# Channels in several parts, whose sums meet in the last block; more than one tile of outputs; tiles of many rows.
@pytest.mark.parametrize(("tokens", "hidden", "inter"), [(2, 2000, 144), (7, 1100, 136), (150, 136, 264)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned_memory")
def test_large_products(tokens: int, hidden: int, inter: int, dtype: torch.dtype) -> None:
    for bases in (1, 2):
        assert_exact(make_layer(13, tokens=tokens, experts=2, hidden=hidden, inter=inter, bases=(bases, bases), dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_the_same_in_every_run(dtype: torch.dtype) -> None:
    sizes = {"tokens": 60, "experts": 4, "hidden": 1000, "inter": 64, "bases": (2, 1), "keep": (0.9, 0.9)}
    layer = make_layer(6, dtype=dtype, **sizes)
    first = ops.moe_forward(**layer.arguments)
    for _ in range(3):
        assert torch.equal(ops.moe_forward(**layer.arguments), first)


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("gauge_fixed", [False, True])
def test_lists_out_of_range_are_left_out(tokens: int, gauge_fixed: bool) -> None:
    """What no index list may hold in a checkpoint: read on a GPU it must neither crash nor spoil another expert's tokens."""
    layer = make_layer(3, tokens=tokens, top_k=1, bases=(2, 2), kept=(0.8, 0.8), keep=(0.8, 0.8), gauge_fixed=gauge_fixed)
    broken = dict(layer.arguments)
    for name in ("delta_rank", "delta_u_start", "delta_v_start"):
        broken[name] = [value.clone() for value in layer.arguments[name]]
    for i, wrong in enumerate((10**9, -5, 7)):
        broken["delta_rank"][i][1] = wrong
        broken["delta_u_start"][i][2] = 10**9
        broken["delta_v_start"][i][2] = -(10**9)
    for name in ("gate_up_expert_to_base", "down_expert_to_base"):
        broken[name] = layer.arguments[name].clone()
        broken[name][3] = 77
    output = ops.moe_forward(**broken)
    untouched = layer.arguments["top_k_index"][:, 0] == 0
    assert output.isfinite().all()
    no_pruning = layer.arguments | {"gate_up_keep": 10, "down_keep": 8}
    assert layer.arguments["gate_up_base"].shape[2] == no_pruning["gate_up_keep"]
    broken |= {"gate_up_keep": 10, "down_keep": 8}
    assert torch.equal(ops.moe_forward(**broken)[untouched], ops.moe_forward(**no_pruning)[untouched])
    for name in ("gate_up_columns", "down_columns"):
        broken[name] = torch.full_like(layer.arguments[name], -9)
    assert ops.moe_forward(**broken).isfinite().all()


def test_without_tokens_or_slots() -> None:
    for sizes in ({"tokens": 0}, {"tokens": 3, "top_k": 0}):
        layer = make_layer(1, **sizes)
        assert torch.equal(ops.moe_forward(**layer.arguments), torch.zeros(layer.arguments["hidden_states"].shape))


@pytest.mark.real_gpu
@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_a_forward_is_captured_in_a_graph(tokens: int, keep: float) -> None:
    layer = make_layer(8, tokens=tokens, experts=8, hidden=64, inter=48, dtype=torch.bfloat16, keep=(keep, keep))
    arguments = on_device(by_channel(layer).arguments)
    forward = torch.ops.d2moe_ext.moe_forward
    with torch.cuda.stream(torch.cuda.Stream()):
        forward(*arguments.values())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = forward(*arguments.values())
    other = make_layer(9, tokens=tokens, experts=8, hidden=64, inter=48, dtype=torch.bfloat16)
    for name in ("hidden_states", "top_k_index", "top_k_weights"):
        arguments[name].copy_(other.arguments[name])
    graph.replay()
    assert torch.equal(output, forward(*arguments.values()))


@pytest.mark.real_gpu
def test_nothing_waits_for_the_host() -> None:
    layer = make_layer(8, tokens=40, experts=8, hidden=64, inter=48, bases=(2, 2), keep=(0.5, 0.5))
    arguments = on_device(layer.arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ops.d2moe_ext.moe_forward(*arguments.values())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("call", range(4))
@pytest.mark.parametrize("int8", [False, True])
def test_opcheck_and_one_graph(call: int, int8: bool) -> None:
    layer = make_layer(2, bias=True, kept=(0.7, 0.7), keep=(0.8, 0.8), int8=int8)
    activated = torch.randn(14, 10, generator=torch.Generator().manual_seed(1))
    operators = torch.ops.d2moe_ext
    name, arguments = [
        ("moe_forward", layer.arguments),
        ("moe_gate_up_forward", layer.gate_up_arguments()),
        ("moe_down_forward", layer.down_arguments(activated, per_pair=False)),
        ("moe_down_forward", layer.down_arguments(activated, per_pair=True)),
    ][call]
    moved = on_device(arguments)
    torch.library.opcheck(getattr(operators, name).default, (), moved)
    compiled = torch.compile(lambda **values: getattr(operators, name)(**values), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**moved), getattr(operators, name)(**moved))
    assert compiled(**moved).device.type == DEVICE


# As many rows for each expert as torch's own grouped products take, in bfloat16; what keeps a layer from them.
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"sentinels": True, "duplicates": True},
        {"interleaved": True, "activation": "gelu"},
        {"gated": False, "activation": "relu2"},
        {"bias": True},
        {"hidden": 36},
        {"tokens": 40},
    ],
)
@pytest.mark.usefixtures("poisoned_memory")
def test_plain_layers_of_many_rows(sizes: dict) -> None:
    plain = {"tokens": 110, "top_k": 2, "experts": 5, "bases": (5, 5), "deltas": "none", "hidden": 40, "inter": 24}
    for dtype in DTYPES:
        assert_exact(make_layer(14, dtype=dtype, **plain | sizes))


@pytest.mark.parametrize("tokens", [3, 30, 200])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned_memory")
def test_bases_out_of_range_are_left_out_of_plain_layers(tokens: int, dtype: torch.dtype) -> None:
    sizes = {"tokens": tokens, "top_k": 1, "bases": (4, 4), "deltas": "none", "hidden": 16, "inter": 8}
    layer = make_layer(15, dtype=dtype, **sizes)
    whole = ops.moe_forward(**layer.arguments)
    for name in ("gate_up_expert_to_base", "down_expert_to_base"):
        changed = layer.arguments[name].clone()
        changed[1] = 10**6
        output = ops.moe_forward(**layer.arguments | {name: changed})
        left_out = layer.arguments["top_k_index"][:, 0] == 1
        assert torch.equal(output[~left_out], whole[~left_out])
        assert torch.equal(output[left_out], torch.zeros_like(output[left_out]))
