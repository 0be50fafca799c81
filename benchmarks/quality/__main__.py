"""``python -m benchmarks.quality``: run parts of the study on a model, or write the document from what was run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from d2moe_ext.cli.common import check_seqlen, load_config
from d2moe_ext.cli.run import run_app

PROGRAM = "python -m benchmarks.quality"
ROW_FAILED = 1
DEFAULT_RESULTS = Path(__file__).parent / "results"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def study(
    model: Annotated[Path | None, typer.Option(help="A model's directory; without it nothing is run.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="USE=FILE, for each of calibration, selection, test and out; FILE may be the word python, and for out also "
            "the word headers."
        ),
    ] = None,
    part: Annotated[list[str] | None, typer.Option(help="A part of the study, or none; without it, all of them.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="A method; without it, all of the parts'.")] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="A ratio; without it, each part's own.")] = None,
    seeds: Annotated[int, typer.Option(help="Draws of the calibration windows.")] = 3,
    judge: Annotated[Literal["selection", "test"], typer.Option(help="The text that judges.")] = "selection",
    also: Annotated[
        Literal["selection", "test"] | None, typer.Option(help="A second text that judges the same compressed models.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows, drawn at random.")] = 64,
    seqlen: Annotated[int, typer.Option(help="Tokens of a calibration window.")] = 256,
    tokens: Annotated[int, typer.Option(help="First tokens of each judging text that are read.")] = 16384,
    window: Annotated[int, typer.Option(help="Tokens of a judging window.")] = 256,
    results: Annotated[Path, typer.Option(help="The folder of the rows, one file per model.")] = DEFAULT_RESULTS,
    write: Annotated[Path | None, typer.Option(help="Write the document, from all rows judged by --judge.")] = None,
    figures: Annotated[bool, typer.Option("--figures", help="Also measure what the figures show.")] = False,
    forward: Annotated[bool, typer.Option("--forward", help="Also time the forward; on a quiet machine.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run rows again that failed.")] = False,
) -> int:
    """Run parts of the quality study on a model and write the document."""
    from benchmarks.quality.methods import all_methods
    from benchmarks.quality.results import Results, Sizes

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if model is None and write is None:
        raise ValueError("--model or --write must be given, got neither.")
    found, failed, methods = Results(results), 0, all_methods()
    sizes = Sizes(samples, seqlen, tokens, window)
    if model is not None:
        from benchmarks.quality.runner import Laboratory, of_methods, tasks_of
        from benchmarks.quality.texts import parse_texts

        # --part none runs no table: for figures and times alone.
        tasks = [] if part == ["none"] else tasks_of(part, ratio, seeds, methods)
        if method:
            tasks = of_methods(tasks, method)
        sources = parse_texts(text or [])
        if not (model / "config.json").is_file():
            raise ValueError(f"--model must be a directory with a config.json, got {str(model)!r}.")
        for option, length in (("--seqlen", seqlen), ("--window", window)):
            check_seqlen(option, length, load_config(str(model)))
        judges = [judge] if also in (None, judge) else [judge, also]
        from d2moe_ext.bench.record import shown_command

        given = shown_command(PROGRAM, sys.argv[1:])
        laboratory = Laboratory(
            model, sources, judges, sizes, methods, found, given, lambda line: console.print(line, markup=False)
        )
        rows = laboratory.run(tasks, retry_failed)
        if figures:
            from benchmarks.quality.diagnostics import write_diagnostics

            write_diagnostics(laboratory, results)
        if forward:
            from benchmarks.quality.forward import write_forward

            write_forward(laboratory, results)
        failed = sum(row.failure is not None for row in rows)
        console.print(f"{len(rows)} rows measured, {failed} of them failed.")
    if write is not None:
        from benchmarks.quality.document import write_document

        write_document(found, judge, sizes, methods, write)
    return ROW_FAILED if failed else 0


def main() -> int:
    """Run the command and return its exit code: 2 and one sentence for bad input, 1 where a row failed."""
    return run_app(app, PROGRAM, "quality")


if __name__ == "__main__":
    sys.exit(main())
