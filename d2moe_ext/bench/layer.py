"""One layer, some numbers of tokens: contenders checked, timed in turn, and held against their floors."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d2moe_ext.bench.contenders import Contender, Routed
from d2moe_ext.bench.floors import Floors, Ruler
from d2moe_ext.bench.timing import Budget, SecondsOf, quartiles, time_contenders, wall_seconds

WRONG, FAILED = "wrong", "failed"
# Columns of the widest projection that is measured, to a power of two.
_LONGEST_SUM = 2**14


@dataclass(frozen=True)
class Setting:
    """What all cells of a measurement share.

    Attributes:
        gauges: what floors are measured with.
        budget: how many rounds.
        flush: called before each timed call.
        seconds_of: how a call is timed.
        failures_are_rows: whether a contender that fails, whatever it is and however it does, gives a row with a note; else an
            operator of our own that fails ends the measurement.
    """

    gauges: Ruler
    budget: Budget
    flush: Callable[[], None]
    seconds_of: SecondsOf = wall_seconds
    failures_are_rows: bool = False


def tolerance(dtype: torch.dtype, dynamic: bool) -> float:
    """How far an output may be from its reference's, relative to the norm of that.

    Each rounds intermediate results to the dtype a few times, and sums products in float32. With dynamic pruning,
    rounding may also exchange columns that weigh almost the same: a share of the dtype's precision of them, each of which
    costs its part of the squared norm.
    """
    precision = torch.finfo(dtype).eps
    limit = 4 * precision + 4 * math.sqrt(_LONGEST_SUM) * torch.finfo(torch.float32).eps
    return limit + (math.sqrt(2 * precision) if dynamic else 0.0)


def relative_error(output: Tensor, expected: Tensor) -> float:
    """``||output - expected|| / ||expected||``; infinite where either is not finite."""
    difference = torch.linalg.vector_norm(output.float() - expected.float())
    error = float(difference / torch.linalg.vector_norm(expected.float()).clamp(min=1e-30))
    return error if math.isfinite(error) else math.inf


@torch.no_grad()
def measure_cell(contenders: Sequence[Contender], inputs: Sequence[Routed], setting: Setting) -> list[dict[str, Any]]:
    """A row for each contender on inputs of one size.

    Every contender is first run once and compared with its reference; one that is wrong is not timed, and its row says so.
    Floors are measured in the same rounds: the rates in a row are the medians over them.

    Args:
        contenders: those timed together.
        inputs: taken in turn, all of one size.
        setting: what floors are measured with, rounds and the cache flush.
    """
    notes, errors = _check(contenders, inputs[0], setting.failures_are_rows)
    runs: dict[str, Callable[[Routed], object]] = {c.name: c.run for c in contenders if notes[c.name] is None}
    seconds: dict[str, list[float]] = {}
    dtype, floors = _dtype(inputs), setting.gauges.floors
    if runs:
        always = setting.gauges.runs(dtype)
        seconds = time_contenders(runs, inputs, setting.budget, setting.flush, always, setting.seconds_of)
        floors = setting.gauges.floors_of(seconds, dtype)
    best = min(
        (c.name for c in contenders if c.kind == "hf" and c.name in seconds),
        key=lambda name: statistics.median(seconds[name]),
        default=None,
    )
    rows = []
    for c in contenders:
        row: dict[str, Any] = {
            "tokens": inputs[0].hidden_states.shape[0],
            "dtype": dtype,
            "contender": c.name,
            "kind": c.kind,
        }
        row |= {"layer": c.layer, "dynamic": c.dynamic, "note": notes[c.name], "relative_error": errors.get(c.name)}
        row |= _floor(c, inputs, floors)
        row |= _times(seconds.get(c.name), seconds.get(best or ""), best, row["floor_ms"])
        row["saved_ms"] = _saved(c, contenders, seconds)
        rows.append(row | {"bandwidth": floors.bandwidth, "rate": floors.rates[dtype], "threads": floors.threads})
    return rows


def wrong_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those whose contender was not timed because its output was wrong."""
    return [row for row in rows if row["note"] and row["note"].startswith(WRONG)]


