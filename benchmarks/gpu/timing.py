"""Times on a GPU, by its own events and with a cold L2 cache.

A call is timed in one of two ways. *Waited for*: the GPU has nothing to do when the call begins, so that what the host takes to
launch counts, as it does for whoever waits for an answer. *Queued*: the call stands behind the flush of the cache, so that the
GPU's own time is left; this is for graphs, and for single operators, which a model calls with work still in the queue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.profiles import Found, Subject, profile_elsewhere
from d2moe_ext.bench.contenders import Contender, Routed
from d2moe_ext.bench.timing import CACHES_READ, SecondsOf

GRAPH = ", graph"


class L2Flush:
    """Writes a buffer several times as large as the L2 cache, then reads another. Without the reading, lines that the writing
    left in the cache would have to be written back while a call is timed."""

    def __init__(self, device: str = "cuda", size: int | None = None) -> None:
        size = CACHES_READ * torch.cuda.get_device_properties(0).L2_cache_size if size is None else size
        self._written = torch.empty(size // 4, device=device)
        self._read = torch.zeros(size // 4, device=device)

    def __call__(self) -> None:
        self._written.zero_()
        self._read.sum()


def queued_seconds(name: str, run: Callable[[], object]) -> float:
    """What the GPU takes for a call that is launched while it still has something to do."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def waited_seconds(name: str, run: Callable[[], object]) -> float:
    """What a call takes when the GPU waits for it: launching counts."""
    torch.cuda.synchronize()
    return queued_seconds(name, run)


def record_graphs(runs: Sequence[Callable[[], object]]) -> list[Callable[[], object]]:
    """Calls that replay what each of ``runs`` launches, and give the tensors that it gave.

    Their graphs share the memory of intermediate results: they may be replayed in any order, but not at once.
    """
    pool = torch.cuda.graph_pool_handle()
    return [_record_graph(run, pool) for run in runs]


def _record_graph(run: Callable[[], object], pool: Any) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # Once before: what an operator sets up at its first call cannot be recorded.
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = run()

    def replay() -> object:
        graph.replay()
        return output

    return replay


@dataclass(frozen=True)
class Stopwatch:
    """How calls are timed on a device.

    Attributes:
        device: where tensors are.
        flush: empties the caches.
        waited, queued: as at the head of this file.
        record: from calls to ones that replay them.
        memory: bytes that the device has.
        profile: from what is to be profiled to what was found (:mod:`benchmarks.gpu.profiles`).
    """

    device: str
    flush: Callable[[], None]
    waited: SecondsOf
    queued: SecondsOf
    record: Callable[[Sequence[Callable[[], object]]], list[Callable[[], object]]]
    memory: int
    profile: Callable[[Sequence[Subject]], list[Found]]

    def contender_seconds(self, name: str, run: Callable[[], object]) -> float:
        """Graphs queued, everything else waited for."""
        return (self.queued if name.endswith(GRAPH) else self.waited)(name, run)

    def graphed(self, contender: Contender, inputs: Sequence[Routed]) -> Contender:
        """The same, recorded in a graph for each of ``inputs`` at the first call, and replayed."""
        graphs: dict[int, Callable[[], object]] = {}

        def run(routed: Routed) -> Any:
            if not graphs:
                replays = self.record([partial(contender.run, given) for given in inputs])
                graphs.update({id(given): replay for given, replay in zip(inputs, replays, strict=True)})
            return graphs[id(routed)]()

        return replace(contender, name=f"{contender.name}{GRAPH}", run=run, reference=contender.reference or contender)


def gpu_stopwatch() -> Stopwatch:
    """Of the first GPU."""
    memory = torch.cuda.get_device_properties(0).total_memory
    return Stopwatch("cuda", L2Flush(), waited_seconds, queued_seconds, record_graphs, memory, profile_elsewhere)
