"""``whitened_svd`` against a float64 SVD of ``L^T delta S`` with explicit Cholesky factors and solves.

The truncation error is measured under the same ridged Grams and held to ``(1 + 1e-6) * optimum + 1e-12 * total``
(design 2.5); a float32 result may add the rounding of its factors, ``2 eps |u| |v|`` elementwise.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from d2moe_ext import ops, reference
from d2moe_ext.reference.whitened_svd import cholesky_with_ridge

KINDS = ["none", "diagonal", "full", "few tokens", "zero channels", "zero"]
SHAPES = [(9, 6), (7, 7), (6, 9)]  # n < m, n = m, m < n: both forms of the decomposition


def random_gram(kind: str, batch: int, size: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor | None:
    if kind == "none":
        return None
    x = torch.randn(batch, 3 * size if kind != "few tokens" else (size + 1) // 2, size, generator=generator).double()
    x = x * torch.logspace(-1, 1, size, dtype=torch.float64)
    if kind == "zero channels":
        x[..., ::3] = 0
    gram = x.mT @ x * (0 if kind == "zero" else 1)
    return (gram.diagonal(dim1=1, dim2=2) if kind == "diagonal" else gram).to(dtype)


def factors(gram: Tensor | None, entry: int, size: int, ridge: float) -> Tensor:
    like = torch.empty(0, dtype=torch.float64)
    return cholesky_with_ridge(None if gram is None else gram[entry], size, ridge, like)[0]


def assert_optimal(
    delta: Tensor, rank: int, gram: Tensor | None = None, left_gram: Tensor | None = None, run=ops.whitened_svd
) -> None:
    """The truncation error of every entry is the least possible, and the singular values say what it is."""
    u, v, singular_values, _ = run(delta, rank, gram, left_gram)
    batch, m, n = delta.shape
    assert u.shape == (batch, m, rank)
    assert v.shape == (batch, rank, n)
    assert u.dtype == v.dtype == delta.dtype
    assert u.isfinite().all()
    assert v.isfinite().all()
    for b in range(batch):
        s, left = factors(gram, b, n, 1e-6), factors(left_gram, b, m, 0.1)
        expected = torch.linalg.svdvals(left.T @ delta[b].double() @ s)
        total, optimum = expected.square().sum(), expected[rank:].square().sum()
        # Eigenvalues of a Gram matrix: each is off by at most a few eps times their sum.
        assert ((singular_values[b].square() - expected.square()).abs() <= 1e-13 * total).all()
        error = torch.linalg.matrix_norm(left.T @ (delta[b].double() - u[b].double() @ v[b].double()) @ s)
        rounding = 2 * torch.finfo(delta.dtype).eps * (u[b].double().abs() @ v[b].double().abs())
        bound = ((1 + 1e-6) * optimum + 1e-12 * total).sqrt()
        if delta.dtype == torch.float32:
            bound = bound + torch.linalg.matrix_norm(left.T.abs() @ rounding @ s.abs())
        assert error <= bound


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    m=st.integers(1, 20),
    n=st.integers(1, 20),
    share=st.floats(0, 1),
    kind=st.sampled_from(KINDS),
    left_kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    gram_dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_truncation_error_is_optimal(batch, m, n, share, kind, left_kind, dtype, gram_dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(batch, m, n, generator=generator, dtype=torch.float64).to(dtype)
    gram = random_gram(kind, batch, n, gram_dtype, generator)
    left_gram = random_gram(left_kind, batch, m, gram_dtype, generator)
    assert_optimal(delta, round(share * min(m, n)), gram, left_gram)


@pytest.mark.parametrize("left_kind", ["none", "diagonal", "full"])
@pytest.mark.parametrize("kind", ["none", "diagonal", "full"])
@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.usefixtures("poisoned_memory")
def test_every_form_at_every_rank(m, n, kind, left_kind):
    generator = torch.Generator().manual_seed(m)
    delta = torch.randn(2, m, n, generator=generator, dtype=torch.float64)
    gram = random_gram(kind, 2, n, torch.float64, generator)
    left_gram = random_gram(left_kind, 2, m, torch.float64, generator)
    for rank in range(min(m, n) + 1):
        assert_optimal(delta, rank, gram, left_gram)


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize(("m", "n"), [(8, 1500), (1500, 8), (100, 130), (130, 100)])
def test_larger_than_a_block_of_the_gram(m, n, two_sided):
    generator = torch.Generator().manual_seed(n)
    delta = torch.randn(1, m, n, generator=generator)
    left_gram = random_gram("full", 1, m, torch.float32, generator) if two_sided else None
    assert_optimal(delta, 5, random_gram("full", 1, n, torch.float32, generator), left_gram)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_factors_are_the_references_where_they_are_unique(m, n):
    # Singular values 1, 1/2, 1/4, ... leave a gap at every rank, so the best approximation is unique.
    generator = torch.Generator().manual_seed(n)
    gram = random_gram("full", 1, n, torch.float64, generator)
    left_gram = random_gram("full", 1, m, torch.float64, generator)
    s, left = factors(gram, 0, n, 1e-6), factors(left_gram, 0, m, 0.1)
    left_vectors, _, right_vectors = torch.linalg.svd(torch.randn(m, n, generator=generator).double(), False)
    whitened = left_vectors * 0.5 ** torch.arange(min(m, n)) @ right_vectors
    delta = torch.linalg.solve(left.T, torch.linalg.solve(s, whitened, left=False))[None]
    for rank in range(min(m, n) + 1):
        u, v, singular_values, ridge_used = ops.whitened_svd(delta, rank, gram, left_gram)
        expected = reference.whitened_svd(delta, rank, gram, left_gram)
        torch.testing.assert_close(u @ v, expected[0] @ expected[1], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(singular_values, expected[2], rtol=1e-8, atol=0)
        assert torch.equal(ridge_used, expected[3])


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_error_falls_as_the_rank_rises_and_factors_are_nested(m, n, two_sided):
    generator = torch.Generator().manual_seed(1)
    delta = torch.randn(1, m, n, generator=generator, dtype=torch.float64)
    gram = random_gram("full", 1, n, torch.float64, generator)
    left_gram = random_gram("full", 1, m, torch.float64, generator) if two_sided else None
    s, left = factors(gram, 0, n, 1e-6), factors(left_gram, 0, m, 0.1)
    full_u, full_v, singular_values, _ = ops.whitened_svd(delta, min(m, n), gram, left_gram)
    assert (singular_values[0].diff() <= 0).all()
    errors = []
    for rank in range(min(m, n) + 1):
        u, v, _, _ = ops.whitened_svd(delta, rank, gram, left_gram)
        torch.testing.assert_close(u, full_u[..., :rank], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(v, full_v[:, :rank], rtol=1e-9, atol=1e-12)
        errors.append(torch.linalg.matrix_norm(left.T @ (delta - u @ v)[0] @ s).item() ** 2)
        squares = singular_values[0].square()
        assert abs(errors[-1] - squares[rank:].sum().item()) <= 1e-12 * squares.sum().item()
    assert all(later < earlier for earlier, later in pairwise(errors))


@pytest.mark.parametrize(("m", "n"), [(96, 64), (64, 96)])
def test_one_channel_a_million_times_larger(m, n):
    # Without the ridge in the error: a ridge of mean(diagonal) instead of the diagonal would cost 1.95 x the optimum.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, n, generator=generator, dtype=torch.float64) @ torch.randn(n, n, generator=generator).double()
    x[:, 3] *= 1e6
    delta = torch.randn(1, m, n, generator=generator, dtype=torch.float64)
    s = torch.linalg.cholesky(x.T @ x)
    expected = torch.linalg.svdvals(delta[0] @ s)
    for rank in (1, 8, 32):
        u, v, _, _ = ops.whitened_svd(delta, rank, (x.T @ x)[None])
        error = torch.linalg.matrix_norm((delta - u @ v)[0] @ s).item() ** 2
        assert error <= (1 + 1e-5) * expected[rank:].square().sum().item()


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_what_the_ridge_may_cost_without_it(m, n):
    # err_G <= err_ridged <= optimum_ridged <= error under the ridged Gram of the best factors under G.
    generator = torch.Generator().manual_seed(2)
    delta = torch.randn(1, m, n, generator=generator, dtype=torch.float64)
    gram = random_gram("full", 1, n, torch.float64, generator)
    s = torch.linalg.cholesky(gram[0])
    for rank in range(1, min(m, n)):
        u, v, _, _ = ops.whitened_svd(delta, rank, gram)
        best_u, best_v, _, _ = reference.whitened_svd(delta, rank, gram, ridge=0.0)
        missed = (delta - best_u @ best_v)[0]
        optimum = torch.linalg.matrix_norm(missed @ s) ** 2
        slack = 1e-6 * torch.linalg.matrix_norm(missed * gram[0].diagonal().sqrt()) ** 2
        assert torch.linalg.matrix_norm((delta - u @ v)[0] @ s) ** 2 <= (1 + 1e-6) * (optimum + slack)


@pytest.mark.parametrize("kind", ["diagonal", "full"])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_an_all_zero_gram_is_the_identity(m, n, kind):
    delta = torch.randn(2, m, n, generator=torch.Generator().manual_seed(3))
    gram = torch.zeros(2, n) if kind == "diagonal" else torch.zeros(2, n, n)
    left_gram = torch.zeros(2, m) if kind == "diagonal" else torch.zeros(2, m, m)
    plain = ops.whitened_svd(delta, 4)
    for got, expected in zip(ops.whitened_svd(delta, 4, gram, left_gram), plain, strict=True):
        assert torch.equal(got, expected)
    assert plain[3].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_a_diagonal_gram_equals_its_full_matrix(m, n):
    generator = torch.Generator().manual_seed(4)
    delta = torch.randn(2, m, n, generator=generator, dtype=torch.float64)
    gram, left_gram = torch.rand(2, n, generator=generator), torch.rand(2, m, generator=generator)
    gram[:, 1] = 0
    diagonal = ops.whitened_svd(delta, 3, gram, left_gram)
    full = ops.whitened_svd(delta, 3, gram.diag_embed(), left_gram.diag_embed())
    torch.testing.assert_close(diagonal[0] @ diagonal[1], full[0] @ full[1], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(diagonal[2], full[2], rtol=0, atol=1e-8 * full[2].max().item())
    assert torch.equal(diagonal[3], full[3])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_full_rank_gives_delta_back(m, n, kind):
    generator = torch.Generator().manual_seed(5)
    delta = torch.randn(1, m, n, generator=generator, dtype=torch.float64)
    gram = random_gram(kind, 1, n, torch.float64, generator)
    left_gram = random_gram(kind, 1, m, torch.float64, generator)
    u, v, _, _ = ops.whitened_svd(delta, min(m, n), gram, left_gram)
    # A dead channel has sqrt(ridge) = 1e-3 of the least live one's size, which costs that many digits.
    torch.testing.assert_close(u @ v, delta, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_a_zero_delta_has_zero_factors(m, n):
    u, v, singular_values, _ = ops.whitened_svd(torch.zeros(1, m, n), 3, torch.rand(1, n), torch.rand(1, m))
    assert not u.any()
    assert not v.any()
    assert not singular_values.any()


@pytest.mark.parametrize("gram_scale", [1e-200, 1e-60, 1e60, 1e200])
@pytest.mark.parametrize("delta_scale", [1e-30, 1e30])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_extreme_magnitudes_stay_finite(m, n, delta_scale, gram_scale):
    generator = torch.Generator().manual_seed(6)
    delta = torch.randn(1, m, n, generator=generator)
    gram = random_gram("full", 1, n, torch.float64, generator)
    u, v, singular_values, _ = ops.whitened_svd(delta, 3, gram)
    scaled = ops.whitened_svd(delta * delta_scale, 3, gram * gram_scale)
    # The scaled float32 input is rounded anew: eps per element of delta, here amplified by the Gram's spread of 1e2.
    torch.testing.assert_close(scaled[0] @ scaled[1] / delta_scale, u @ v, rtol=1e-3, atol=1e-4)
    expected = singular_values * delta_scale * math.sqrt(gram_scale)
    torch.testing.assert_close(scaled[2], expected, rtol=1e-4, atol=0)


def test_factors_share_their_magnitude():
    # Tiny activations would put 1e50 into v alone, which neither float32 nor a 16-bit checkpoint holds.
    delta = torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(7))
    u, v, _, _ = ops.whitened_svd(delta, 5, torch.full((1, 5), 1e-100, dtype=torch.float64))
    torch.testing.assert_close(u.abs().amax(1), v.abs().amax(2), rtol=1e-5, atol=0)


def correlated(size: int, correlation: float) -> Tensor:
    gram = torch.eye(size, dtype=torch.float64)
    gram[0, 1] = gram[1, 0] = correlation
    return gram[None]


@pytest.mark.parametrize(("excess", "expected"), [(0, 1e-6), (5e-6, 1e-5), (5e-5, 1e-4), (5e-4, 1e-3)])
def test_the_ridge_is_raised_until_cholesky_succeeds(excess, expected):
    delta = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    gram = correlated(3, 1 + excess)
    u, v, singular_values, ridge_used = ops.whitened_svd(delta, 2, gram)
    assert ridge_used.item() == pytest.approx(expected, rel=1e-12)
    assert reference.whitened_svd(delta, 2, gram)[3].item() == pytest.approx(expected, rel=1e-12)
    assert u.isfinite().all()
    s = torch.linalg.cholesky(gram[0] + expected * torch.eye(3, dtype=torch.float64))
    error = torch.linalg.matrix_norm((delta - u @ v)[0] @ s).item()
    assert error == pytest.approx(singular_values[0, 2].item(), rel=1e-6)


@pytest.mark.parametrize("side", ["gram", "left_gram"])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_a_hopeless_gram_is_refused_in_both_forms(m, n, side):
    gram = correlated(n if side == "gram" else m, 3000.0)
    delta = torch.randn(1, m, n, generator=torch.Generator().manual_seed(9))
    with pytest.raises(RuntimeError, match=f"^whitened_svd: {side} must be positive semi-definite up to a ridge of "):
        ops.whitened_svd(delta, 2, **{side: gram})


def assert_entries_are_independent(m: int, n: int, run=ops.whitened_svd) -> None:
    """A stack in which Grams of no token, Grams that need more ridge and ordinary ones take turns, against each entry alone."""
    generator = torch.Generator().manual_seed(14)
    ordinary = [random_gram("full", 12, size, torch.float64, generator) for size in (n, m)]
    gram, left_gram = ordinary
    inner, excess = (gram, 5e-5) if n <= m else (left_gram, 0.5)  # of the side that is factored
    inner[0::3] = 0
    inner[1::3] = correlated(inner.size(1), 1 + excess)
    delta = torch.randn(12, m, n, generator=generator, dtype=torch.float64)
    together = run(delta, 3, gram, left_gram)
    assert together[3].tolist() == pytest.approx([0.0, 1e-4, 1e-6] * 4 if n <= m else [1e-6] * 12, rel=1e-12, abs=0)
    for b in range(12):
        alone = ops.whitened_svd(delta[b : b + 1], 3, gram[b : b + 1], left_gram[b : b + 1])
        torch.testing.assert_close(together[0][b] @ together[1][b], alone[0][0] @ alone[1][0], rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(together[2][b], alone[2][0], rtol=0, atol=1e-7 * alone[2].max().item())
    assert_optimal(delta, 3, gram, left_gram, run)


@pytest.mark.parametrize(("m", "n"), [*SHAPES, (40, 30)])
@pytest.mark.usefixtures("poisoned_memory")
def test_entries_of_a_stack_are_independent(m, n):
    assert_entries_are_independent(m, n)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_entry_at_fault_is_named(m, n):
    gram, left_gram = torch.eye(n).expand(7, -1, -1).clone(), torch.eye(m).expand(7, -1, -1).clone()
    (gram if n <= m else left_gram)[5] = correlated(min(m, n), 3000.0)
    with pytest.raises(RuntimeError, match="without a Cholesky factor in batch entry 5"):
        ops.whitened_svd(torch.ones(7, m, n), 1, gram, left_gram)
    if m != n:
        gram, left_gram = torch.eye(n).expand(7, -1, -1).clone(), torch.eye(m).expand(7, -1, -1).clone()
        (left_gram if n <= m else gram)[6] = correlated(max(m, n), 3000.0)
        delta = torch.randn(7, m, n, generator=torch.Generator().manual_seed(15))
        with pytest.raises(RuntimeError, match="a negative eigenvalue in batch entry 6"):
            ops.whitened_svd(delta, 1, gram, left_gram)


def test_a_delta_without_energy_is_not_mistaken_for_a_bad_gram():
    # A float32 Gram of few tokens has eigenvalues a little below 0, and this delta meets nothing else.
    generator = torch.Generator().manual_seed(10)
    x = torch.randn(6, 30, generator=generator)
    null_space = torch.linalg.svd(x).Vh[6:]
    delta = (torch.randn(12, 24, generator=generator) @ null_space)[None]
    gram = (x.T @ x)[None]
    assert torch.linalg.eigvalsh(gram.double()).min() < 0
    u, v, singular_values, _ = ops.whitened_svd(delta, 12, gram)
    torch.testing.assert_close(u @ v, delta, rtol=0, atol=1e-4)
    assert singular_values.max() < 1e-2 * delta.norm()


def test_a_ridge_of_the_left_gram():
    delta = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    left_gram = torch.tensor([[4.0, 0.0, 1.0, 9.0, 0.0]])  # d = 4, 1, 1, 9, 1
    plain = ops.whitened_svd(delta, 4, left_gram=torch.tensor([[6.0, 0.5, 1.5, 13.5, 0.5]]), left_ridge=0.0)
    ridged = ops.whitened_svd(delta, 4, left_gram=left_gram, left_ridge=0.5)
    torch.testing.assert_close(ridged, plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_rank_zero_gives_only_singular_values(m, n):
    generator = torch.Generator().manual_seed(12)
    delta = torch.randn(2, m, n, generator=generator)
    gram = random_gram("full", 2, n, torch.float32, generator)
    u, v, singular_values, ridge_used = ops.whitened_svd(delta, 0, gram)
    assert u.shape == (2, m, 0)
    assert v.shape == (2, 0, n)
    torch.testing.assert_close(singular_values, ops.whitened_svd(delta, 2, gram)[2], rtol=1e-10, atol=0)
    assert ridge_used.tolist() == [1e-6, 1e-6]


def test_empty_inputs():
    for shape in ((0, 4, 3), (2, 0, 3), (2, 4, 0)):
        u, v, singular_values, ridge_used = ops.whitened_svd(torch.zeros(shape), 0)
        assert u.shape == (*shape[:2], 0)
        assert v.shape == (shape[0], 0, shape[2])
        assert singular_values.shape == (shape[0], min(shape[1:]))
        assert ridge_used.tolist() == [0.0] * shape[0]


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_views_and_batches(m, n):
    generator = torch.Generator().manual_seed(13)
    delta = torch.randn(3, 2 * n, m, generator=generator)[:, ::2].mT
    gram = random_gram("full", 3, n, torch.float32, generator).mT
    left_gram = random_gram("full", 6, m, torch.float32, generator)[::2]
    together = ops.whitened_svd(delta, 3, gram, left_gram)
    for b in range(3):
        alone = ops.whitened_svd(
            delta[b : b + 1].contiguous(), 3, gram[b : b + 1].contiguous(), left_gram[b : b + 1].contiguous()
        )
        for got, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(got[b : b + 1], expected, rtol=1e-5, atol=1e-6)
    assert_optimal(delta, 3, gram, left_gram)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("grams", [(None, None), ((2, 5), (2, 4)), ((2, 5, 5), (2, 4, 4))])
def test_opcheck(rank, grams):
    gram, left_gram = (None if shape is None else torch.eye(shape[-1]).expand(2, -1, -1) for shape in grams)
    if grams[0] == (2, 5):
        gram, left_gram = torch.rand(2, 5) + 1, torch.rand(2, 4) + 1
    arguments = (torch.rand(2, 4, 5), rank, gram, left_gram, 1e-6, 0.1)
    torch.library.opcheck(torch.ops.d2moe_ext.whitened_svd, arguments)


DELTA, NAN, INF = torch.ones(2, 4, 3), float("nan"), float("inf")


def spoiled(shape: tuple[int, ...], value: float) -> Tensor:
    tensor = torch.ones(shape)
    tensor.view(shape[0], -1)[1, 0] = value
    return tensor


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"delta": DELTA[0]}, "delta must have 3 dimensions, got shape [4, 3]"),
        ({"delta": DELTA.half()}, "delta must be float32 or float64, got Half"),
        ({"rank": 4}, "rank must be between 0 and min(m, n) = 3, got 4"),
        ({"rank": -1}, "rank must be between 0 and min(m, n) = 3, got -1"),
        ({"gram": torch.ones(2, 4)}, "gram must have shape [2, 3, 3] or [2, 3], got [2, 4]"),
        ({"left_gram": torch.ones(2, 3, 3)}, "left_gram must have shape [2, 4, 4] or [2, 4], got [2, 3, 3]"),
        ({"gram": torch.ones(2, 3).bfloat16()}, "gram must be float32 or float64, got BFloat16"),
        ({"left_gram": torch.ones(2, 4).int()}, "left_gram must be float32 or float64, got Int"),
        ({"gram": torch.ones(2, 3, device="meta")}, "gram must be on cpu like delta, got meta"),
        ({"left_gram": torch.ones(2, 4, device="meta")}, "left_gram must be on cpu like delta, got meta"),
        ({"ridge": -1.0}, "ridge must be finite and not negative, got -1"),
        ({"ridge": NAN}, "ridge must be finite and not negative, got nan"),
        ({"left_ridge": INF}, "left_ridge must be finite and not negative, got inf"),
        ({"delta": spoiled((2, 4, 3), NAN)}, "delta must be finite, got nan in batch entry 1"),
        ({"delta": spoiled((2, 4, 3), -INF)}, "delta must be finite, got -inf in batch entry 1"),
        ({"gram": spoiled((2, 3), NAN)}, "gram must be finite, got nan in batch entry 1"),
        ({"gram": spoiled((2, 3, 3), INF)}, "gram must be finite, got inf in batch entry 1"),
        ({"left_gram": spoiled((2, 4, 4), NAN)}, "left_gram must be finite, got nan in batch entry 1"),
        ({"gram": spoiled((2, 3), -2.0)}, "gram must have a non-negative diagonal, got -2 in batch entry 1"),
        (
            {"left_gram": spoiled((2, 4, 4), -2.0)},
            "left_gram must have a non-negative diagonal, got -2 in batch entry 1",
        ),
        (
            {"gram": correlated(3, 2.0).repeat(2, 1, 1)},
            "gram must be positive semi-definite up to a ridge of 0.001 times its diagonal, "
            "got a matrix without a Cholesky factor in batch entry 0",
        ),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(RuntimeError) as error:
        ops.whitened_svd(**{"delta": DELTA, "rank": 2, **arguments})
    assert str(error.value).splitlines()[0] == f"whitened_svd: {message}"