def _dtype(inputs: Sequence[Routed]) -> str:
    return str(inputs[0].hidden_states.dtype).removeprefix("torch.")


def _check(
    contenders: Sequence[Contender], routed: Routed, failures_are_rows: bool
) -> tuple[dict[str, str | None], dict[str, float]]:
    """By name: why it is not timed, or None; its relative error."""
    tolerated: type[Exception] = Exception if failures_are_rows else RuntimeError
    notes: dict[str, str | None] = {}
    errors: dict[str, float] = {}
    expected: dict[str, Tensor] = {}
    for c in contenders:
        notes[c.name] = c.skip(routed)
        if notes[c.name] is not None:
            continue
        try:
            output = c.run(routed)
        except tolerated as error:
            if c.kind != "hf" and not failures_are_rows:
                raise
            notes[c.name] = failure(error)  # an implementation that this machine or layer is not made for
            continue
        reference = c.reference
        if reference is None:
            expected[c.name] = output
            continue
        try:
            if reference.name not in expected:
                expected[reference.name] = reference.run(routed)
        except tolerated as error:
            if not failures_are_rows:
                raise
            notes[c.name] = f"not compared: {reference.name} {failure(error)}"
            continue
        errors[c.name] = relative_error(output, expected[reference.name])
        limit = tolerance(routed.hidden_states.dtype, c.dynamic)
        if errors[c.name] > limit:
            notes[c.name] = f"{WRONG}: differs from {reference.name} by {errors[c.name]:.1e}, more than {limit:.1e}"
    return notes, errors


def failure(error: Exception) -> str:
    """A note's text: the first line, as torch goes on with lists of everything that it could have done."""
    message = next(iter(str(error).splitlines()), "")
    return f"{FAILED}: {message}" if isinstance(error, RuntimeError) else f"{FAILED}: {type(error).__name__}: {message}"


def _floor(contender: Contender, inputs: Sequence[Routed], floors: Floors) -> dict[str, Any]:
    """Means over the routings that are taken in turn."""
    costs = [contender.cost(routed.top_k_index) for routed in inputs]
    return {
        "bytes": round(statistics.mean(cost.bytes for cost in costs)),
        "flops": round(statistics.mean(cost.flops for cost in costs)),
        "floor_ms": 1e3 * statistics.mean(floors.seconds(cost, _dtype(inputs)) for cost in costs),
    }


def _saved(contender: Contender, contenders: Sequence[Contender], seconds: dict[str, list[float]]) -> float | None:
    """What pruning by the batch takes off the same layer's time, in ms: the median over rounds of the difference."""
    same = (contender.layer, contender.kind)
    static = [c.name for c in contenders if not c.dynamic and (c.layer, c.kind) == same and c.name in seconds]
    if not contender.dynamic or contender.name not in seconds or not static:
        return None
    pairs = zip(seconds[static[0]], seconds[contender.name], strict=False)
    return 1e3 * statistics.median(whole - pruned for whole, pruned in pairs)


def _times(mine: list[float] | None, best: list[float] | None, best_name: str | None, floor_ms: float) -> dict[str, Any]:
    """Median and quartiles, the share that the floor is of the median, and the ratio to the best of transformers' contenders:
    the median, over the rounds that both have, of its time divided by this one's."""
    names = ("median_ms", "low_ms", "high_ms", "rounds", "share_of_floor", "speed_over_hf", "best_hf")
    if mine is None:
        return dict.fromkeys(names) | {"rounds": 0}
    low, middle, high = (1e3 * value for value in quartiles(mine))
    speed = None if best is None else statistics.median(b / m for b, m in zip(best, mine, strict=False))
    return dict(zip(names, (middle, low, high, len(mine), floor_ms / middle, speed, best_name), strict=True))
