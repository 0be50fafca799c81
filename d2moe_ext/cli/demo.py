"""``d2moe demo``: the whole job on the model that ships with the sources."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2moe_ext.cli import common
from d2moe_ext.cli.options import JsonOption


def demo_command(
    model: Annotated[Path, typer.Option(help="A model directory.")] = Path("examples/pydoc_moe"),
    out: Annotated[Path, typer.Option(help="Where the compressed models go.")] = Path("demo-out"),
    as_json: JsonOption = False,
) -> None:
    """Calibrate, compress to 0.4 and 0.6, save, load, and print one table: sizes, perplexity and speed."""
    common.check_model(str(model))
    network = common.load_model(str(model))
    tokenizer = common.load_tokenizer(str(model))

    from d2moe_ext.cli.demo_job import run_demo

    with common.progress_bar() as progress:
        result = run_demo(network, tokenizer, model, out, progress)
    if as_json:
        common.print_json(result.to_dict())
    else:
        from d2moe_ext.report import demo_tables

        common.stdout_console().print(demo_tables(result.to_dict()))
