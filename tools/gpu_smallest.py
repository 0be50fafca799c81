"""``python -m tools.gpu_smallest``: every operator once on tiny inputs, for ``compute-sanitizer``, under which all is slow.

Prints a line for each operator: ``operator NAME ran``, ``operator NAME no CUDA kernel`` or ``operator NAME failed: WHY``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from d2moe_ext import ops
from tools.gpu_verdicts import NO_KERNEL

# Its tests' random layers.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python_tests"))
from moe_forward_cases import Layer, make_layer

RAN, FAILED = "ran", "failed: "
_FORWARD = (torch.float32, torch.bfloat16, torch.float16)
_FLOATS = (*_FORWARD, torch.float64)
# Off every power of two, so that the edges of blocks are met.
_ROWS, _COLUMNS = 5, 131
# The ways in which a layer can be stored and pruned, and numbers of tokens that are multiplied in different ways.
_LAYERS: tuple[dict, ...] = (
    {},
    {"tokens": 3, "kept": (0.6, 0.6), "keep": (0.6, 0.6)},
    {"tokens": 20, "kept": (0.6, 0.6), "keep": (0.6, 0.6)},
    {"bases": (2, 2), "kept": (0.6, 0.6), "keep": (0.6, 0.6)},
    {"tokens": 150, "bases": (4, 2)},
    {"deltas": "none", "bases": (4, 4)},
    {"deltas": "joint", "gauge_fixed": True, "bias": True},
    {"int8": True, "sentinels": True},
)


def _column_select(device: str) -> None:
    for dtype in _FORWARD:
        x, norms = torch.randn(_ROWS, _COLUMNS).to(device, dtype), torch.rand(_COLUMNS, device=device)
        ops.column_select(x, norms, _COLUMNS // 2)
        columns = torch.arange(0, _COLUMNS, 2, dtype=torch.int32, device=device)
        ops.column_select(x, norms[: len(columns)], 7, columns)


def _fisher_merge(device: str) -> None:
    for sums in (torch.float32, torch.float64):
        for dtype in _FLOATS:
            weighted, fishers = (torch.zeros(_ROWS, _COLUMNS, dtype=sums, device=device) for _ in range(2))
            weight, gradient = (torch.randn(_ROWS, _COLUMNS).to(device, dtype) for _ in range(2))
            ops.fisher_merge_(weighted, fishers, weight, gradient, 0.5)


def _gram_update(device: str) -> None:
    for sums in (torch.float32, torch.float64):
        for dtype in _FLOATS:
            gram = torch.zeros(_COLUMNS, _COLUMNS, dtype=sums, device=device)
            x = torch.randn(_ROWS, _COLUMNS).to(device, dtype)
            ops.gram_update_(gram, x)
            ops.gram_update_(gram, x, torch.rand(_ROWS, device=device))


def _whitened_svd(device: str) -> None:
    for dtype in (torch.float32, torch.float64):
        delta = torch.randn(2, _ROWS, 7, dtype=dtype, device=device)
        x = torch.randn(2, 9, 7, dtype=dtype, device=device)
        ops.whitened_svd(delta, 3, x.transpose(1, 2) @ x, torch.rand(2, _ROWS, dtype=dtype, device=device))


def _on(device: str, value: object) -> object:
    if isinstance(value, list):
        return [_on(device, item) for item in value]
    return value.to(device) if isinstance(value, Tensor) else value


def layers(device: str) -> list[Layer]:
    """Small layers of every kind and dtype; bases that are pruned by the batch lie channel by channel."""
    made = []
    for seed, how in enumerate(_LAYERS):
        for dtype in _FORWARD:
            layer = make_layer(seed, dtype=dtype, **how)
            arguments = {name: _on(device, value) for name, value in layer.arguments.items()}
            for name in ("gate_up_base", "down_base"):
                if "keep" in how:
                    arguments[name] = arguments[name].transpose(1, 2).contiguous().transpose(1, 2)
            made.append(Layer(arguments, layer.gated))
    return made


def _moe_forward(device: str) -> None:
    for layer in layers(device):
        ops.moe_forward(**layer.arguments)


def _moe_gate_up_forward(device: str) -> None:
    for layer in layers(device):
        ops.moe_gate_up_forward(**layer.gate_up_arguments())


def _moe_down_forward(device: str) -> None:
    for layer in layers(device):
        base, deltas = layer.arguments["down_base"], layer.arguments["delta_v"]
        pairs = layer.arguments["top_k_index"].numel()
        activated = torch.randn(pairs, deltas[-1].shape[1] if deltas else base.shape[2]).to(device, base.dtype)
        for per_pair in (False, True):
            ops.moe_down_forward(**layer.down_arguments(activated, per_pair))


CALLS: dict[str, Callable[[str], None]] = {
    "column_select": _column_select,
    "fisher_merge_": _fisher_merge,
    "gram_update_": _gram_update,
    "whitened_svd": _whitened_svd,
    "moe_forward": _moe_forward,
    "moe_gate_up_forward": _moe_gate_up_forward,
    "moe_down_forward": _moe_down_forward,
}


def call(name: str, device: str) -> str:
    """Call an operator over its dtypes, and say what came of it."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"d2moe_ext::{name}", device.upper()):
        return NO_KERNEL
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            CALLS[name](device)
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError as error:
        return f"{FAILED}{' '.join(str(error).split())}"
    return RAN


def main() -> int:
    """Call every operator; the exit code is 1 where one failed."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_smallest", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    device = parser.parse_args().device
    found = {name: call(name, device) for name in CALLS}
    for name, what in found.items():
        print("operator", name, what, flush=True)
    return int(any(what.startswith(FAILED) for what in found.values()))


if __name__ == "__main__":
    sys.exit(main())
