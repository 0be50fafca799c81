"""``column_select`` against eq. 9 in float64.

Scores: squares are summed in float64, so a score is off by the one rounding to float32. The selection is compared
exactly, with a sort of the scores that the operator itself returned.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from d2moe_ext import ops, reference

FORWARD = [torch.float32, torch.bfloat16, torch.float16]


def best(scores: Tensor, keep: int) -> list[int]:
    """The rule in its plainest form: largest first, NaN as infinity, lower position first."""
    values = [math.inf if math.isnan(score) else score for score in scores.tolist()]
    return sorted(sorted(range(len(values)), key=lambda j: (-values[j], j))[:keep])


def assert_selected(hidden_states, column_norms, keep, columns=None) -> Tensor:
    scores, selected = ops.column_select(hidden_states, column_norms, keep, columns)
    expected, _ = reference.column_select(hidden_states, column_norms, keep, columns)
    assert scores.dtype == torch.float32
    assert selected.dtype == torch.int32
    torch.testing.assert_close(scores, expected, rtol=2 * torch.finfo(torch.float32).eps, atol=0.0, equal_nan=True)
    assert selected.tolist() == best(scores, keep)
    return selected


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    num_tokens=st.integers(0, 30),
    in_features=st.integers(1, 70),
    dtype=st.sampled_from(FORWARD),
    listed=st.booleans(),
    share=st.floats(0, 1),
    levels=st.sampled_from([2, 1000]),
    seed=st.integers(0, 2**31),
)
def test_matches_formula(num_tokens, in_features, dtype, listed, share, levels, seed):
    # Two levels only make for many exact ties.
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-levels, levels + 1, (num_tokens, in_features), generator=generator).to(dtype)
    columns = torch.randperm(in_features, generator=generator)[: (in_features + 1) // 2].sort().values.int()
    count = len(columns) if listed else in_features
    norms = torch.randint(0, levels + 1, (count,), generator=generator).float()
    assert_selected(x, norms, round(share * count), columns if listed else None)


@pytest.mark.parametrize("dtype", FORWARD)
@pytest.mark.usefixtures("poisoned_memory")
def test_wide_enough_for_every_thread_and_block(dtype):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40, 5003, generator=generator).to(dtype)
    selected = assert_selected(x, torch.rand(5003, generator=generator), 2501)
    assert len(set(selected.tolist())) == 2501


@pytest.mark.parametrize("dtype", FORWARD)
def test_the_largest_finite_inputs_do_not_overflow(dtype):
    largest = torch.finfo(dtype).max
    x = torch.tensor([[largest, largest / 2, 1.0]] * 9).to(dtype)
    scores, selected = ops.column_select(x, torch.full((3,), 1e-3), 1)
    assert scores.isfinite().all()
    assert scores[0].item() == pytest.approx(3e-3 * largest, rel=1e-6)
    assert selected.tolist() == [0]


@pytest.mark.parametrize("dtype", FORWARD)
def test_the_smallest_inputs_do_not_vanish(dtype):
    x = torch.zeros(4, 3, dtype=dtype)
    x[:, 1] = torch.finfo(dtype).smallest_normal / 2
    scores, selected = ops.column_select(x, torch.ones(3), 1)
    assert scores[1] > 0
    assert selected.tolist() == [1]


def test_ties_prefer_the_lower_position():
    x = torch.ones(1, 6)
    assert ops.column_select(x, torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 1.0]), 4)[1].tolist() == [0, 1, 2, 3]
    assert ops.column_select(x, torch.ones(6), 3)[1].tolist() == [0, 1, 2]
    assert ops.column_select(x, torch.tensor([0.0, -0.0, 0.0, -0.0, 0.0, 0.0]), 2)[1].tolist() == [0, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FORWARD)
def test_a_non_finite_column_counts_as_infinite(bad, dtype):
    x = torch.ones(3, 5, dtype=dtype)
    x[1, 3] = bad
    assert assert_selected(x, torch.tensor([9.0, 1.0, 8.0, 1.0, 1.0]), 2).tolist() == [0, 3]


def test_nan_and_infinity_tie():
    x = torch.tensor([[1.0, math.inf, math.nan, math.inf, 1.0]])
    norms = torch.tensor([1.0, 1.0, 1.0, 0.0, math.nan])  # 0 * inf is NaN as well
    assert assert_selected(x, norms, 2).tolist() == [1, 2]
    assert assert_selected(x, norms, 4).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("in_features", [1, 8])
def test_no_tokens_score_zero(in_features):
    scores, selected = ops.column_select(torch.zeros(0, in_features), torch.ones(in_features), 1)
    assert scores.tolist() == [0.0] * in_features
    assert selected.tolist() == [0]


def test_keep_none_and_all():
    x, norms = torch.randn(3, 5), torch.rand(5)
    assert ops.column_select(x, norms, 0)[1].shape == (0,)
    assert ops.column_select(x, norms, 5)[1].tolist() == [0, 1, 2, 3, 4]
    assert ops.column_select(torch.zeros(2, 0), torch.zeros(0), 0)[0].shape == (0,)


@pytest.mark.parametrize("dtype", FORWARD)
def test_views(dtype):
    generator = torch.Generator().manual_seed(5)
    wide = torch.randn(24, 40, generator=generator).to(dtype)
    norms = torch.rand(40, generator=generator)[::2]
    columns = torch.arange(40, dtype=torch.int32)[::2]
    assert_selected(wide[::2], norms, 7, columns)
    assert_selected(wide[:, ::2], norms, 7)
    assert_selected(wide[:, 5:25], norms, 7)
    assert_selected(wide[4:24].T, norms, 7)
    assert_selected(wide[:1].expand(5, 40)[:, :20], norms, 7)
    assert_selected(wide[:, :1].expand(24, 20), norms, 7)


def test_the_result_does_not_depend_on_threads():
    x, norms = torch.randn(50, 3000), torch.rand(3000)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = ops.column_select(x, norms, 1500)
    torch.set_num_threads(2)
    together = ops.column_select(x, norms, 1500)
    torch.set_num_threads(threads)
    assert torch.equal(alone[0], together[0])
    assert torch.equal(alone[1], together[1])


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 4])
def test_opcheck(listed, num_tokens):
    columns = torch.tensor([0, 2, 5], dtype=torch.int32) if listed else None
    arguments = (torch.rand(num_tokens, 6), torch.rand(3 if listed else 6), 2, columns)
    torch.library.opcheck(torch.ops.d2moe_ext.column_select, arguments)


X, NORMS = torch.zeros(2, 4), torch.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(4), NORMS, 1), "hidden_states must have 2 dimensions, got shape [4]"),
        ((X.double(), NORMS, 1), "hidden_states must be float32, bfloat16 or float16, got Double"),
        ((X, torch.zeros(1, 4), 1), "column_norms must have 1 dimensions, got shape [1, 4]"),
        ((X, NORMS.half(), 1), "column_norms must be Float, got Half"),
        ((X, torch.zeros(3), 1), "column_norms must have shape [4], got [3]"),
        ((X, NORMS, 5), "keep must be between 0 and the 4 columns, got 5"),
        ((X, NORMS, -1), "keep must be between 0 and the 4 columns, got -1"),
        ((X, NORMS, 1, torch.zeros(3).int()), "columns must have shape [4], got [3]"),
        ((X, NORMS, 1, torch.zeros(4).long()), "columns must be Int, got Long"),
        ((X, NORMS, 1, torch.tensor([0, 1, 4, 2]).int()), "columns must lie in [0, 4), got 4 at position 2"),
        ((X, NORMS, 1, torch.tensor([0, -1, 1, 2]).int()), "columns must lie in [0, 4), got -1 at position 1"),
        ((X, NORMS.to("meta"), 1), "column_norms must be on cpu like hidden_states, got meta"),
        ((X, NORMS, 1, torch.zeros(4).int().to("meta")), "columns must be on cpu like hidden_states, got meta"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(RuntimeError) as error:
        ops.column_select(*arguments)
    assert str(error.value).splitlines()[0] == f"column_select: {message}"
