"""What the GPU ran and for how long, as ``torch.profiler`` saw it.

A profile is taken in a process of its own (:mod:`benchmarks.gpu.profiled`): whatever the profiler does there, be it to crash or
to stay attached to the driver, the run goes on and its times are its own. Each call is a session by itself, so that there
is no doubt which kernels belong to it.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from d2moe_ext.bench.layer import FAILED
from tools.limited_run import run_limited

PROGRAM = "benchmarks.gpu.profiled"
SECONDS = 45.0
CALLS = 9
NO_KERNEL = f"{FAILED}: the profiler saw no kernel"

# What to profile, as ``benchmarks.gpu.profiled`` takes it, and what came of it: see there.
Subject = dict[str, Any]
Found = dict[str, Any]


class KernelRun(NamedTuple):
    """One kernel, copy or fill: its whole name, and microseconds."""

    name: str
    start: float
    duration: float


def profile_calls(run: Callable[[], object], flush: Callable[[], None], calls: int = CALLS) -> list[list[KernelRun]]:
    """What each of some calls ran on the GPU, in order. One call before them sets everything up and is not counted."""
    found = []
    for _ in range(calls + 1):
        flush()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as session:
            run()
            torch.cuda.synchronize()
        found.append(kernel_runs(session.events() or ()))
    return found[1:]


def kernel_runs(events: Iterable[Any]) -> list[KernelRun]:
    """Those of a profiler's events that ran on the GPU, in order."""
    on_gpu = [
        event for event in events if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    runs = [KernelRun(event.name, event.time_range.start, event.time_range.elapsed_us()) for event in on_gpu]
    return sorted(runs, key=lambda found: found.start)


def profile_elsewhere(subjects: Sequence[Subject]) -> list[Found]:
    """Profiles subjects in another process; those for which it had no answer have a note that says how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found"
        command = [sys.executable, "-m", PROGRAM, json.dumps(list(subjects)), str(path)]
        ran = run_limited(command, Path.cwd(), SECONDS, {})
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
    # A line without an end is one in which the process was stopped.
    found: list[Found] = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    note = f"{FAILED}: the profiling process: {'; '.join(ran.ending(2).splitlines())}"
    answered = [entry["subject"] for entry in found]
    return found + [{"subject": subject, "layer": None, "note": note} for subject in subjects if subject not in answered]


def durations(found: Found, kernel: str) -> list[list[float]]:
    """By call: microseconds of every run of a kernel, in order."""
    return [[duration for name, _, duration in call if kernel in name] for call in found["calls"]]


def summary(calls: Sequence[Sequence[Sequence[Any]]]) -> dict[str, Any]:
    """Medians over calls: of each kernel, longest first; of all kernels together; and of the time from the first's start to the
    last's end."""
    names = dict.fromkeys(run[0] for call in calls for run in call)
    busy = statistics.median(sum(run[2] for run in call) for call in calls)
    kernels = []
    for name in names:
        each = [[run[2] for run in call if run[0] == name] for call in calls]
        time = statistics.median(map(sum, each))
        kernels.append({"name": name, "calls": statistics.median(map(len, each)), "us": time, "share": time / busy})
    span = statistics.median(max(run[1] + run[2] for run in call) - min(run[1] for run in call) for call in calls)
    kernels.sort(key=lambda kernel: -kernel["us"])
    return {"forwards": len(calls), "busy_us": busy, "span_us": span, "kernels": kernels}
