"""Contenders in turn, each time in a fresh process, and the rows that come of it."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.model.checkpoints import Contender, prompt_tokens, write_checkpoints
from d2moe_ext.cli.common import one_sentence

ROOT = Path(__file__).parents[2]
# Measured fields, in the order of a row.
SPEEDS = ("prefill_1", "prefill_16", "generate_1", "generate_16")
MEASURED = ("load_s", "load_peak_mb", "peak_mb", "disk_mb", *SPEEDS, "first_token_ms")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Sizes:
    """Tokens of a prompt that is read at once, by sequences in the batch; of one that generation starts from; and new ones."""

    prefill_1: int = 512
    prefill_16: int = 128
    prompt: int = 32
    new_tokens: int = 32

    @property
    def needed(self) -> int:
        """Tokens of text."""
        return max(self.prefill_1, 16 * self.prefill_16, 16 * self.prompt)


class WorkerError(Exception):
    """A process that ended without a result."""


def measure_model(
    model: str,
    dtype: str,
    contenders: Sequence[Contender],
    repeats: int,
    sizes: Sizes,
    progress: Progress,
    overrides: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """One row a contender: medians over ``repeats`` passes.

    A contender that is wrong, or whose process fails, has a note in place of times.
    """
    with tempfile.TemporaryDirectory(prefix="bench_model_") as name:
        folder = Path(name)
        progress(f"{model}, {dtype}: writing checkpoints")
        write_checkpoints(model, getattr(torch, dtype), contenders, folder, overrides)
        tokens = prompt_tokens(model, sizes.needed, overrides).tolist()
        jobs = {
            contender.name: {
                "directory": str(folder / contender.checkpoint),
                "dtype": dtype,
                "implementation": contender.implementation,
                "tokens": tokens,
                "sizes": asdict(sizes),
            }
            for contender in contenders
        }
        results = _passes(jobs, repeats, lambda line: progress(f"{model}, {dtype}, {line}"))
    about = {"model": model, "dtype": dtype}
    hf = {contender.name for contender in contenders if contender.implementation is not None}
    return _against_best([about | _row(name, *result) for name, result in results.items()], hf)


def _passes(jobs: dict[str, dict[str, Any]], repeats: int, progress: Progress) -> dict[str, tuple[list[Any], str, bool]]:
    """By name: measurements, why there are none, and whether that is a failure."""
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    failed: dict[str, str] = {}
    for name, step, job in _steps(jobs, repeats):
        if name in failed:
            continue
        progress(f"{name}: {step}")
        try:
            result = run_job(job)
        except WorkerError as error:
            failed[name] = f"failed: {error}"
            continue
        if not job["check"]:
            measured[name].append(result)
        elif result["note"]:
            failed[name] = result["note"]
    # A contender that fails in a later pass is not to be trusted in an earlier one.
    return {name: ([] if name in failed else runs, failed.get(name, ""), name in failed) for name, runs in measured.items()}


def _steps(jobs: dict[str, dict[str, Any]], repeats: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for name, job in jobs.items():
        if job["implementation"] is None:
            yield name, "check", job | {"check": True}
    for number in range(repeats):
        for name, job in jobs.items():
            yield name, f"pass {number + 1} of {repeats}", job | {"check": False}


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """What a worker makes of a job.

    Raises:
        WorkerError: one sentence: it ended without a result.
    """
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_model", "--worker"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if ended.returncode == 0 and ended.stdout.strip():
        return dict(json.loads(ended.stdout.strip().splitlines()[-1]))
    said = ended.stderr.strip().splitlines()
    raise WorkerError(one_sentence(said[-1] if said else f"the process ended with code {ended.returncode}"))


def _row(name: str, runs: list[dict[str, Any]], note: str, failed: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"contender": name}
    for key in MEASURED:
        values = [run[key] for run in runs if run[key] is not None]
        row[key] = statistics.median(values) if values else None
    return row | {"passes": len(runs), "note": note or (runs[0]["note"] if runs else ""), "failed": failed}


def _against_best(rows: list[dict[str, Any]], hf: set[str]) -> list[dict[str, Any]]:
    """Each speed over the best of transformers' contenders; above 1 is faster."""
    for key in SPEEDS:
        best = max((row[key] for row in rows if row["contender"] in hf and row[key] is not None), default=None)
        for row in rows:
            row[f"{key}_vs_best_hf"] = None if best is None or row[key] is None else row[key] / best
    return rows
