"""``d2moe inspect``: what a compressed model's directory holds, without loading the model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from d2moe_ext.cli import common
from d2moe_ext.cli.options import JsonOption


def inspect_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A compressed model's directory.")],
    as_json: JsonOption = False,
) -> None:
    """Show how a model was compressed, and each layer's columns, ranks and size."""
    record = describe(directory)
    if as_json:
        common.print_json(record)
    else:
        from d2moe_ext.report import inspection_tables

        common.stdout_console().print(inspection_tables(record, str(directory)))


def describe(directory: Path) -> dict[str, Any]:
    """What ``d2moe inspect --json`` prints: shapes from config.json and the files' headers, ranks from the tensors."""
    from d2moe_ext.spec import ExpertsSpec

    entry = _quantization_entry(directory)
    specs = {name: ExpertsSpec.from_dict(spec) for name, spec in entry["layers"].items()}
    shapes, ranks = _read_tensors(directory)
    return {
        "format_version": entry["format_version"],
        "compression": entry["compression"],
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "bytes_on_disk": common.weight_bytes(directory),
        "layers": [_layer(name, spec, shapes, ranks) for name, spec in specs.items()],
    }
