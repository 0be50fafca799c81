"""SVD-LLM, the ranks of a budget, and MoBE's fit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from baseline_cases import EXPERTS, HIDDEN, INTER, prepared
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.baselines.basis_fit import (
    Mixture,
    Target,
    alternate,
    improve_bases,
    solve_left,
    solve_weights,
    start,
)
from benchmarks.baselines.mobe import Group, mobe
from benchmarks.baselines.ranks import Matrix, ranks_within, truncate
from d2moe_ext.adapters import find_experts

E, P, Q = 4, 7, 9


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.floats(0.1, 5.0)), min_size=1, max_size=6),
    st.floats(0.0, 1.2),
)
def test_ranks_stay_within_the_budget_and_near_it(shapes: list[tuple[int, int, float]], share: float) -> None:
    matrices = [Matrix(*shape) for shape in shapes]
    parameters = int(share * sum(m.rows * m.columns for m in matrices))
    ranks = ranks_within(matrices, parameters)
    costs = [min(r * (m.rows + m.columns), m.rows * m.columns) for m, r in zip(matrices, ranks, strict=True)]
    assert sum(costs) <= parameters
    for matrix, rank in zip(matrices, ranks, strict=True):
        assert 0 <= rank <= min(matrix.rows, matrix.columns)
    if any(rank < min(m.rows, m.columns) for m, rank in zip(matrices, ranks, strict=True)):
        assert parameters - sum(costs) < sum(m.rows + m.columns for m in matrices)
    else:
        assert parameters >= sum(m.rows * m.columns for m in matrices)


def test_equal_matrices_get_ranks_that_differ_by_one_at_most() -> None:
    ranks = ranks_within([Matrix(20, 30)] * 5, 5 * 7 * 50 + 130)
    assert sorted(ranks, reverse=True) == [8, 8, 7, 7, 7]
    assert ranks_within([Matrix(20, 30)] * 2, 1200) == [20, 20]
    with pytest.raises(ValueError, match="must be at least 0, got -1"):
        ranks_within([Matrix(2, 2)], -1)


def gram_by_hand(calibration, name: str, expert: int, view) -> np.ndarray:
    """The shrunk Gram of design section 2.5, from the sums of the calibration, with the ridge."""
    stats = calibration.stats.layers[view.name]
    n = int(stats.tokens[expert])
    if name == "down":
        gram = stats.gram_down[expert].numpy()
        rows = n or len(stats.pooled_sample)
        shrunk = (gram + 32 * np.eye(len(gram)) * np.trace(gram) / len(gram) / rows) / (rows + 32)
    else:
        pooled = stats.gram_gate_up.sum(0).numpy() / int(stats.tokens.sum())
        shrunk = (stats.gram_gate_up[expert].numpy() + 32 * pooled) / (n + 32)
    return shrunk + 1e-6 * np.diag(np.diag(shrunk))


@pytest.mark.parametrize("name", ["gate", "up", "down"])
def test_the_error_of_a_truncated_projection_is_the_tail_of_the_singular_values(name: str) -> None:
    model, calibration = prepared("mixtral")
    view = find_experts(model)[0]
    tokens = calibration.stats.layers[view.name].tokens
    for expert in (int(tokens.argmax()), int(tokens.argmin())):
        gate, up = view.gate_up_weight(expert).detach().double().clone().chunk(2)
        weight = {"gate": gate, "up": up, "down": view.down_weight(expert).detach().double().clone()}[name].numpy()
        truncate(view, calibration.stats.layers[view.name], expert, {"gate": 6, "up": 6, "down": 6})
        gate, up = view.gate_up_weight(expert).detach().double().chunk(2)
        written = {"gate": gate, "up": up, "down": view.down_weight(expert).detach().double()}[name].numpy()
        factor = np.linalg.cholesky(gram_by_hand(calibration, name, expert, view))
        tail = np.linalg.svd(weight @ factor, compute_uv=False)[6:]
        error = np.linalg.norm((weight - written) @ factor)
        assert error >= np.linalg.norm(tail) * (1 - 1e-6)
        # Factors are stored in bfloat16: their rounding adds to the error, at most 2^-8 of what they hold, twice.
        assert error <= np.linalg.norm(tail) + 2 * 2**-8 * np.linalg.norm(weight @ factor)


def random_target(seed: int, side: str | None) -> Target:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(E, P, Q, generator=generator, dtype=torch.float64)
    size = {"left": P, "right": Q}.get(side, 1)
    x = torch.randn(E, 40, size, generator=generator, dtype=torch.float64) * torch.linspace(0.3, 2, size, dtype=torch.float64)
    gram = x.mT @ x * torch.tensor([1.0, 3.0, 0.1, 2.0], dtype=torch.float64)[:, None, None]
    return Target(weight, gram if side == "left" else None, gram if side == "right" else None)


def metric_factors(target: Target) -> tuple[Tensor, Tensor]:
    """``Lᵀ`` and ``S`` per expert, with ``L Lᵀ`` and ``S Sᵀ`` the metrics: the error is ``‖Lᵀ (W − A B) S‖²``."""
    eye = torch.eye(P, dtype=torch.float64).expand(E, P, P), torch.eye(Q, dtype=torch.float64).expand(E, Q, Q)
    left = eye[0] if target.left_metric is None else torch.linalg.cholesky(target.left_metric).mT
    right = eye[1] if target.right_metric is None else torch.linalg.cholesky(target.right_metric)
    return left, right


def random_mixture(seed: int, rank: int = 3, num_bases: int = 2) -> Mixture:
    generator = torch.Generator().manual_seed(seed)
    shapes = (E, P, rank), (E, num_bases), (num_bases, rank, Q)
    return Mixture(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes))


SIDES = ["left", "right", None]


@pytest.mark.parametrize("side", SIDES)
def test_the_error_is_the_weighted_norm_of_the_residual(side: str | None) -> None:
    target, mixture = random_target(1, side), random_mixture(2)
    left, right = metric_factors(target)
    residual = sum(
        float((left[e] @ (target.weight[e] - mixture.left[e] @ sum(
            mixture.weights[e, j] * mixture.bases[j] for j in range(2)
        )) @ right[e]).square().sum())
        for e in range(E)
    )  # fmt: skip
    size = sum(float((left[e] @ target.weight[e] @ right[e]).square().sum()) for e in range(E))
    assert target.error(mixture) == pytest.approx(residual / size, rel=1e-9)


@pytest.mark.parametrize("side", SIDES)
def test_the_left_factor_is_the_least_squares_one(side: str | None) -> None:
    target, mixture = random_target(3, side), random_mixture(4)
    _, right = metric_factors(target)
    found = solve_left(target, mixture.mixed())
    for e in range(E):
        expected = np.linalg.lstsq((mixture.mixed()[e] @ right[e]).mT.numpy(), (target.weight[e] @ right[e]).mT.numpy())[0].T
        np.testing.assert_allclose(found[e].numpy(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("side", SIDES)
def test_the_mixing_weights_are_the_least_squares_ones(side: str | None) -> None:
    target, mixture = random_target(5, side), random_mixture(6)
    left, right = metric_factors(target)
    found = solve_weights(target, mixture.left, mixture.bases)
    for e in range(E):
        columns = [(left[e] @ mixture.left[e] @ basis @ right[e]).flatten().numpy() for basis in mixture.bases]
        wanted = (left[e] @ target.weight[e] @ right[e]).flatten().numpy()
        np.testing.assert_allclose(found[e].numpy(), np.linalg.lstsq(np.stack(columns, 1), wanted)[0], rtol=1e-6)


@pytest.mark.parametrize("side", SIDES)
def test_the_bases_reach_the_least_squares_ones(side: str | None) -> None:
    target, mixture = random_target(7, side), random_mixture(8)
    left, right = metric_factors(target)
    blocks = []
    for e in range(E):
        # vec of Lᵀ A (Σ α_j B_j) S over row-major entries of all bases.
        one = torch.kron(left[e] @ mixture.left[e], right[e].mT.contiguous())
        blocks.append(torch.cat([mixture.weights[e, j] * one for j in range(2)], dim=1))
    design = torch.cat(blocks).numpy()
    wanted = torch.cat([(left[e] @ target.weight[e] @ right[e]).flatten() for e in range(E)]).numpy()
    expected = np.linalg.lstsq(design, wanted)[0].reshape(2, 3, Q)
    found = improve_bases(target, mixture, steps=400)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("rank", "num_bases"), [(2, 1), (3, 2), (4, 3), (3, 4)])
def test_the_error_never_rises(side: str | None, rank: int, num_bases: int) -> None:
    target = random_target(9, side)
    mixture, errors = alternate(target, start(target, rank, num_bases), 12)
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(errors))
    assert errors[-1] < errors[0] or num_bases in (1, 4)
    assert target.error(mixture) == pytest.approx(errors[-1], rel=1e-9)


@pytest.mark.parametrize("side", SIDES)
def test_a_mixture_is_found_again(side: str | None) -> None:
    target, truth = random_target(10, side), random_mixture(11, rank=2, num_bases=2)
    exact = Target(truth.product(), target.left_metric, target.right_metric)
    generator = torch.Generator().manual_seed(12)
    near = Mixture(truth.left, truth.weights, truth.bases + 0.05 * torch.randn(2, 2, Q, generator=generator).double())
    _, errors = alternate(exact, near, 60)
    assert errors[-1] < 1e-3 * errors[0]


def test_one_basis_without_metric_is_the_truncated_svd_of_the_stack() -> None:
    target = random_target(13, None)
    sigma = np.linalg.svd(target.weight.reshape(E * P, Q).numpy(), compute_uv=False)
    assert target.error(start(target, 3, 1)) == pytest.approx(float((sigma[3:] ** 2).sum() / (sigma**2).sum()), rel=1e-9)


def test_down_is_fitted_transposed_in_its_own_metric() -> None:
    model, calibration = prepared("mixtral")
    view = find_experts(model)[0]
    target = Group(view, calibration.stats.layers[view.name], "down").target()
    assert target.weight.shape == (EXPERTS, INTER, HIDDEN)
    torch.testing.assert_close(target.weight[2], view.down_weight(2).detach().double().T)
    assert target.right_metric is None
    tokens = calibration.stats.layers[view.name].tokens
    gram = torch.from_numpy(gram_by_hand(calibration, "down", 2, view)) * (int(tokens[2]) + 32)
    torch.testing.assert_close(target.left_metric[2], gram, rtol=1e-4, atol=1e-9)


def test_mobe_writes_what_it_stores() -> None:
    model, calibration = prepared("mixtral")
    mobe(model, calibration, 0.5)
    view = find_experts(model)[0]
    gate = view.gate_up_weight(0).detach().double().chunk(2)[0]
    rank = int(torch.linalg.matrix_rank(gate, rtol=1e-5))
    assert 0 < rank < HIDDEN
    down = [view.down_weight(e).detach().double() for e in range(EXPERTS)]
    assert all(int(torch.linalg.matrix_rank(w, rtol=1e-5)) < HIDDEN for w in down)
