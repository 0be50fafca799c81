"""Where tests of CUDA operators run: on a GPU, or on a CPU that runs their kernels thread after thread (tools/emulated.py)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

EMULATED = "D2MOE_EMULATED_CUDA" in os.environ
DEVICE = "cpu" if EMULATED else "cuda"


def on_device(value: Any) -> Any:
    """A tensor on the device with its layout, gaps and what stands in them; or all tensors of a list or dictionary."""
    if isinstance(value, dict):
        return {name: on_device(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_device(item) for item in value)
    if not isinstance(value, Tensor):
        return value
    whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).to(DEVICE)
    return whole.as_strided(value.shape, value.stride(), value.storage_offset())


def through_device(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, called with the CPU's tensors and answering with one, but run on the device."""

    def run(*positional: Any, **named: Any) -> Tensor:
        result = function(*on_device(positional), **on_device(named))
        assert result.device.type == DEVICE
        return result.cpu()

    return run
