"""``fisher_merge_`` against eqs. 4 and 5 in float64.

Tolerance: elementwise, with at most four roundings in F, one in the product and one in each sum.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from d2moe_ext import ops, reference

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def merged(weighted_sum: Tensor, fisher_sum: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    weighted_sum, fisher_sum = weighted_sum.double().clone(), fisher_sum.double().clone()
    reference.fisher_merge_(weighted_sum, fisher_sum, *arguments)
    return weighted_sum, fisher_sum


def assert_merged(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], weight, gradient, scale) -> None:
    expected = merged(*before, weight.double(), gradient.double(), scale)
    magnitude = merged(before[0].abs(), before[1].abs(), weight.double().abs(), gradient.double(), scale)
    for got, want, size in zip(after, expected, magnitude, strict=True):
        finfo = torch.finfo(got.dtype)
        assert ((got.double() - want).abs() <= 8 * finfo.eps * size + finfo.tiny).all()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    out=st.integers(0, 50),
    columns=st.integers(0, 50),
    sums=st.sampled_from([torch.float32, torch.float64]),
    weight_dtype=st.sampled_from(FLOATS),
    gradient_dtype=st.sampled_from(FLOATS),
    transposed=st.lists(st.booleans(), min_size=4, max_size=4),
    scale=st.floats(0, 1e3),
    seed=st.integers(0, 2**31),
)
def test_matches_formula(out, columns, sums, weight_dtype, gradient_dtype, transposed, scale, seed):
    generator = torch.Generator().manual_seed(seed)

    def random(dtype: torch.dtype, as_transpose: bool) -> Tensor:
        value = torch.randn(out, columns, generator=generator, dtype=torch.float64).to(dtype)
        return value.T.contiguous().T if as_transpose else value

    weighted_sum, fisher_sum = random(sums, transposed[0]), random(sums, transposed[1])
    weight, gradient = random(weight_dtype, transposed[2]), random(gradient_dtype, transposed[3])
    before = weighted_sum.clone(), fisher_sum.clone()
    ops.fisher_merge_(weighted_sum, fisher_sum, weight, gradient, scale)
    assert_merged(before, (weighted_sum, fisher_sum), weight, gradient, scale)


@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced"])
@pytest.mark.usefixtures("poisoned_memory")
def test_large_enough_for_every_thread_and_block(layout):
    generator = torch.Generator().manual_seed(1)

    def arrange(value: Tensor) -> Tensor:
        if layout == "transposed":
            return value.T.contiguous().T
        if layout == "sliced":
            return torch.nn.functional.pad(value, (3, 2))[:, 3:-2]
        return value

    weighted_sum, fisher_sum, weight, gradient = (arrange(torch.randn(301, 1033, generator=generator)) for _ in range(4))
    before = weighted_sum.clone(), fisher_sum.clone()
    ops.fisher_merge_(weighted_sum, fisher_sum, weight, gradient, 0.25)
    assert_merged(before, (weighted_sum, fisher_sum), weight, gradient, 0.25)


def test_nothing_beside_a_view_is_written():
    sums = torch.full((2, 6, 8), float("nan"))
    weighted_sum, fisher_sum = sums[0, 1::2, ::3], sums[1, 1::2, ::3]
    weighted_sum.zero_()
    fisher_sum.zero_()
    ops.fisher_merge_(weighted_sum, fisher_sum, torch.full((3, 3), 3.0), torch.full((3, 3), 2.0), 0.5)
    assert weighted_sum.tolist() == [[6.0] * 3] * 3
    assert fisher_sum.tolist() == [[2.0] * 3] * 3
    assert sums.isnan().sum() == 2 * (48 - 9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_is_read_right(dtype):
    values = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    weight = values[values.isfinite()][None]
    weighted_sum, fisher_sum = torch.zeros(2, *weight.shape, dtype=torch.float64).unbind()
    ops.fisher_merge_(weighted_sum, fisher_sum, weight, torch.ones_like(weight), 1.0)
    assert torch.equal(weighted_sum, weight.double())
    special = values[~values.isfinite()][None]
    weighted_sum, fisher_sum = torch.zeros(2, *special.shape).unbind()
    ops.fisher_merge_(weighted_sum, fisher_sum, special, torch.ones_like(special), 1.0)
    assert torch.equal(weighted_sum.nan_to_num(nan=7.0), special.float().nan_to_num(nan=7.0))


def test_the_weighted_mean_of_two_experts():
    weighted_sum, fisher_sum = torch.zeros(2, 1, 1).unbind()
    ops.fisher_merge_(weighted_sum, fisher_sum, torch.tensor([[10.0]]), torch.tensor([[1.0]]), 0.5)
    ops.fisher_merge_(weighted_sum, fisher_sum, torch.tensor([[20.0]]), torch.tensor([[-2.0]]), 0.375)
    assert (weighted_sum / fisher_sum).item() == pytest.approx((10 * 0.5 + 20 * 1.5) / (0.5 + 1.5))


def test_gradients_are_not_recorded():
    weighted_sum, fisher_sum = torch.zeros(2, 2, 2).unbind()
    ops.fisher_merge_(weighted_sum, fisher_sum, torch.ones(2, 2, requires_grad=True), torch.ones(2, 2), 1.0)
    assert not weighted_sum.requires_grad


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_opcheck(weight_dtype):
    arguments = (torch.zeros(3, 4), torch.zeros(3, 4), torch.rand(3, 4).to(weight_dtype), torch.rand(3, 4), 0.5)
    torch.library.opcheck(torch.ops.d2moe_ext.fisher_merge_, arguments)


def arguments_with(**changes) -> dict:
    names = ("weighted_sum", "fisher_sum", "weight", "gradient")
    return {**{name: torch.zeros(2, 3) for name in names}, "scale": 1.0, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weighted_sum": torch.zeros(2)}, "weighted_sum must have 2 dimensions, got shape [2]"),
        ({"weighted_sum": torch.zeros(2, 3).half()}, "weighted_sum must be float32 or float64, got Half"),
        ({"fisher_sum": torch.zeros(3, 2)}, "fisher_sum must have shape [2, 3], got [3, 2]"),
        ({"fisher_sum": torch.zeros(2, 3).double()}, "fisher_sum must be Float, got Double"),
        ({"weight": torch.zeros(2, 1)}, "weight must have shape [2, 3], got [2, 1]"),
        ({"weight": torch.zeros(2, 3).long()}, "weight must be of a floating dtype, got Long"),
        ({"gradient": torch.zeros(3)}, "gradient must have shape [2, 3], got [3]"),
        ({"gradient": torch.zeros(2, 3).int()}, "gradient must be of a floating dtype, got Int"),
        ({"fisher_sum": torch.zeros(2, 3, device="meta")}, "fisher_sum must be on cpu like weighted_sum, got meta"),
        ({"weight": torch.zeros(2, 3, device="meta")}, "weight must be on cpu like weighted_sum, got meta"),
        ({"gradient": torch.zeros(2, 3, device="meta")}, "gradient must be on cpu like weighted_sum, got meta"),
        ({"scale": float("nan")}, "scale must be finite and not negative, got nan"),
        ({"scale": -1.0}, "scale must be finite and not negative, got -1"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(RuntimeError) as error:
        ops.fisher_merge_(**arguments_with(**changes))
    assert str(error.value).splitlines()[0] == f"fisher_merge_: {message}"


def test_sums_in_the_same_memory_are_refused():
    both = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match=r"^fisher_merge_: fisher_sum must not share memory with weighted_sum"):
        ops.fisher_merge_(**arguments_with(weighted_sum=both, fisher_sum=both))
