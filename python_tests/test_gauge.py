"""The gauge-fixed form of a delta: the same product, an identity at the pivots, no large entry."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from d2moe_ext.gauge import LARGEST_ENTRY, GaugeFixed, fix_gauge, flat_rows

CASES = ["normal", "graded", "dependent rows", "zero rows", "zero", "few columns", "one large column"]


def whole_v(fixed: GaugeFixed, inputs: int) -> Tensor:
    """V with its identity written out."""
    others = [column for column in range(inputs) if column not in fixed.pivots.tolist()]
    v = torch.zeros(len(fixed.pivots), inputs, dtype=torch.float64)
    v[:, others] = fixed.rest
    v[range(len(fixed.pivots)), fixed.pivots.tolist()] = 1.0
    return v


def factors(case: str, out: int, rank: int, inputs: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    v = torch.randn(rank, inputs, generator=generator, dtype=torch.float64)
    if case == "graded":
        scale = 10.0 ** -torch.linspace(0, 9, rank, dtype=torch.float64)
        u, v = u * scale, v * scale[:, None]
    elif case == "dependent rows":
        v[rank // 2 :] = v[: rank - rank // 2] * 3
    elif case == "zero rows":
        v[::2] = 0
    elif case == "zero":
        v.zero_()
    elif case == "few columns":
        v[:, 1:-1] = 0
    elif case == "one large column":
        v[:, inputs // 2] *= 1e6
    return u, v


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(CASES), st.integers(1, 12), st.integers(0, 9), st.integers(9, 30), st.integers(0, 2**31))
def test_any_product_stays_what_it_is(case: str, out: int, rank: int, inputs: int, seed: int) -> None:
    u, v = factors(case, out, rank, inputs, seed)
    fixed = fix_gauge(u, v)
    assert fixed.u.shape == (out, rank)
    assert fixed.rest.shape == (rank, inputs - rank)
    assert fixed.pivots.tolist() == sorted(set(fixed.pivots.tolist()))
    assert fixed.rest.numel() == 0 or float(fixed.rest.abs().max()) <= LARGEST_ENTRY * (1 + 1e-9)
    product = u @ v
    largest = float((u.norm(dim=0) * v.norm(dim=1)).max()) if rank else 0.0
    error = (fixed.u @ whole_v(fixed, inputs) - product).abs()
    assert bool((error <= 1e-12 * largest).all())
    torch.testing.assert_close(fixed.u, product[:, fixed.pivots], rtol=0, atol=1e-13 * largest)


def test_large_entries_are_exchanged_for_pivots() -> None:
    """Partial pivoting takes the first columns, as none of the others is larger on the way, and leaves large entries."""
    n = 12
    lower = torch.eye(n, dtype=torch.float64) - 0.99 * torch.ones(n, n, dtype=torch.float64).tril(-1)
    others = torch.full((5, n), -0.95, dtype=torch.float64) * torch.linspace(0.9, 1, 5, dtype=torch.float64)[:, None]
    v = torch.cat([lower, others]).T
    assert float(torch.linalg.solve(lower.T, others.T).abs().max()) > 100
    fixed = fix_gauge(torch.eye(n, dtype=torch.float64), v)
    assert fixed.pivots.tolist() != list(range(n))
    assert float(fixed.rest.abs().max()) <= LARGEST_ENTRY * (1 + 1e-9)
    torch.testing.assert_close(fixed.u @ whole_v(fixed, v.shape[1]), v, rtol=1e-10, atol=1e-10)


def test_full_rank_leaves_nothing_of_v() -> None:
    v = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fixed = fix_gauge(u, v)
    assert (fixed.rest.shape, fixed.pivots.tolist()) == ((6, 0), list(range(6)))
    torch.testing.assert_close(fixed.u, u @ v)


def test_more_rows_than_columns_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^fix_gauge: the rank must be at most the 3 columns of v, got 4\.$"):
        fix_gauge(torch.zeros(5, 4, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64))


def test_flat_rows_fill_the_last_row_with_zeros() -> None:
    parts = [torch.arange(6.0).view(2, 3), torch.empty(0, 4), torch.full((1, 2), 7.0)]
    assert flat_rows(parts, 5).tolist() == [[0, 1, 2, 3, 4], [5, 7, 7, 0, 0]]
    assert flat_rows([torch.empty(0, 4)], 5).shape == (0, 5)
