"""How far a step raised the process's memory."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_growth(step: Callable[[], Result]) -> tuple[Result, int | None]:
    """``step()`` and by how many bytes resident memory at its peak exceeded what it was before.

    Linux keeps the peak of a process and lets it be reset. What the allocator holds unused is given back first, or the
    step would fill that before it is seen to grow. None on other systems.
    """
    if not _STATUS.is_file() or not _CLEAR.exists():
        return step(), None
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    _CLEAR.write_text("5")  # sets the peak to what is resident now
    before = _status_bytes("VmRSS")
    result = step()
    return result, max(_status_bytes("VmHWM") - before, 0)


def _status_bytes(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
