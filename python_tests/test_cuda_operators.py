"""The operators on a GPU against the float64 references, by the rules of the CPU's own tests."""

from __future__ import annotations

import pytest
import torch
from gpu import DEVICE
from test_column_select import FORWARD, assert_selected
from test_fisher_merge import FLOATS, assert_merged
from test_gram_update import assert_updated, random_symmetric
from test_whitened_svd import KINDS, SHAPES, assert_entries_are_independent, assert_optimal, random_gram

from d2moe_ext import ops

pytestmark = pytest.mark.cuda


def on_gpu(value, layout="plain"):
    if layout == "transposed":
        return value.T.contiguous().to(DEVICE).T
    if layout == "sliced":
        return torch.nn.functional.pad(value, (3, 2)).to(DEVICE)[:, 3:-2]
    return value.to(DEVICE)


@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced"])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 7), (64, 64), (301, 1033), (2048, 1536)])
@pytest.mark.parametrize("sums", [torch.float32, torch.float64])
@pytest.mark.usefixtures("poisoned_memory")
def test_fisher_merge(shape, layout, sums):
    generator = torch.Generator().manual_seed(3)
    for weight_dtype in FLOATS:
        for gradient_dtype in FLOATS:
            values = [torch.randn(shape, generator=generator).to(d) for d in (sums, sums, weight_dtype, gradient_dtype)]
            weighted, fishers, weight, gradient = (on_gpu(value, layout) for value in values)
            before = weighted.clone(), fishers.clone()
            ops.fisher_merge_(weighted, fishers, weight, gradient, 0.37)
            assert_merged(before, (weighted, fishers), weight, gradient, 0.37)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_fisher_merge_off_the_vectors_boundary(offset):
    generator = torch.Generator().manual_seed(offset)
    flat = [torch.randn(1000, generator=generator).to(DEVICE)[offset : offset + 990].view(10, 99) for _ in range(4)]
    before = flat[0].clone(), flat[1].clone()
    ops.fisher_merge_(*flat, 1.5)
    assert_merged(before, (flat[0], flat[1]), flat[2], flat[3], 1.5)


@pytest.mark.parametrize("n", [1, 31, 33, 257, 1023, 1025, 2100])
@pytest.mark.parametrize("num_tokens", [1, 7, 300])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.usefixtures("poisoned_memory")
def test_gram_update(n, num_tokens, weighted):
    generator = torch.Generator().manual_seed(n)
    for gram_dtype in (torch.float32, torch.float64):
        for dtype in FLOATS:
            x = torch.randn(num_tokens, n, generator=generator).to(dtype).to(DEVICE)
            weights = torch.randn(num_tokens, generator=generator).to(DEVICE) if weighted else None
            gram = random_symmetric(n, gram_dtype, generator).to(DEVICE)
            before = gram.clone()
            ops.gram_update_(gram, x, weights)
            assert_updated(before, gram, x, weights)


@pytest.mark.real_gpu
def test_gram_update_never_multiplies_in_tf32():
    generator = torch.Generator().manual_seed(4)
    x, gram = torch.randn(500, 96, generator=generator).to(DEVICE), torch.zeros(96, 96).to(DEVICE)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        ops.gram_update_(gram, x)
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    assert_updated(torch.zeros_like(gram), gram, x, None)


