"""``python -m benchmarks.gpu.profiled '[subject, ...]' FILE``: profiles on the GPU at hand, a line of JSON for each in FILE.

A subject is ``{"what": "layer", "shape": ..., "tokens": ...}``, of which a plain layer and a compressed one are profiled, or a
call of :mod:`benchmarks.gpu.part_calls`. What is found of one::

    subject   as it was given
    layer     whose forward it is; None for a call
    note      why there is no profile, or None
    calls     by call, what ran: [name, start, microseconds]
    moved     of a layer: bytes that its small kernels must move, by kernel
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.moved import moved_bytes
from benchmarks.gpu.part_calls import LOW_RANK, SPARSE_BASE, PartCall, low_rank_call, low_rank_size, sparse_base_call
from benchmarks.gpu.profiles import NO_KERNEL, Found, KernelRun, Subject, profile_calls
from benchmarks.layer.fill import from_plan, plain_experts
from benchmarks.layer.shapes import layer_plan, layer_view, spec_of, top_k_of
from d2moe_ext.bench.contenders import make_inputs
from d2moe_ext.bench.layer import failure
from d2moe_ext.experts import D2MoEExperts

DTYPE = torch.bfloat16
PLAIN = "uncompressed"
COMPRESSED = ("throughput", 0.6)

Profile = Callable[[Callable[[], object]], list[list[KernelRun]]]


class Target(NamedTuple):
    """Something to profile: whose forward it is, if it is one; the call; and bytes by kernel."""

    layer: str | None
    run: Callable[[], object]
    moved: dict[str, int]


class Targets:
    """What subjects stand for. The layers of one shape are held from subject to subject."""

    def __init__(self, device: str = "cuda") -> None:
        self._device = device
        self._shape: str | None = None
        self._layers: dict[str, D2MoEExperts] = {}

    def of(self, subject: Subject) -> Iterator[Target]:
        """Everything to profile of a subject."""
        if subject["what"] != "layer":
            yield Target(None, part_call(subject, self._device).run, {})
            return
        shape = subject["shape"]
        if shape != self._shape:
            self._shape, self._layers = None, {}  # the old ones go before there are new ones
            self._shape, self._layers = shape, measured_layers(shape, self._device)
        for name, module in self._layers.items():
            layout, top_k = module.spec.layout, top_k_of(shape)
            (routed,) = make_inputs(layout, top_k, subject["tokens"], DTYPE, count=1, device=self._device)
            yield Target(name, partial(module, *routed), moved_bytes(module, routed.top_k_index))


def measured_layers(shape: str, device: str) -> dict[str, D2MoEExperts]:
    """By name: the plain layer and the compressed one, as they run when they are loaded."""
    plain = D2MoEExperts.uncompressed(plain_experts(layer_view(shape), DTYPE, device))
    plan = layer_plan(shape, *COMPRESSED)
    module = from_plan(plan, spec_of(plan, layer_view(shape)), DTYPE, device)
    name = f"{COMPRESSED[0]} {COMPRESSED[1]}"
    layers = {PLAIN: plain, f"{name}, dynamic" if module.prunes_dynamically else name: module}
    for layer in layers.values():
        layer.set_backend("native")
    return layers


def part_call(subject: Subject, device: str) -> PartCall:
    """The call that a subject describes."""
    if subject["what"] == LOW_RANK:
        return low_rank_call(low_rank_size(subject["shape"], subject["rank"]), device)
    if subject["what"] == SPARSE_BASE:
        layout = layer_view(subject["shape"]).layout
        return sparse_base_call(subject["tokens"], subject["keep"], layout.hidden_size, layout.gate_up_rows, device)
    raise ValueError(f"A subject must be a layer, {LOW_RANK} or {SPARSE_BASE}, got {subject['what']!r}.")


@torch.no_grad()
def profile_subject(subject: Subject, targets: Targets, profile: Profile) -> list[Found]:
    """What was found of everything in it, up to where it failed."""
    found: list[Found] = []
    about: dict[str, Any] = {"subject": subject, "layer": None}
    try:
        for target in targets.of(subject):
            about["layer"] = target.layer
            calls = profile(target.run)
            seen = bool(calls) and all(calls)
            found.append(about | {"note": None if seen else NO_KERNEL, "calls": calls, "moved": target.moved})
    except Exception as error:  # the next subject may go well
        found.append(about | {"note": failure(error)})
    return found


def write_profiles(subjects: Sequence[Subject], path: Path, targets: Targets, profile: Profile) -> None:
    """A line for everything that was found, as soon as it was."""
    with path.open("w", encoding="utf-8") as file:
        for subject in subjects:
            for found in profile_subject(subject, targets, profile):
                file.write(json.dumps(found) + "\n")
            file.flush()


def main(arguments: Sequence[str]) -> None:
    """Profile what the command line names."""
    from benchmarks.gpu.timing import L2Flush

    flush = L2Flush()
    write_profiles(json.loads(arguments[0]), Path(arguments[1]), Targets(), lambda run: profile_calls(run, flush))


if __name__ == "__main__":
    main(sys.argv[1:])
