"""Time ``moe_forward`` against an expert-by-expert loop on one layer, in one process, contenders in turn.

    python benchmarks/bench_moe_forward.py --hidden 2048 --inter 1408 --experts 64 --top-k 6 --json

Contenders: the loop that transformers' eager experts run; the native operator on the same uncompressed layer (K = E, no
deltas); the native operator and its plain-torch reference on a compressed layer (K = 1, rank given). Medians of ``--repeats``
rounds; every round runs each contender once, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from d2moe_ext import ops, reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def expert_loop(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The paper's Algorithm 1 on uncompressed experts."""
    output = torch.zeros_like(x)
    for expert in torch.unique(index).tolist():
        token, slot = torch.where(index == expert)
        gate, up = functional.linear(x[token], gate_up[expert]).chunk(2, -1)
        result = functional.linear(functional.silu(gate) * up, down[expert])
        output.index_add_(0, token, result * weights[token, slot, None])
    return output


def contenders(arguments: argparse.Namespace, tokens: int) -> dict[str, Callable[[], Tensor]]:
    hidden, inter, experts, rank = arguments.hidden, arguments.inter, arguments.experts, arguments.rank
    dtype = DTYPES[arguments.dtype]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.04).to(dtype)

    x = random(tokens, hidden)
    index = torch.rand(tokens, experts, generator=generator).topk(arguments.top_k).indices
    weights = torch.softmax(random(tokens, arguments.top_k), -1)
    gate_up, down = random(experts, 2 * inter, hidden), random(experts, hidden, inter)
    own = torch.arange(experts, dtype=torch.int32)
    one = torch.zeros(experts, dtype=torch.int32)
    ranks, starts = torch.full((experts,), rank, dtype=torch.int32), own * rank
    no_deltas = [[]] * 8
    deltas = [
        [random(experts * rank, size) for size in (inter, inter, hidden)],
        [random(experts * rank, size) for size in (hidden, hidden, inter)],
        [ranks] * 3,
        [starts] * 3,
        [starts] * 3,
        *no_deltas[:3],
    ]
    routed = (x, index, weights)
    plain = (gate_up, None, None, own, hidden, None, down, None, None, own, inter, None, *no_deltas, "silu", False)
    compressed = (gate_up[:1], None, None, one, hidden, None, down[:1], None, None, one, inter, None, *deltas, "silu", False)
    return {
        "expert loop": lambda: expert_loop(*routed, gate_up, down),
        "native, uncompressed": lambda: ops.moe_forward(*routed, *plain),
        "native, compressed": lambda: ops.moe_forward(*routed, *compressed),
        "reference, compressed": lambda: reference.moe_forward(*routed, *compressed),
    }


def measure(arguments: argparse.Namespace, tokens: int) -> list[dict[str, object]]:
    runs = contenders(arguments, tokens)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(arguments.repeats + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    return [
        {"tokens": tokens, "dtype": arguments.dtype, "contender": name, "median_ms": 1e3 * statistics.median(times)}
        for name, times in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 512), ("inter", 384), ("experts", 16), ("top-k", 4), ("rank", 48), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 512])
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with torch.no_grad():
        rows = [row for tokens in arguments.tokens for row in measure(arguments, tokens)]
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(f"{row['tokens']:>6} tokens  {row['contender']:<24} {row['median_ms']:9.3f} ms")


if __name__ == "__main__":
    main()
