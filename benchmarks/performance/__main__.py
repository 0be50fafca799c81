"""``python -m benchmarks.performance``: write the page of times from saved results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.performance.page import write_page
from benchmarks.performance.records import read_gpu_records, read_records
from d2moe_ext.cli.run import run_app

DEFAULT_RESULTS = Path(__file__).parent / "results"
# Of make gpu-check and make gpu-bench; made by the first of them that is saved.
DEFAULT_GPU_RESULTS = Path(__file__).parents[1] / "results"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def page(
    results: Annotated[Path, typer.Option(help="The folder of the saved results.")] = DEFAULT_RESULTS,
    gpu_results: Annotated[Path, typer.Option(help="The folder of what was found on GPUs.")] = DEFAULT_GPU_RESULTS,
    write: Annotated[Path, typer.Option(help="The page.")] = Path("docs/performance.md"),
) -> None:
    """Write the page of times."""
    records = read_records(results)
    if not records:
        raise ValueError(f"--results must be a folder with saved results, got {results.name!r} without one.")
    write_page(records, write, gpu_records=read_gpu_records(gpu_results))


def main() -> int:
    """Run the command and return its exit code: 2 and one sentence for results that cannot stand on one page."""
    return run_app(app, "python -m benchmarks.performance", "performance")


if __name__ == "__main__":
    sys.exit(main())
