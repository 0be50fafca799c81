"""``python -m benchmarks.gpu``: operators and layers on the GPU at hand; run by ``make gpu-bench``.

    python -m benchmarks.gpu --results folder --commit sha --limit 540

Rows of the same commit, GPU and torch that are in the folder already are kept: run it again for what is left.
"""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from d2moe_ext.bench.layer import WRONG
from d2moe_ext.cli.run import run_app
from tools.gpu_record import check_commit, check_gpu, check_results, new_record, record_path

PROGRAM = "python -m benchmarks.gpu"
FAILURE = 1

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def bench(
    results: Annotated[str, typer.Option(help="The folder that gpu-bench-GPU.json is written to.")] = "",
    commit: Annotated[str, typer.Option(help="What is measured; written into the file.")] = "",
    limit: Annotated[float, typer.Option(help="Seconds until the end; nothing is begun that would take longer.")] = 540.0,
    started: Annotated[float | None, typer.Option(help="When they began, in seconds since 1970; without it, now.")] = None,
) -> int:
    """Measure ceilings, operators and layers on the GPU at hand, the most telling first."""
    began = time.time() if started is None else started
    folder, commit = check_results(results), check_commit(commit)
    if limit <= 0:
        raise ValueError(f"--limit must be greater than 0, got {limit}.")
    check_gpu()
    from benchmarks.gpu.jobs import GpuLostError, all_jobs, resume, run_jobs
    from benchmarks.gpu.timing import gpu_stopwatch

    record = new_record("gpu-bench", commit)
    path = record_path(folder, record)
    record["rows"] = resume(path, record)
    try:
        left = run_jobs(
            all_jobs(gpu_stopwatch()),
            record,
            path,
            lambda: began + limit - time.time(),
            lambda name: print(f"{time.time() - began:5.0f} s: {name}", flush=True),
        )
    except GpuLostError as error:
        print(f"gpu_bench: {error}", file=sys.stderr)
        return FAILURE
    wrong = [row for row in record["rows"] if (row.get("note") or "").startswith(WRONG)]
    for row in wrong:
        print(f"{row['job']}: {row.get('contender', '')} {row['note']}", file=sys.stderr)
    print(f"written: {path}" + (f"; left for another run: {'; '.join(left)}" if left else ""))
    return FAILURE if wrong else 0


def main() -> int:
    """Run the command and return its exit code: 2 and one sentence for bad input, 1 where an output was wrong."""
    return run_app(app, PROGRAM, "gpu_bench")


if __name__ == "__main__":
    sys.exit(main())
