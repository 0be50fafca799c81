"""What this GPU does at best: copies, reads, matrix products. Everything else is held against these."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.timing import Stopwatch
from d2moe_ext.bench.floors import Floors, KnownFloors, best_seconds, fastest, products, reads

KIND = "ceilings"
BYTES = 2**32
PRODUCT = (8192, 8192, 8192)
_REPEATS = 10


def measure_ceilings(watch: Stopwatch) -> dict[str, Any]:
    """Bytes and FLOPs per second."""
    device, seconds_of, size = watch.device, watch.queued, BYTES
    copied = best_seconds(_copy(size, device), _REPEATS, seconds_of)
    read = fastest(reads(size, device, seconds_of))
    rates = {
        dtype: fastest(products(getattr(torch, dtype), [PRODUCT], device, seconds_of)).rate for dtype in ("bfloat16", "float32")
    }
    # A copy moves every byte twice.
    return {"copy": 2 * size / copied, "read": read.rate, "read_by": read.name, **rates}


def _copy(size: int, device: str) -> Callable[[], object]:
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return partial(target.copy_, source)


def floors_from(ceilings: dict[str, Any]) -> KnownFloors:
    """Floors of layers: memory at the faster of copying and reading, which do not differ by much."""
    by = "copy" if ceilings["copy"] >= ceilings["read"] else ceilings["read_by"]
    rates = {dtype: ceilings[dtype] for dtype in ("bfloat16", "float32")}
    return KnownFloors(Floors(max(ceilings["copy"], ceilings["read"]), by, rates, torch.get_num_threads()))
