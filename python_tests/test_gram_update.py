"""``gram_update_`` against ``X^T diag(w) X`` in float64.

Tolerance: a sum of T products rounded in any order is off by at most ``T * eps`` times the sum of their magnitudes;
the conversion, the weight and the addition to the Gram are one rounding each.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from d2moe_ext import ops, reference

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def random_symmetric(n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    square = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return (square + square.T).to(dtype)


def assert_updated(before: Tensor, after: Tensor, x: Tensor, weights: Tensor | None) -> None:
    expected = before.double()
    reference.gram_update_(expected, x, weights)
    magnitude = before.double().abs()
    reference.gram_update_(magnitude, x.abs(), None if weights is None else weights.abs())
    bound = (len(x) + 4) * torch.finfo(after.dtype).eps * magnitude
    assert ((after.double() - expected).abs() <= bound).all()
    assert torch.equal(after, after.T)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    num_tokens=st.integers(0, 40),
    n=st.integers(0, 40),
    gram_dtype=st.sampled_from([torch.float32, torch.float64]),
    dtype=st.sampled_from(FLOATS),
    weights_dtype=st.sampled_from([None, *FLOATS]),
    seed=st.integers(0, 2**31),
)
def test_matches_formula(num_tokens, n, gram_dtype, dtype, weights_dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, n, generator=generator).to(dtype)
    weights = None if weights_dtype is None else torch.randn(num_tokens, generator=generator).to(weights_dtype)
    gram = random_symmetric(n, gram_dtype, generator)
    before = gram.clone()
    ops.gram_update_(gram, x, weights)
    assert_updated(before, gram, x, weights)


@pytest.mark.parametrize("n", [511, 512, 513, 1100])
@pytest.mark.usefixtures("poisoned_memory")
def test_strips_of_the_triangle(n):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(7, n, generator=generator)
    gram = random_symmetric(n, torch.float32, generator)
    before = gram.clone()
    ops.gram_update_(gram, x)
    assert_updated(before, gram, x, None)


@pytest.mark.parametrize("weighted", [False, True])
def test_chunks_of_rows_are_exact_on_small_integers(weighted):
    # 12 000 x 800 elements are more than one chunk; sums of small integers are exact, so not one row may be lost.
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, (12_000, 800), generator=generator).to(torch.bfloat16)
    weights = torch.randint(0, 3, (12_000,), generator=generator).float() if weighted else None
    gram = torch.zeros(800, 800)
    ops.gram_update_(gram, x, weights)
    expected = torch.zeros(800, 800, dtype=torch.float64)
    reference.gram_update_(expected, x, weights)
    assert torch.equal(gram.double(), expected)


def test_only_the_lower_triangle_is_read():
    gram = torch.tensor([[1.0, float("nan")], [3.0, 4.0]])
    ops.gram_update_(gram, torch.tensor([[1.0, 2.0]]))
    assert gram.tolist() == [[2.0, 5.0], [5.0, 8.0]]


def test_no_tokens_change_nothing():
    gram = torch.tensor([[1.0, 2.0], [2.0, 5.0]])
    ops.gram_update_(gram, torch.zeros(0, 2), torch.zeros(0))
    assert gram.tolist() == [[1.0, 2.0], [2.0, 5.0]]


def test_batches_add_up():
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-4, 5, (50, 20), generator=generator).float()
    once, twice = torch.zeros(20, 20), torch.zeros(20, 20)
    ops.gram_update_(once, x)
    ops.gram_update_(twice, x[:13])
    ops.gram_update_(twice, x[13:])
    assert torch.equal(once, twice)


@pytest.mark.parametrize("dtype", FLOATS)
def test_views(dtype):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(600, 31, generator=generator).to(dtype).T[:, ::2][::2]
    weights = torch.rand(48, generator=generator)[::3]
    grams = torch.full((601, 601), float("nan"))
    gram = grams[::2, ::2][:300, :300]
    gram.zero_()
    ops.gram_update_(gram, x, weights)
    assert_updated(torch.zeros(300, 300), gram, x, weights)
    assert grams[1::2].isnan().all()
    assert grams[:, 1::2].isnan().all()
    assert grams[600].isnan().all()


def test_gradients_are_not_recorded():
    gram = torch.zeros(3, 3)
    ops.gram_update_(gram, torch.ones(2, 3, requires_grad=True) * 2)
    assert not gram.requires_grad
    assert gram.tolist() == [[8.0] * 3] * 3


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 5])
def test_opcheck(weighted, num_tokens):
    weights = torch.rand(num_tokens) if weighted else None
    torch.library.opcheck(torch.ops.d2moe_ext.gram_update_, (torch.zeros(4, 4), torch.rand(num_tokens, 4), weights))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 3), torch.zeros(2)), "hidden_states must have 2 dimensions, got shape [2]"),
        ((torch.zeros(3, 4), torch.zeros(2, 3)), "gram must have shape [3, 3], got [3, 4]"),
        ((torch.zeros(3, 3).half(), torch.zeros(2, 3)), "gram must be float32 or float64, got Half"),
        ((torch.zeros(3, 3), torch.zeros(2, 3).long()), "hidden_states must be of a floating dtype, got Long"),
        ((torch.zeros(3, 3), torch.zeros(2, 3), torch.zeros(3)), "row_weights must have shape [2], got [3]"),
        (
            (torch.zeros(3, 3), torch.zeros(2, 3), torch.zeros(2).int()),
            "row_weights must be of a floating dtype, got Int",
        ),
        (
            (torch.zeros(3, 3), torch.zeros(2, 3, device="meta")),
            "hidden_states must be on cpu like gram, got meta",
        ),
        (
            (torch.zeros(3, 3), torch.zeros(2, 3), torch.zeros(2, device="meta")),
            "row_weights must be on cpu like gram, got meta",
        ),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(RuntimeError) as error:
        ops.gram_update_(*arguments)
    assert str(error.value).splitlines()[0] == f"gram_update_: {message}"
