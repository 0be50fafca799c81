"""Floors that take no time to measure, and rows of a layer as ``bench_layer`` saves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from d2moe_ext.bench import floors
from d2moe_ext.bench.floors import Floors, Gauge, Gauges
from d2moe_ext.bench.layer import Setting
from d2moe_ext.bench.timing import Budget, CacheFlush

FLOORS = Floors(bandwidth=1e9, bandwidth_by="sum of float32", rates={"float32": 1e9, "bfloat16": 2e9}, threads=1)

ROW_FIELDS = {
    "tokens", "dtype", "contender", "kind", "layer", "dynamic", "note", "relative_error", "bytes", "flops", "floor_ms",
    "median_ms", "low_ms", "high_ms", "rounds", "share_of_floor", "speed_over_hf", "best_hf", "saved_ms",
    "bandwidth", "rate", "threads",
}  # fmt: skip


class FixedGauges(Gauges):
    """Operations that do nothing, at the rates of FLOORS."""

    def __init__(self) -> None:
        self._read = Gauge(FLOORS.bandwidth_by, FLOORS.bandwidth, lambda: None, 1.0)
        self._products = {dtype: Gauge("product", rate, lambda: None, 1.0) for dtype, rate in FLOORS.rates.items()}

    def floors_of(self, seconds: Mapping[str, Sequence[float]], dtype: str) -> Floors:
        """FLOORS, once the operations were timed."""
        assert len(super().floors_of(seconds, dtype).rates) == 1
        return FLOORS


def quick_setting(repeats: int = 4) -> Setting:
    return Setting(FixedGauges(), Budget(repeats=repeats, seconds=0.01), CacheFlush(2**12))


def measure_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Floors from arrays of a megabyte at most."""
    monkeypatch.setattr(floors, "READ_BYTES", 2**20)
    monkeypatch.setattr(floors, "GEMM_SHAPES", ((8, 16, 32),))


def layer_row(contender: str = "uncompressed", **changes: Any) -> dict[str, Any]:
    """A row of one token; ``layer``, ``kind`` and ``dynamic`` follow from the contender's name."""
    kind = "hf" if contender in ("eager", "grouped_mm", "batched_mm") else "native"
    plain = kind == "hf" or contender == "uncompressed"
    row = {
        "shape": "Mixtral-8x7B",
        "group": 0,
        "tokens": 1,
        "dtype": "bfloat16",
        "contender": contender,
        "kind": kind,
        "layer": "plain" if plain else contender.removesuffix(", dynamic"),
        "dynamic": contender.endswith(", dynamic"),
        "note": None,
        "relative_error": 0.0,
        "bytes": 1_000_000,
        "flops": 1_000_000,
        "floor_ms": 8.0,
        "median_ms": 10.0,
        "low_ms": 9.0,
        "high_ms": 11.0,
        "rounds": 3,
        "share_of_floor": 0.8,
        "speed_over_hf": 1.0,
        "best_hf": "eager",
        "saved_ms": None,
        "bandwidth": 1e9,
        "rate": 2e9,
        "threads": 1,
        "preset": None,
        "ratio": None,
    }
    return row | changes


def record(kind: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "kind": kind,
        "machine": "a processor, 2 cores",
        "command": "python -m benchmarks.bench_layer",
        "date": "2026-01-31",
        "versions": {"torch": "2.13.0"},
        "floors": FLOORS.to_dict(),
        "rows": rows,
    }