@pytest.mark.parametrize("dtype", FORWARD)
@pytest.mark.parametrize("in_features", [1, 8, 250, 1024, 5003, 32768])
@pytest.mark.parametrize("num_tokens", [0, 1, 33, 700])
@pytest.mark.usefixtures("poisoned_memory")
def test_column_select(dtype, in_features, num_tokens):
    generator = torch.Generator().manual_seed(in_features)
    for levels in (2, 1000):  # two levels only make for many exact ties
        x = torch.randint(-levels, levels + 1, (num_tokens, in_features), generator=generator).to(dtype).to(DEVICE)
        norms = torch.randint(0, levels + 1, (in_features,), generator=generator).float().to(DEVICE)
        columns = torch.randperm(in_features, generator=generator)[: (in_features + 1) // 2].sort().values.int().to(DEVICE)
        for keep in (0, 1, in_features // 2, in_features):
            assert_selected(x, norms, keep)
        assert_selected(x, norms[: len(columns)], len(columns) // 2, columns)


def test_column_select_of_what_is_not_finite():
    x = torch.tensor([[1.0, float("nan"), 3.0, float("inf"), 2.0]]).to(DEVICE)
    assert_selected(x, torch.ones(5).to(DEVICE), 3)


def test_column_select_is_safe_for_any_column():
    columns = torch.tensor([-5, 2, 1 << 30, 0], dtype=torch.int32).to(DEVICE)
    scores, selected = ops.column_select(torch.tensor([[1.0, 2.0, 3.0]]).to(DEVICE), torch.ones(4).to(DEVICE), 2, columns)
    assert scores.tolist() == [0.0, 3.0, 0.0, 1.0]
    assert selected.tolist() == [1, 3]


@pytest.mark.real_gpu
def test_column_select_is_captured_in_a_graph():
    x, norms = torch.randn(700, 4096).to(DEVICE), torch.rand(4096).to(DEVICE)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ops.column_select(x, norms, 2000)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores, selected = ops.column_select(x, norms, 2000)
    x.copy_(torch.randn(700, 4096))
    graph.replay()
    expected = ops.column_select(x, norms, 2000)
    assert torch.equal(scores, expected[0])
    assert torch.equal(selected, expected[1])


def svd_on_gpu(delta, rank, gram, left_gram):
    grams = [None if value is None else value.to(DEVICE) for value in (gram, left_gram)]
    found = ops.whitened_svd(delta.to(DEVICE), rank, *grams)
    assert all(value.device.type == DEVICE for value in found)
    return tuple(value.cpu() for value in found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1), (40, 130), (130, 40)])
@pytest.mark.usefixtures("poisoned_memory")
def test_whitened_svd(shape, kind):
    generator = torch.Generator().manual_seed(5)
    m, n = shape
    for dtype in (torch.float32, torch.float64):
        delta = torch.randn(3, m, n, generator=generator, dtype=torch.float64).to(dtype)
        gram, left_gram = random_gram(kind, 3, n, dtype, generator), random_gram("diagonal", 3, m, dtype, generator)
        for rank in (0, 1, min(m, n)):
            assert_optimal(delta, rank, gram, None, svd_on_gpu)
            assert_optimal(delta, rank, gram, left_gram, svd_on_gpu)


@pytest.mark.parametrize(("m", "n"), [*SHAPES, (40, 30)])
@pytest.mark.usefixtures("poisoned_memory")
def test_whitened_svd_of_entries_that_differ(m, n):
    assert_entries_are_independent(m, n, svd_on_gpu)


@pytest.mark.parametrize(("m", "n"), [(700, 600), (600, 700)])  # above what is done in one call for the stack
@pytest.mark.parametrize("kind", ["none", "full", "few tokens"])
@pytest.mark.usefixtures("poisoned_memory")
def test_whitened_svd_of_large_matrices(m, n, kind):
    generator = torch.Generator().manual_seed(6)
    delta = torch.randn(2, m, n, generator=generator)
    gram, left_gram = (random_gram(kind, 2, size, torch.float32, generator) for size in (n, m))
    assert_optimal(delta, 100, gram, left_gram, svd_on_gpu)
    assert_optimal(delta, 0, gram, None, svd_on_gpu)


@pytest.mark.real_gpu
def test_whitened_svd_of_more_than_is_worked_on_at_a_time():
    generator = torch.Generator("cuda").manual_seed(7)
    delta = torch.randn(1200, 300, 260, generator=generator, device="cuda")  # some 340 of them are
    x = torch.randn(1200, 400, 260, generator=generator, device="cuda")
    gram = x.mT @ x
    del x
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    together = ops.whitened_svd(delta, 20, gram)
    results = sum(value.nbytes for value in together)
    assert torch.cuda.max_memory_allocated() - before - results <= 4 << 30
    for b in (0, 339, 340, 600, 1199):
        alone = ops.whitened_svd(delta[b : b + 1], 20, gram[b : b + 1])
        torch.testing.assert_close(together[0][b] @ together[1][b], alone[0][0] @ alone[1][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together[2][b], alone[2][0], rtol=1e-9, atol=0)


def test_whitened_svd_refuses_what_is_not_finite():
    delta = torch.ones(2, 3, 3).to(DEVICE)
    delta[1, 0, 2] = float("nan")
    with pytest.raises(RuntimeError, match=r"whitened_svd: delta must be finite, got nan in batch entry 1"):
        ops.whitened_svd(delta, 1)


@pytest.mark.real_gpu
@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_tensors_on_two_devices_are_refused(first):
    other = "cuda" if first == "cpu" else "cpu"
    x, y = torch.ones(4, 4, device=first), torch.ones(4, 4, device=other)
    calls = [
        lambda: ops.column_select(x, y[0], 2),
        lambda: ops.gram_update_(x, y),
        lambda: ops.fisher_merge_(x, x, y, x, 1.0),
        lambda: ops.whitened_svd(x[None], 1, y[None]),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=f"must be on {first}.* got {other}"):
            call()
