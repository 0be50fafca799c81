"""The command line of ``python -m benchmarks.bench_model``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from d2moe_ext.cli.common import print_json, stdout_console
from d2moe_ext.cli.run import run_app

PROGRAM = "python -m benchmarks.bench_model"
SOME_WRONG = 1
DTYPES = ("bfloat16", "float32")
_TABLE = {
    "contender": "contender",
    "load_s": "load s",
    "peak_mb": "peak MB",
    "disk_mb": "disk MB",
    "prefill_1": "prefill 1",
    "prefill_16": "prefill 16",
    "generate_1": "generate 1",
    "generate_16": "generate 16",
    "first_token_ms": "first ms",
    "generate_1_vs_best_hf": "generate 1 × best HF",
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def bench(
    model: Annotated[list[str] | None, typer.Option(help="shipped or random; without it, both.")] = None,
    contender: Annotated[list[str] | None, typer.Option(help="Part of a name; without it, all contenders.")] = None,
    repeats: Annotated[int, typer.Option(help="Passes over the contenders.")] = 2,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    new_tokens: Annotated[int, typer.Option(help="Tokens generated for each sequence.")] = 32,
    write: Annotated[Path | None, typer.Option(help="Also write the JSON here, after every model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> int:
    """Time whole models, contenders in turn, each in a process of its own."""
    from benchmarks.model.checkpoints import CONTENDERS, MODELS

    for name in model or MODELS:
        _choice("--model", name, MODELS)
    _choice("--dtype", dtype, DTYPES)
    for option, value in (("--repeats", repeats), ("--new-tokens", new_tokens)):
        if value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}.")
    chosen = [one for one in CONTENDERS if not contender or any(part in one.name for part in contender)]
    if not chosen:
        raise ValueError(f"--contender must be part of one of {'; '.join(c.name for c in CONTENDERS)}, got {contender}.")
    from benchmarks.model.measure import Sizes, measure_model
    from d2moe_ext.bench.record import make_record, shown_command, write_record
    from d2moe_ext.cli.common import quiet_transformers

    quiet_transformers()
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    command = shown_command(PROGRAM, sys.argv[1:])
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(model or MODELS):
        sizes = Sizes(new_tokens=new_tokens)
        rows += measure_model(name, dtype, chosen, repeats, sizes, lambda line: console.print(line, markup=False))
        write_record(write, make_record("model", rows, None, command))
    record = make_record("model", rows, None, command)
    if as_json:
        print_json(record)
    else:
        stdout_console().print(_tables(rows))
    failed = [row for row in rows if row["failed"]]
    for row in failed:
        console.print(f"{row['model']}, {row['dtype']}, {row['contender']}: {row['note']}", markup=False)
    return SOME_WRONG if failed else 0


def _tables(rows: list[dict[str, Any]]) -> Any:
    from rich.console import Group
    from rich.text import Text

    from d2moe_ext.report import plain_table

    parts: list[Any] = []
    for name in dict.fromkeys(row["model"] for row in rows):
        found = [row for row in rows if row["model"] == name]
        table = plain_table(f"{name}, {found[0]['dtype']}; tokens per second, by sequences in a batch", tuple(_TABLE.values()))
        for row in found:
            table.add_row(*(_shown(row[key]) for key in _TABLE))
        parts += [table, *(Text(f"{row['contender']}: {row['note']}") for row in found if row["note"])]
    return Group(*parts)


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def _choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{option} must be one of {', '.join(choices)}, got {value!r}.")


def main() -> int:
    """Run the command and return its exit code: 2 and one sentence for bad input, 1 where a contender was wrong or failed."""
    if sys.argv[1:] == ["--worker"]:
        from benchmarks.model.worker import run_worker

        return run_worker()
    return run_app(app, PROGRAM, "bench_model")
