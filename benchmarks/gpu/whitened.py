"""``whitened_svd`` on stacks of deltas, against ``torch.linalg.svd`` of the same whitened matrices, one after the other."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.timing import Stopwatch
from d2moe_ext import ops
from d2moe_ext.bench.layer import WRONG
from d2moe_ext.reference.whitened_svd import cholesky_with_ridge

OPERATOR = "whitened_svd"
# Deltas, rows, columns.
STACKS = ((8, 1408, 2048), (4, 4096, 1024), (16, 768, 2048))
RIDGE = 1e-6
# How much more a truncation may leave out than the best one.
ERROR_LIMIT = 1.001
_ROUNDS = 3


def case_of(stack: tuple[int, int, int]) -> str:
    """A stack's name in the table."""
    return f"float32, {stack[0]} of {stack[1]} x {stack[2]}, a quarter of the ranks"


@torch.no_grad()
def measure_whitened_svd(stack: tuple[int, int, int], watch: Stopwatch) -> dict[str, Any]:
    """One row: both times, their ratio, and the truncation's error over the best one's.

    The loop computes all singular vectors, as it cannot do otherwise, of matrices that are whitened already; the operator
    whitens them, and takes the whitening out of its factors again.
    """
    count, rows, columns = stack
    delta = torch.randn(count, rows, columns, device=watch.device)
    x = torch.randn(count, 2 * columns, columns, device=watch.device)
    gram = x.transpose(1, 2) @ x
    del x
    rank = min(rows, columns) // 4
    factors = [cholesky_with_ridge(entry, columns, RIDGE, entry)[0] for entry in gram]
    whitened = [entry.double() @ factor for entry, factor in zip(delta, factors, strict=True)]
    u, v, _, _ = ops.whitened_svd(delta, rank, gram, ridge=RIDGE)
    torch.linalg.svd(whitened[0], full_matrices=False)  # not counted: sets up the library
    found: list[Tensor] = []
    loop = watch.waited("", lambda: found.extend(torch.linalg.svd(entry, full_matrices=False).S for entry in whitened))
    worst = 0.0
    for b, sigma in enumerate(found):
        left = (delta[b].double() - u[b].double() @ v[b].double()) @ factors[b]
        worst = max(worst, float(torch.linalg.vector_norm(left) / torch.linalg.vector_norm(sigma[rank:])))
    row: dict[str, Any] = {"operator": OPERATOR, "case": case_of(stack), "ceiling": None, "error_over_best": worst}
    row |= {"loop_ms": 1e3 * loop, "median_ms": None, "speedup": None, "note": None}
    if not worst <= ERROR_LIMIT:
        return row | {"note": f"{WRONG}: leaves out {worst:.4f} times what the best truncation does, more than {ERROR_LIMIT}"}
    seconds = [watch.waited("", lambda: ops.whitened_svd(delta, rank, gram, ridge=RIDGE)) for _ in range(_ROUNDS)]
    median = statistics.median(seconds)
    return row | {"median_ms": 1e3 * median, "rounds": _ROUNDS, "speedup": loop / median}
