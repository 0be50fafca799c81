"""The two halves, with the layer's activation between them, and dynamic pruning as both forms see it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from moe_forward_cases import DELTA, Layer, assert_within, dense_forward, make_layer, with_gaps
from test_moe_forward import DTYPES, layers

from d2moe_ext import ops, reference
from d2moe_ext.reference.moe_forward import gated_activation

NO_DELTAS: list[list] = [[] for _ in DELTA]


def compose(layer: Layer) -> torch.Tensor:
    arguments = layer.arguments
    gate_up = ops.moe_gate_up_forward(**layer.gate_up_arguments())
    activated = gated_activation(gate_up, arguments["activation"], arguments["interleaved"], gated=layer.gated)
    return ops.moe_down_forward(**layer.down_arguments(activated, per_pair=False))


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(layers())
def test_each_half_equals_dense_weights(layer: Layer) -> None:
    dtype = layer.arguments["hidden_states"].dtype
    dense = dense_forward(layer, dtype)
    assume(dense.gap > 2)
    gate_up = ops.moe_gate_up_forward(**layer.gate_up_arguments())
    assert gate_up.dtype == dtype
    assert_within(gate_up, dense.gate_up, dense.gate_up_error)
    assert_within(compose(layer), dense.output, 2 * dense.output_error)  # the activation rounds in between
    activated = with_gaps(dense.activated.to(dtype))
    down = ops.moe_down_forward(**layer.down_arguments(activated, per_pair=False))
    assert_within(down, dense.output, dense.output_error)
    exact = layer.to(torch.float64)
    expected = reference.moe_gate_up_forward(**exact.gate_up_arguments())
    torch.testing.assert_close(expected, dense.gate_up, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(layers())
def test_down_per_pair_is_neither_weighted_nor_summed(layer: Layer) -> None:
    # Scores of pairs are not those of weighted sums: the dense computation serves where down has no such pruning.
    assume(layer.arguments["down_column_norms"] is None)
    dtype = layer.arguments["hidden_states"].dtype
    dense = dense_forward(layer, dtype)
    assume(dense.gap > 2)
    arguments = layer.down_arguments(with_gaps(dense.activated.to(dtype)), per_pair=True)
    assert_within(ops.moe_down_forward(**arguments), dense.down, dense.down_error)
    exact = layer.to(torch.float64).down_arguments(dense.activated, per_pair=True)
    torch.testing.assert_close(reference.moe_down_forward(**exact), dense.down, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bases", [1, 2, 4])
def test_down_per_pair_prunes_by_the_scores_of_its_pairs(bases: int) -> None:
    layer = make_layer(3, tokens=9, inter=12, bases=(1, bases), keep=(1.0, 0.5), dtype=torch.float64, sentinels=True)
    activated = torch.randn(18, 12, generator=torch.Generator().manual_seed(0))
    expected = reference.moe_down_forward(**layer.down_arguments(activated.double(), per_pair=True))
    actual = ops.moe_down_forward(**layer.to(torch.float32).down_arguments(activated, per_pair=True))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    everything = layer.down_arguments(activated.double(), per_pair=True) | {"down_keep": 12}
    assert (reference.moe_down_forward(**everything) - expected).abs().max() > 0.1


def test_scores_count_a_token_once_per_base_and_only_tokens_of_that_base() -> None:
    """Column 0 wins for base 0 and column 1 for base 1 only if each sees its own tokens, and each token once."""
    x = torch.tensor([[2.0, 1.0, 0.0], [2.0, 2.9, 0.0], [0.0, 3.0, 1.0]])
    index = torch.tensor([[0, 1], [0, -1], [2, 2]])  # base 0: tokens 0 (twice: experts 0 and 1) and 1; base 1: token 2
    # Column 0 of base 0 scores sqrt(8) * 1.1 = 3.11 against sqrt(1 + 8.41) = 3.07; counting token 0 twice, or not
    # scaling by the norms, gives another order of magnitude between them.
    norms = torch.tensor([[1.1, 1.0, 1.0], [1.0, 1.0, 1.0]])
    base = torch.eye(3).expand(2, 3, 3)
    expert_to_base = torch.tensor([0, 0, 1], dtype=torch.int32)
    arguments = (x, index, base, None, norms, expert_to_base, 1, None, *NO_DELTAS)
    expected = torch.zeros(3, 2, 3)
    expected[0, :, 0], expected[1, 0, 0], expected[2, :, 1] = 2.0, 2.0, 3.0
    for function in (ops.moe_gate_up_forward, reference.moe_gate_up_forward):
        assert torch.equal(function(*arguments), expected.reshape(6, 3))


def test_ties_and_nan_in_scores_keep_the_lower_columns_and_the_nan() -> None:
    x = torch.tensor([[1.0, 1.0, 1.0, float("nan")], [5.0, 5.0, 5.0, 5.0]])
    index = torch.tensor([[0], [0]])
    norms = torch.ones(1, 4)
    expert_to_base = torch.zeros(1, dtype=torch.int32)
    arguments = (x, index, torch.ones(1, 1, 4), None, norms, expert_to_base, 3, None, *NO_DELTAS)
    for function in (ops.moe_gate_up_forward, reference.moe_gate_up_forward):
        output = function(*arguments).flatten()
        assert output[0].isnan()
        assert output[1].item() == 15.0  # columns 0, 1 and 3


@pytest.mark.parametrize("weigh", [True, False])
def test_down_scores_are_taken_on_the_weighted_sums(weigh: bool) -> None:
    """Two experts of one base cancel in column 0; unweighted, or pair by pair, column 0 would win."""
    activated = torch.tensor([[9.0, 2.0], [-3.0, 2.0]])
    weights = torch.tensor([[0.25, 0.75]]) if weigh else torch.tensor([[1.0, 0.0]])
    arguments = {
        "activated": activated, "top_k_index": torch.tensor([[0, 1]]), "top_k_weights": weights,
        "down_base": torch.eye(2).unsqueeze(0), "down_columns": None, "down_column_norms": torch.ones(1, 2),
        "down_expert_to_base": torch.zeros(2, dtype=torch.int32), "down_keep": 1, "down_bias": None,
        **{name: [] for name in DELTA}, "per_pair": False,
    }  # fmt: skip
    expected = torch.tensor([[0.0, 2.0]] if weigh else [[9.0, 0.0]])
    for function in (ops.moe_down_forward, reference.moe_down_forward):
        assert torch.equal(function(**arguments), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_ids_that_are_no_expert_are_zero_and_never_read(dtype: torch.dtype) -> None:
    layer = make_layer(5, sentinels=True, dtype=dtype, bias=True)
    outside = ((layer.arguments["top_k_index"] < 0) | (layer.arguments["top_k_index"] >= 4)).flatten()
    assert outside.any()
    assert not outside.all()
    gate_up = ops.moe_gate_up_forward(**layer.gate_up_arguments())
    assert torch.equal(gate_up.abs().sum(1) == 0, outside)
    activated = torch.randn(14, 10).to(dtype)
    activated[outside] = torch.nan
    for per_pair in (False, True):
        assert ops.moe_down_forward(**layer.down_arguments(activated, per_pair)).isfinite().all()
