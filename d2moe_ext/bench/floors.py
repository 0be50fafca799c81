"""What the machine does at best: how fast it reads memory and multiplies matrices, from plain torch.

A forward can be no faster than ``max(bytes / bandwidth, FLOPs / rate)``. Both are the best of several ways to ask, as a floor
that is measured badly makes a forward look good.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from d2moe_ext.bench.costs import Cost

READ_BYTES = 2**30
# Tokens, outputs, inputs. Of these and four larger ones the best differed by less than 3 % on an EPYC with AVX-512 (110 GFLOP/s
# a core in float32, 490 in bfloat16).
GEMM_SHAPES = ((512, 4096, 4096), (1024, 2048, 2048), (2048, 2048, 4096))
_REPEATS = 3


@dataclass(frozen=True)
class Floors:
    """Measured in one process, with ``threads`` threads.

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


@torch.no_grad()
def measure_floors(dtypes: Iterable[str]) -> Floors:
    """Measure both rates; a few seconds.

    Args:
        dtypes: names such as ``"bfloat16"``, whose products are timed.
    """
    bandwidth, name = _bandwidth(READ_BYTES)
    rates = {dtype: _gemm_rate(getattr(torch, dtype), GEMM_SHAPES) for dtype in dict.fromkeys(dtypes)}
    return Floors(bandwidth, name, rates, torch.get_num_threads())


def _bandwidth(read_bytes: int) -> tuple[float, str]:
    """Bytes per second and the operation that reached it: reductions, whose rate depends on how well torch vectorises
    each of them, and a matrix-vector product."""
    floats = torch.ones(read_bytes // 4)
    width = min(4096, floats.numel())
    matrix = floats[: floats.numel() // width * width].view(-1, width)
    vector = torch.ones(width)
    reads: dict[str, Callable[[], Tensor]] = {
        "sum of float32": lambda: floats.sum(),
        "sum of int64": lambda: floats.view(torch.int64).sum(),
        "largest of float32": lambda: floats.amax(),
        "largest of int32": lambda: floats.view(torch.int32).amax(),
        "matrix-vector product in float32": lambda: matrix @ vector,
    }
    seconds = {name: best_seconds(read) for name, read in reads.items()}
    fastest = min(seconds, key=seconds.__getitem__)
    return 4 * matrix.numel() / seconds[fastest], fastest


def _gemm_rate(dtype: torch.dtype, shapes: Iterable[tuple[int, int, int]]) -> float:
    rates = []
    for tokens, out, inputs in shapes:
        # Random numbers: a processor may run faster on ones.
        x, weight = torch.rand(tokens, inputs).to(dtype), torch.rand(out, inputs).to(dtype)
        by_column = weight.t().contiguous()
        products = (partial(functional.linear, x, weight), partial(torch.mm, x, by_column))
        rates += [2 * tokens * out * inputs / best_seconds(product) for product in products]
    return max(rates)


def best_seconds(run: Callable[[], object], repeats: int = _REPEATS) -> float:
    """The least of ``repeats`` times, after one that is not counted."""
    run()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
