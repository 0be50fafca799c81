"""Rows of eight bits, and the U that is best for a V that was rounded to them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from d2moe_ext.quantise import quantise_rows, refitted_u

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(size: int, seed: int) -> Tensor:
    rows = random(3 * size, size, seed=seed)
    return rows.T @ rows


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(0, 6),
    columns=st.integers(0, 40),
    magnitude=st.floats(-8, 4),
    seed=st.integers(0, 2**31),
)
def test_rows_are_rounded_to_nearest_and_never_clipped(dtype, rows, columns, magnitude, seed):
    exact = random(rows, columns, seed=seed) * 10.0**magnitude
    exact[::3] *= 0
    stored = quantise_rows(exact, dtype)
    scale, values = stored.scale.double()[:, None], stored.values.double()
    assert (stored.values.dtype, stored.scale.dtype) == (torch.int8, dtype)
    assert bool((values.abs() <= 127).all())
    assert bool(((values * scale - exact).abs() <= scale / 2 * (1 + 1e-12)).all())
    assert torch.equal(stored.read(), scale * values)
    largest = exact.abs().amax(1) if columns else exact.new_zeros(rows)
    assert torch.equal(stored.scale == 0, largest == 0)
    # Rounded up to eight bits, and in float16's range below 2 ** -14 to its steps of 2 ** -24.
    step = 2.0**-24 if dtype == torch.float16 else 0.0
    assert bool((stored.scale.double() * 127 >= largest * (1 - 1e-12)).all())
    assert bool((stored.scale.double() * 127 <= largest * (1 + 2**-7) + 127 * step).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_scale_is_the_same_number_in_every_floating_dtype(dtype):
    """So a model loaded in another dtype has the same factors; float16 has them from scales of 2 ** -14 on."""
    scale = quantise_rows(random(300, 20) * torch.logspace(-1, 3, 300, dtype=torch.float64)[:, None], dtype).scale
    for other in DTYPES:
        assert torch.equal(scale.to(other).double(), scale.double())


def error(delta: Tensor, u: Tensor, v: Tensor, metric: Tensor) -> float:
    left_out = delta - u @ v
    return float(((left_out @ metric) * left_out).sum())


def test_a_refit_is_the_least_squares_solution():
    delta, v, metric = random(9, 14), random(4, 14, seed=1), gram(14, seed=2)
    root = torch.linalg.cholesky(metric)
    expected = torch.linalg.lstsq((v @ root).T, (delta @ root).T).solution.T
    torch.testing.assert_close(refitted_u(delta, v, metric), expected)


def test_a_refit_recovers_an_exact_product_whatever_the_rows_sizes():
    u, v, metric = random(9, 5), random(5, 14, seed=1), gram(14, seed=2)
    v *= torch.logspace(-6, 6, 5, dtype=torch.float64)[:, None]
    torch.testing.assert_close(refitted_u(u @ v, v, metric) @ v, u @ v, rtol=1e-6, atol=1e-9 * float((u @ v).abs().max()))


@pytest.mark.parametrize("case", ["zero row", "alike rows", "all zero", "no rows"])
def test_a_refit_stands_rows_that_do_not_span(case):
    delta, v, metric = random(9, 14), random(4, 14, seed=1), gram(14, seed=2)
    plain = {"zero row": v[1:], "alike rows": v[1:], "all zero": v[:0], "no rows": v[:0]}[case]
    v = {"zero row": torch.cat([0 * v[:1], v[1:]]), "alike rows": torch.cat([v[1:2], v[1:]])}.get(case, 0 * v)
    v = v[:0] if case == "no rows" else v
    u = refitted_u(delta, v, metric)
    assert u.shape == (9, len(v))
    assert bool(u.isfinite().all())
    least = error(delta, refitted_u(delta, plain, metric), plain, metric)
    assert error(delta, u, v, metric) == pytest.approx(least, rel=1e-6)
