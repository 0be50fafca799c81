"""The machine that a measurement was made on."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
# Where nothing tells: more than most processors have.
_UNKNOWN_CACHE = 64 * 2**20


def describe_machine() -> str:
    """The processor's name, its cores, and the threads that torch uses of them."""
    name = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        names = [line.partition(":")[2].strip() for line in cpu_info.read_text().splitlines() if line.startswith("model name")]
        name = names[0] if names else name
    return f"{name}, {os.cpu_count()} cores, threads used: {torch.get_num_threads()}"


def last_level_cache() -> int:
    """Bytes of the largest cache, by what the system says of it."""
    sizes = [_UNKNOWN_CACHE] if not _CACHES.is_dir() else [0]
    for file in _CACHES.glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KMG]?)", file.read_text().strip())
        if match:
            sizes.append(int(match[1]) * _UNITS.get(match[2], 1))
    return max(sizes) or _UNKNOWN_CACHE


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping; None where the system does not say."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        return None
    lines = [line for line in info.read_text().splitlines() if line.startswith("MemAvailable:")]
    return int(lines[0].split()[1]) * 1024 if lines else None
