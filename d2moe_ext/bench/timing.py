"""Contenders timed in turn, round by round, with cold caches.

Every round runs each contender once on the same inputs, so that a machine that slows down slows all of them, and a ratio is
taken within rounds. Before each call a buffer several times larger than the last-level cache is read, and rounds take
several routings in turn: a layer of a real model finds nothing of its weights in the cache either.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from d2moe_ext.bench.machine import last_level_cache

Inputs = TypeVar("Inputs")
# From a contender's name and a call of it to the seconds that the call takes.
SecondsOf = Callable[[str, Callable[[], object]], float]

CACHES_READ = 4
_LEAST_FLUSH = 32 * 2**20


@dataclass(frozen=True)
class Budget:
    """How often a set of contenders is run.

    Attributes:
        repeats: rounds at most.
        seconds: rounds end once the timed calls have taken this long together.
        least: rounds at least, however long they take.
    """

    repeats: int = 30
    seconds: float = 10.0
    least: int = 3

    def rounds(self, one_round: float, inputs: int) -> int:
        """How many rounds of ``one_round`` seconds: a multiple of ``inputs``, so that each is used equally often, unless fewer
        repeats were asked for."""
        wanted = min(self.repeats, int(self.seconds / max(one_round, 1e-9)))
        wanted = max(min(self.least, self.repeats), wanted)
        return max(wanted // inputs * inputs, min(inputs, self.repeats))


class CacheFlush:
    """Reads a buffer that takes the place of whatever the caches held. Reading leaves nothing to be written back later,
    which a timed call would pay for."""

    def __init__(self, size: int | None = None) -> None:
        size = max(CACHES_READ * last_level_cache(), _LEAST_FLUSH) if size is None else size
        self._buffer = torch.ones(size // 4)

    def __call__(self) -> None:
        self._buffer.sum()


def wall_seconds(name: str, run: Callable[[], object]) -> float:
    """By the clock on the wall, which is right for what runs on the CPU."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


# A contender that takes so many times as long as the fastest is not run beyond the least rounds: its time is known well
# enough, and the others would have fewer rounds for it.
SLOW = 8.0


def time_contenders(
    runs: Mapping[str, Callable[[Inputs], object]],
    inputs: Sequence[Inputs],
    budget: Budget,
    flush: Callable[[], None],
    always: Mapping[str, Callable[[Inputs], object]],
    seconds_of: SecondsOf = wall_seconds,
) -> dict[str, list[float]]:
    """Seconds of each contender in each of its rounds; the slow ones have only the first rounds.

    Args:
        runs: the contenders.
        inputs: taken in turn.
        budget: how many rounds.
        flush: called before each timed call.
        always: timed beside them in every round, whatever it takes; not counted as a contender.
        seconds_of: how a call is timed.
    """
    first = min(max(budget.least, len(inputs)), budget.repeats)
    seconds = time_rounds(dict(runs) | dict(always), inputs, first, flush, seconds_of=seconds_of)
    medians = {name: statistics.median(seconds[name]) for name in runs}
    quick = {name: run for name, run in runs.items() if medians[name] <= SLOW * min(medians.values())}
    rounds = budget.rounds(sum(medians[name] for name in quick), len(inputs))
    more = time_rounds(quick | dict(always), inputs, max(0, rounds - first), flush, first, seconds_of)
    return {name: times + more.get(name, []) for name, times in seconds.items()}


def time_rounds(
    runs: Mapping[str, Callable[[Inputs], object]],
    inputs: Sequence[Inputs],
    rounds: int,
    flush: Callable[[], None],
    first: int = 0,
    seconds_of: SecondsOf = wall_seconds,
) -> dict[str, list[float]]:
    """Seconds of each contender in each round; round i, counted from ``first``, takes ``inputs[i % len(inputs)]``.

    The order of contenders is turned around from round to round, so that none always follows the same one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(first, first + rounds):
            given = inputs[turn % len(inputs)]
            for name in names if turn % 2 == 0 else reversed(names):
                flush()
                seconds[name].append(seconds_of(name, partial(runs[name], given)))
    finally:
        if collecting:
            gc.enable()
    return seconds


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
