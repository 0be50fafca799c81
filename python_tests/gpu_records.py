"""Records as ``make gpu-check`` and ``make gpu-bench`` write them; nothing in them was measured."""

from __future__ import annotations

from typing import Any

from bench_helpers import layer_row

ABOUT = {
    "date": "2026-01-31",
    "commit": "0123456789abcdef",
    "gpu": {"name": "Some GPU", "capability": "9.0", "memory_bytes": 80 * 2**30, "driver": "1.2"},
    "versions": {"torch": "2.11", "cuda": "13.0", "transformers": "5.17", "python": "3.12", "nvcc": "13.0"},
}


def check_record(**changes: Any) -> dict[str, Any]:
    def step(name: str, passed: bool = True, detail: str = "") -> dict[str, Any]:
        return {"name": name, "passed": passed, "seconds": 1.0, "detail": detail}

    def verdict(group: str, outcome: str) -> dict[str, Any]:
        return {"group": group, "name": "test", "outcome": outcome, "seconds": 1.0, "message": ""}

    operators = dict.fromkeys(("column_select", "fisher_merge_", "gram_update_", "whitened_svd"), "ran")
    forward = dict.fromkeys(("moe_forward", "moe_gate_up_forward", "moe_down_forward"), "no CUDA kernel")
    steps = [
        step("build"),
        step("tests: column_select", detail="2 passed"),
        step("tests: gram_update", False, "1 passed, 1 failed"),
        step("tests: moe", detail="no test"),
        step("memcheck", detail="ERROR SUMMARY: 0 errors\nmore"),
        step("racecheck", False, "not found: compute-sanitizer"),
    ]
    tests = [("column_select", "passed")] * 2 + [("gram_update", "passed"), ("gram_update", "failed")]
    record = {"kind": "gpu-check", **ABOUT, "operators": operators | forward, "steps": steps, "complete": True}
    return record | {"tests": [verdict(*test) for test in tests]} | changes


def gpu_layer_row(contender: str, **changes: Any) -> dict[str, Any]:
    """A row of one token, in a graph where the name says so."""
    row = layer_row(contender.removesuffix(", graph")) | {"job": "layer, Mixtral-8x7B, 1", "contender": contender}
    return {name: value for name, value in row.items() if name not in ("group", "threads", "saved_ms")} | changes


def bench_record() -> dict[str, Any]:
    def operator(name: str, case: str, **measured: Any) -> dict[str, Any]:
        about = {"job": f"operator, {name}, {case}", "table": "operator", "operator": name, "case": case}
        return about | {"ceiling": None, "share": None, "note": None} | measured

    layers = [
        gpu_layer_row("eager"),
        gpu_layer_row("batched_mm", median_ms=None, note="failed: too large"),
        gpu_layer_row("throughput 0.6, dynamic, graph", median_ms=2.0),
    ]
    rates = {"copy": 3e12, "read": 2.9e12, "read_by": "sum of float32", "bfloat16": 8e14, "float32": 5e13}
    rows = [
        {"job": "ceilings", "table": "ceilings", **rates},
        operator("gram_update_", "a", ceiling="bfloat16", share=0.65, median_ms=0.5),
        operator("column_select", "b", median_ms=0.02),
        operator("whitened_svd", "c", median_ms=10.0, loop_ms=120.0, speedup=12.0, error_over_best=1.0001),
        {"job": "operator, fisher_merge_, d", "table": "operator", "note": "failed: no memory"},
        *(row | {"table": "layer"} for row in layers),
        {"job": "layer, Qwen3-30B-A3B, 1", "table": "layer", "note": "failed: lost"},
    ]
    return {"kind": "gpu-bench", **ABOUT, "rows": rows}
