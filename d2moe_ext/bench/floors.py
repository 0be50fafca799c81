"""How fast the machine reads memory and multiplies matrices, from plain torch.

A forward can be no faster than ``max(bytes / bandwidth, FLOPs / rate)``. Both rates are the best of several ways to ask, as a
floor that is measured badly makes a forward look good. A shared machine's memory is not the same from one minute to the
next, so the operations that were fastest are kept, and timed again in every round beside the contenders that are held
against them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from d2moe_ext.bench.costs import Cost
from d2moe_ext.bench.timing import SecondsOf, wall_seconds

READ_BYTES = 2**30
# Tokens, outputs, inputs. Of these and four larger ones the best differed by less than 3 % on an EPYC with AVX-512 (110 GFLOP/s
# a core in float32, 490 in bfloat16).
GEMM_SHAPES = ((512, 4096, 4096), (1024, 2048, 2048), (2048, 2048, 4096))
_REPEATS = 3
_READ, _PRODUCT = "floor: read", "floor: product"


@dataclass(frozen=True)
class Floors:
    """Rates that a forward is held against, with ``threads`` threads.

    Attributes:
        bandwidth: bytes read per second.
        bandwidth_by: the operation that read them fastest.
        rates: FLOPs per second of a matrix product, by the dtype's name.
        threads: of torch.
    """

    bandwidth: float
    bandwidth_by: str
    rates: dict[str, float]
    threads: int

    def seconds(self, cost: Cost, dtype: str) -> float:
        """The least time in which ``cost`` can be paid."""
        return max(cost.bytes / self.bandwidth, cost.flops / self.rates[dtype])

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return asdict(self)


class Ruler(Protocol):
    """What contenders are held against: operations that are timed beside them, and the floors that follow."""

    @property
    def floors(self) -> Floors:
        """As they were before any contender ran."""

    def runs(self, dtype: str) -> dict[str, Callable[[object], object]]:
        """Operations to be timed in every round."""

    def floors_of(self, seconds: Mapping[str, Sequence[float]], dtype: str) -> Floors:
        """The floors of some rounds."""


@dataclass(frozen=True)
class KnownFloors:
    """Floors that were measured before, of a machine that is nobody else's: nothing is timed beside the contenders."""

    floors: Floors

    def runs(self, dtype: str) -> dict[str, Callable[[object], object]]:
        """None."""
        return {}

    def floors_of(self, seconds: Mapping[str, Sequence[float]], dtype: str) -> Floors:
        """Those that are known."""
        return self.floors


@dataclass(frozen=True)
class Gauge:
    """An operation that goes as fast as the machine does.

    Attributes:
        name: what it is.
        amount: the bytes that it reads, or its FLOPs.
        seconds: the least that it took when it was chosen.
    """

    name: str
    amount: float
    run: Callable[[], object]
    seconds: float

    @property
    def rate(self) -> float:
        """Amount per second when it was chosen."""
        return self.amount / self.seconds


class Gauges:
    """One operation that reads memory and, for each dtype, one that multiplies matrices.

    Args:
        dtypes: names such as ``"bfloat16"``, whose products are timed. Choosing takes a few seconds.
    """

    @torch.no_grad()
    def __init__(self, dtypes: Iterable[str]) -> None:
        self._read = fastest(reads(READ_BYTES))
        self._products = {dtype: fastest(products(getattr(torch, dtype), GEMM_SHAPES)) for dtype in dict.fromkeys(dtypes)}

    @property
    def floors(self) -> Floors:
        """The rates at which the operations were chosen."""
        rates = {dtype: product.rate for dtype, product in self._products.items()}
        return Floors(self._read.rate, self._read.name, rates, torch.get_num_threads())

    def runs(self, dtype: str) -> dict[str, Callable[[object], object]]:
        """The operations for :func:`d2moe_ext.bench.timing.time_rounds`, by names that no contender has."""
        read, product = self._read.run, self._products[dtype].run
        return {_READ: lambda _: read(), _PRODUCT: lambda _: product()}

    def floors_of(self, seconds: Mapping[str, Sequence[float]], dtype: str) -> Floors:
        """The floors of some rounds, from the median times of :meth:`runs` in them."""
        bandwidth = self._read.amount / statistics.median(seconds[_READ])
        rate = self._products[dtype].amount / statistics.median(seconds[_PRODUCT])
        return Floors(bandwidth, self._read.name, {dtype: rate}, torch.get_num_threads())


def reads(read_bytes: int, device: str = "cpu", seconds_of: SecondsOf = wall_seconds) -> Iterator[Gauge]:
    """Reductions, whose rate depends on how well torch vectorises each of them, and a matrix-vector product."""
    floats = torch.ones(read_bytes // 4, device=device)
    width = min(4096, floats.numel())
    matrix = floats[: floats.numel() // width * width].view(-1, width)
    vector = torch.ones(width, device=device)
    ways: dict[str, Callable[[], Tensor]] = {
        "sum of float32": lambda: floats.sum(),
        "sum of int64": lambda: floats.view(torch.int64).sum(),
        "largest of float32": lambda: floats.amax(),
        "largest of int32": lambda: floats.view(torch.int32).amax(),
        "matrix-vector product in float32": lambda: matrix @ vector,
    }
    for name, read in ways.items():
        yield Gauge(name, 4 * matrix.numel(), read, best_seconds(read, seconds_of=seconds_of))


def products(
    dtype: torch.dtype, shapes: Iterable[tuple[int, int, int]], device: str = "cpu", seconds_of: SecondsOf = wall_seconds
) -> Iterator[Gauge]:
    """Matrix products of tokens, outputs and inputs, with weights in either layout."""
    for tokens, out, inputs in shapes:
        # Random numbers: a processor may run faster on ones.
        x, weight = (torch.rand(rows, inputs, device=device).to(dtype) for rows in (tokens, out))
        by_column = weight.t().contiguous()
        for run in (partial(functional.linear, x, weight), partial(torch.mm, x, by_column)):
            yield Gauge(
                f"product of {tokens}, {out}, {inputs}",
                2.0 * tokens * out * inputs,
                run,
                best_seconds(run, seconds_of=seconds_of),
            )


def fastest(gauges: Iterable[Gauge]) -> Gauge:
    """The one of the highest rate."""
    return max(gauges, key=lambda gauge: gauge.rate)


def best_seconds(run: Callable[[], object], repeats: int = _REPEATS, seconds_of: SecondsOf = wall_seconds) -> float:
    """The least of ``repeats`` times, after one that is not counted."""
    run()
    return min(seconds_of("", run) for _ in range(repeats))
