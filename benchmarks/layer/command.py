"""The command line of ``python -m benchmarks.bench_layer``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from d2moe_ext.cli.common import print_json, stdout_console
from d2moe_ext.cli.run import run_app

PROGRAM = "python -m benchmarks.bench_layer"
SOME_WRONG = 1
_GIB = 2**30

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
DTYPES = ("bfloat16", "float32")


@app.command()
def bench(
    shape: Annotated[list[str] | None, typer.Option(help="A model's name; without it, all five.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bfloat16 or float32; without it, both.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens of a forward; without it 1, 8, 64, 512 and 2048.")] = None,
    contender: Annotated[list[str] | None, typer.Option(help="Part of a name; without it, all contenders.")] = None,
    repeats: Annotated[int, typer.Option(help="Rounds at most.")] = 30,
    seconds: Annotated[float, typer.Option(help="Seconds of timed calls a cell, after which rounds end (3 at least).")] = 6.0,
    memory: Annotated[float | None, typer.Option(help="GiB of weights at once; without it, 3/4 of what is free.")] = None,
    growth: Annotated[
        bool, typer.Option("--growth", help="Instead, how time grows with tokens, experts, rank and columns.")
    ] = False,
    write: Annotated[Path | None, typer.Option(help="Also write the JSON here, after every cell.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw a PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> int:
    """Time one MoE layer's forward, contenders in turn, with cold caches."""
    _check(repeats, seconds, tokens or [1], dtype or DTYPES)
    from d2moe_ext.bench.floors import Gauges
    from d2moe_ext.bench.layer import Setting, wrong_rows
    from d2moe_ext.bench.record import make_record, shown_command, write_record
    from d2moe_ext.bench.timing import Budget, CacheFlush

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    kind, dtypes = ("growth", dtype or ["bfloat16"]) if growth else ("layer", dtype or list(DTYPES))
    cells = _growth(dtypes) if growth else _layers(shape, dtypes, tokens, contender, memory)
    gauges = Gauges(dtypes)
    setting = Setting(gauges, Budget(repeats, seconds), CacheFlush())
    command = shown_command(PROGRAM, sys.argv[1:])
    rows: list[dict[str, Any]] = []
    for more in cells(setting, lambda line: console.print(line, markup=False)):
        rows += more
        write_record(write, make_record(kind, rows, gauges.floors, command))
    record = make_record(kind, rows, gauges.floors, command)
    if as_json:
        print_json(record)
    else:
        stdout_console().print(_tables(record))
    if plot is not None:
        _draw(record, plot)
    wrong = wrong_rows(rows)
    for row in wrong:
        console.print(f"{row['contender']}, {row['tokens']} tokens, {row['dtype']}: {row['note']}", markup=False)
    return SOME_WRONG if wrong else 0


Cells = Callable[[Any, Callable[[str], None]], Iterable[list[dict[str, Any]]]]


def _layers(
    shapes: list[str] | None, dtypes: Any, tokens: list[int] | None, contenders: list[str] | None, memory: float | None
) -> Cells:
    from benchmarks.layer.shapes import SHAPES
    from benchmarks.layer.sweep import TOKENS, Sweep, measure_sweep

    for name in shapes or []:
        if name not in SHAPES:
            raise ValueError(f"--shape must be one of {', '.join(SHAPES)}, got {name!r}.")
    limit = None if memory is None else int(memory * _GIB)
    sweep = Sweep(shapes or SHAPES, dtypes, tokens or TOKENS, contenders or (), limit)
    return lambda setting, progress: measure_sweep(sweep, setting, progress)


def _growth(dtypes: Any) -> Cells:
    from benchmarks.layer.growth import measure_growth

    return lambda setting, progress: measure_growth(dtypes, setting, progress)


def _tables(record: dict[str, Any]) -> Any:
    if record["kind"] == "growth":
        from benchmarks.layer.growth import growth_tables

        return growth_tables(record)
    from d2moe_ext.report_bench import bench_tables

    return bench_tables(record)


def _draw(record: dict[str, Any], path: Path) -> None:
    # Drawing needs matplotlib, which only the optional installation "study" brings.
    from benchmarks.performance.plots import draw_growth, draw_layers

    (draw_growth if record["kind"] == "growth" else draw_layers)(record, path)


def _check(repeats: int, seconds: float, tokens: Iterable[int], dtypes: Iterable[str]) -> None:
    for name in dtypes:
        if name not in DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}.")
    if repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {repeats}.")
    if seconds <= 0:
        raise ValueError(f"--seconds must be greater than 0, got {seconds}.")
    if min(tokens) < 1:
        raise ValueError(f"--tokens must be at least 1, got {min(tokens)}.")


def main() -> int:
    """Run the command and return its exit code: 2 and one sentence for bad input, 1 where an output was wrong."""
    return run_app(app, PROGRAM, "bench_layer")
