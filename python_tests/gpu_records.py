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


def part_row(part: str, **measured: Any) -> dict[str, Any]:
    about = {"job": "a job", "table": "part", "part": part, "shape": "Mixtral-8x7B", "layer": None, "tokens": 4096, "case": ""}
    names = (
        "floor_us",
        "call_us",
        "call_share",
        "own_us",
        "own_share",
        "own_each_us",
        "own_note",
        "over_all",
        "contains",
        "note",
    )
    return about | dict.fromkeys(names) | measured


def part_rows() -> list[dict[str, Any]]:
    low_rank = {"rank": 256, "pairs": 8192, "case": "8,192 pairs", "contains": "zeros"}
    sparse = {"contains": "zeros", "channels": 4096, "tokens": 1}
    layer = "throughput 0.6, dynamic"
    times = {
        "floor_us": 170.0,
        "call_us": 900.0,
        "call_share": 0.2,
        "own_us": 250.0,
        "own_share": 0.66,
        "own_each_us": [100.0, 150.0],
    }
    return [
        part_row("low-rank products", **low_rank, **times),
        part_row("sparse base", **sparse, keep=4096, call_us=80.0, call_share=0.9, case="all"),
        part_row("sparse base", **sparse, keep=2048, call_us=50.0, call_share=0.7, over_all=0.625, case="half"),
        part_row("routing", layer=layer, tokens=64, own_us=8.0, case="sort_rows"),
        part_row("routing", layer="uncompressed", tokens=64, own_us=11.0, case="sort_rows"),
        part_row("gated activation", layer=layer, own_us=100.0, own_share=0.85, case="weighted_activation"),
        part_row("sum over experts", layer=layer, own_note="failed: no kernel", case="combine_tokens"),
        part_row("sum over experts", layer=layer, tokens=64, own_us=3.0, own_share=1.2, case="combine_tokens"),
        {"job": "part, sparse base", "table": "part", "note": "failed: no memory"},
    ]


def profile_row(layer: str, tokens: int, *kernels: tuple[str, int, float], **changes: Any) -> dict[str, Any]:
    """Of kernels by whole name, runs and microseconds."""
    busy = sum(time for _, _, time in kernels)
    found = [{"name": name, "calls": calls, "us": time, "share": time / busy} for name, calls, time in kernels]
    about = {"job": "profile, Mixtral-8x7B", "table": "profile", "shape": "Mixtral-8x7B", "layer": layer, "tokens": tokens}
    return about | {"note": None, "forwards": 9, "busy_us": busy, "span_us": 2 * busy, "kernels": found} | changes


PRODUCT = "void d2moe::kernels::grouped_product<d2moe::kernels::{}, __nv_bfloat16, false>(d2moe::kernels::ProductArguments)"
FEW = PRODUCT.format("(anonymous namespace)::TensorTile<__nv_bfloat16, 16, 1, 4, 64, 4>")
MANY = PRODUCT.format("(anonymous namespace)::TensorTile<__nv_bfloat16, 128, 2, 4, 32, 4>")
SORT = "d2moe::kernels::(anonymous namespace)::sort_rows(d2moe::kernels::MoePairs, int)"
FILL = "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>, std::array<char*, 1ul> >(int)"


def profile_rows() -> list[dict[str, Any]]:
    layer = "throughput 0.6, dynamic"
    failed = {"job": "profile, Mixtral-8x7B", "table": "profile", "shape": "Mixtral-8x7B", "layer": None, "tokens": 512}
    return [
        profile_row(layer, 64, (MANY, 2, 60.0), (SORT, 1, 39.5), (FILL, 1, 0.5)),
        profile_row(layer, 1, (FEW, 6, 50.0)),
        profile_row("uncompressed", 4, (FEW, 3, 50.0), (SORT, 1, 10.0)),
        failed | {"note": "failed: the profiling process: exit code -11"},
        {"job": "profile, Qwen3-30B-A3B", "table": "profile", "note": "failed: lost"},
    ]


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
    return {"kind": "gpu-bench", **ABOUT, "rows": [*rows, *part_rows(), *profile_rows()]}
