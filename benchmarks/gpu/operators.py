"""The operators one by one: what each must read, write and multiply, and how long it takes.

An operator is compared with its reference before it is timed. ``share`` is the least time at the ceiling that it is held
against, over its own; bytes and FLOPs are those that cannot be helped:

    gram_update_    T n (n + 1) FLOPs: one triangle of the Gram matrix; the other is copied
    fisher_merge_   both sums read and written, weight and gradient read
    column_select   hidden_states read
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.timing import Stopwatch
from d2moe_ext import ops, reference
from d2moe_ext.bench.costs import Cost
from d2moe_ext.bench.layer import WRONG, relative_error
from d2moe_ext.bench.timing import quartiles, time_rounds

KIND = "operator"
ROUNDS = 30
TOKENS, FEATURES = 8192, 4096
WEIGHT = (14336, 4096)
# Sums of thousands of products in float32.
_LIMIT = 1e-4


@dataclass(frozen=True)
class Prepared:
    """An operator with its tensors on the device.

    Attributes:
        run: one call.
        error: of the first call, relative to the reference.
        cost: the least that a call costs.
    """

    run: Callable[[], object]
    error: float
    cost: Cost


@dataclass(frozen=True)
class Case:
    """One line of the table of operators.

    Attributes:
        operator: its name.
        case: its sizes and dtype.
        ceiling: what it is held against: ``copy``, ``bfloat16`` (the rate of products), or None for its time alone.
        prepare: from a device's name.
        graph: whether it is recorded in a graph; calls of several short kernels otherwise take as long as launching them.
    """

    operator: str
    case: str
    ceiling: str | None
    prepare: Callable[[str], Prepared]
    graph: bool = False

    @property
    def name(self) -> str:
        """Operator and case."""
        return f"{self.operator}, {self.case}"


def _gram_update(device: str) -> Prepared:
    x = torch.randn(TOKENS, FEATURES, device=device).bfloat16()
    gram = torch.zeros(FEATURES, FEATURES, device=device)
    ops.gram_update_(gram, x)
    error = relative_error(gram, x.float().T @ x.float())
    cost = Cost(0, TOKENS * FEATURES * (FEATURES + 1))
    return Prepared(lambda: ops.gram_update_(gram, x), error, cost)


def _fisher_merge(device: str) -> Prepared:
    sums = [torch.rand(WEIGHT, device=device) for _ in range(2)]
    weight, gradient = (torch.randn(WEIGHT, device=device).bfloat16() for _ in range(2))
    expected = [value.clone() for value in sums]
    reference.fisher_merge_(*expected, weight, gradient, 0.5)
    ops.fisher_merge_(*sums, weight, gradient, 0.5)
    error = max(relative_error(found, right) for found, right in zip(sums, expected, strict=True))
    read = sum(value.nbytes for value in (*sums, weight, gradient))
    cost = Cost(read + sum(value.nbytes for value in sums), 0)
    return Prepared(lambda: ops.fisher_merge_(*sums, weight, gradient, 0.5), error, cost)


def _column_select(tokens: int, features: int) -> Callable[[str], Prepared]:
    def prepare(device: str) -> Prepared:
        x, norms = torch.randn(tokens, features, device=device).bfloat16(), torch.rand(features, device=device) + 0.5
        keep = features // 2
        scores, selected = ops.column_select(x, norms, keep)
        expected, _ = reference.column_select(x, norms, keep)
        best = scores.sort(descending=True).values[:keep]
        error = max(relative_error(scores, expected), relative_error(scores[selected.long()].sum(), best.sum()))
        return Prepared(lambda: ops.column_select(x, norms, keep), error, Cost(x.nbytes, 0))

    return prepare


CASES = (
    Case("gram_update_", f"bfloat16 into float32, T = {TOKENS}, n = {FEATURES}", "bfloat16", _gram_update),
    Case("fisher_merge_", f"bfloat16 into float32, {WEIGHT[0]} x {WEIGHT[1]}", "copy", _fisher_merge),
    Case("column_select", "bfloat16, T = 4096, n = 4096", "copy", _column_select(4096, 4096)),
    Case("column_select", "bfloat16, T = 4096, n = 14336", "copy", _column_select(4096, 14336)),
    Case("column_select", "bfloat16, T = 1, n = 4096, in a graph", None, _column_select(1, 4096), graph=True),
)


@torch.no_grad()
def measure_operator(case: Case, ceilings: dict[str, Any], watch: Stopwatch) -> dict[str, Any]:
    """One row; its ``note`` says where the output was wrong, and then it was not timed."""
    prepared = case.prepare(watch.device)
    row: dict[str, Any] = {"operator": case.operator, "case": case.case, "ceiling": case.ceiling}
    row |= {"bytes": prepared.cost.bytes, "flops": prepared.cost.flops, "relative_error": prepared.error}
    row |= {"note": None, "share": None, "median_ms": None}
    if prepared.error > _LIMIT:
        return row | {"note": f"{WRONG}: differs from its reference by {prepared.error:.1e}, more than {_LIMIT:.1e}"}
    run = watch.record([prepared.run])[0] if case.graph else prepared.run
    times = time_rounds({case.name: lambda _: run()}, [None], ROUNDS, watch.flush, seconds_of=watch.queued)[case.name]
    low, middle, high = quartiles(times)
    row |= {"median_ms": 1e3 * middle, "low_ms": 1e3 * low, "high_ms": 1e3 * high, "rounds": len(times)}
    if case.ceiling is not None:
        amount = prepared.cost.bytes or prepared.cost.flops
        row["share"] = amount / ceilings[case.ceiling] / middle
    return row
