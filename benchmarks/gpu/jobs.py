"""What is measured, most important first, and a run that stops in time and is taken up again where it stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import ceilings, layers, operators, parts, profiles, whitened
from benchmarks.gpu.part_calls import LOW_RANK, SPARSE_BASE
from benchmarks.gpu.timing import Stopwatch
from d2moe_ext.bench.layer import failure
from tools.gpu_record import write_atomically

Row = dict[str, Any]


class GpuLostError(RuntimeError):
    """The GPU answers nothing any more, as after a kernel's illegal access to memory."""


@dataclass(frozen=True)
class Job:
    """Something that is measured at one go; its rows are written together.

    Attributes:
        name: in its rows.
        kind: of its rows.
        seconds: that it may take: a guess, until another of its kind has taken longer.
        measure: from the ceilings to its rows.
    """

    name: str
    kind: str
    seconds: float
    measure: Callable[[dict[str, Any]], list[Row]]


def all_jobs(watch: Stopwatch) -> list[Job]:
    """Ceilings, operators, the most telling layers, a forward's parts and profiles; then the other layers, and last the loops
    of ``torch.linalg.svd``."""
    held = layers.Layers(watch)

    def layer(cell: layers.Cell) -> Job:
        name = f"layer, {cell[0]}, {cell[1]}"
        return Job(name, layers.KIND, 20.0, lambda found: held.measure(cell, found))

    def operator(case: operators.Case) -> Job:
        return Job(
            f"operator, {case.name}", operators.KIND, 10.0, lambda found: [operators.measure_operator(case, found, watch)]
        )

    def stack(shape: tuple[int, int, int]) -> Job:
        name = f"operator, {whitened.OPERATOR}, {whitened.case_of(shape)}"
        return Job(name, operators.KIND + " and its loop", 60.0, lambda found: [whitened.measure_whitened_svd(shape, watch)])

    def calls(what: str, subjects: Callable[[], list[profiles.Subject]]) -> Job:
        seconds = profiles.SECONDS + 15.0
        return Job(f"part, {what}", parts.KIND, seconds, lambda found: parts.measure_calls(subjects(), found, watch))

    def profile(shape: str) -> Job:
        name = f"profile, {shape}"
        return Job(name, parts.PROFILE, profiles.SECONDS, lambda found: parts.measure_profiles(shape, found, watch))

    cells, first = layers.cells(), len(layers.FIRST_SHAPES) * len(layers.FIRST_TOKENS)
    stacks = [stack(shape) for shape in whitened.STACKS]
    return [
        Job(ceilings.KIND, ceilings.KIND, 20.0, lambda found: [ceilings.measure_ceilings(watch)]),
        *map(operator, operators.CASES),
        *map(layer, cells[:first]),
        calls(LOW_RANK, parts.low_rank_subjects),
        calls(SPARSE_BASE, parts.sparse_base_subjects),
        *map(profile, parts.SHAPES),
        stacks[0],
        *map(layer, cells[first:]),
        *stacks[1:],
    ]


def resume(path: Path, record: dict[str, Any]) -> list[Row]:
    """The rows that an earlier run left, if it was of the same commit, GPU and torch; else none.

    Raises:
        ValueError: the file is not what such a run writes.
    """
    if not path.is_file():
        return []
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        return list(before["rows"]) if _origin(before) == _origin(record) else []
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path.name} must be a record of this benchmark, got something else.") from None


def _origin(record: dict[str, Any]) -> tuple[str, str, str]:
    return record["commit"], record["gpu"]["name"], record["versions"]["torch"]


def run_jobs(
    jobs: Sequence[Job],
    record: dict[str, Any],
    path: Path,
    seconds_left: Callable[[], float],
    progress: Callable[[str], None],
    still_there: Callable[[], object] = torch.cuda.synchronize,
) -> list[str]:
    """Measure what the record lacks, and write the record after every job.

    Args:
        jobs: in their order; one for which the time is too short is left, and a shorter one after it still done.
        record: with the rows that there are, under ``rows``; they are added to.
        path: its file.
        seconds_left: until the end.
        progress: called with a line at every job.
        still_there: raises RuntimeError where the GPU is lost.

    Returns:
        The names of the jobs that are left.

    Raises:
        GpuLostError: the GPU is lost; the job at which it was has a row that says so, and is not tried again.
    """
    rows: list[Row] = record["rows"]
    longest: dict[str, float] = {}
    left = []
    write_atomically(path, record)
    for job in jobs:
        if any(row["job"] == job.name for row in rows):
            continue
        found = None if job.kind == ceilings.KIND else _ceilings(rows)
        if found == {} or max(job.seconds, longest.get(job.kind, 0.0)) > seconds_left():
            left.append(job.name)
            continue
        progress(job.name)
        started = time.monotonic()
        lost = _add_rows(job, found or {}, rows, still_there)
        longest[job.kind] = max(longest.get(job.kind, 0.0), time.monotonic() - started)
        write_atomically(path, record)
        if lost is not None:
            raise GpuLostError(f"The GPU must answer after {job.name}, but it {lost}.")
    return left


def _add_rows(job: Job, found: Row, rows: list[Row], still_there: Callable[[], object]) -> str | None:
    """The rows of a job, one with a note where it failed; what the GPU says where it is lost."""
    about = {"job": job.name, "table": job.kind.partition(" ")[0]}
    try:
        more = job.measure(found)
        still_there()
    except Exception as error:  # the GPU's time is short: what else there is to measure is measured
        if job.kind == ceilings.KIND:
            raise  # there is nothing to hold anything against
        rows.append(about | {"note": failure(error)})
        try:
            still_there()
        except RuntimeError as lost:
            return failure(lost)
        return None
    rows += [about | row for row in more]
    return None


def _ceilings(rows: Iterable[Row]) -> Row:
    """Empty where they were not measured yet."""
    return next((row for row in rows if row["table"] == ceilings.KIND), {})
