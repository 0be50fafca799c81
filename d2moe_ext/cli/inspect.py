"""``d2moe inspect``: what a compressed model's directory holds, without loading the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2moe_ext.cli import common
from d2moe_ext.cli.options import JsonOption

if TYPE_CHECKING:
    from d2moe_ext.experts import ExpertsSpec


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
    """What ``d2moe inspect --json`` prints."""
    from d2moe_ext import checkpoint

    record = checkpoint.read_record(directory)
    reader = checkpoint.TensorReader(directory)
    layers = [_describe_layer(name, spec, reader) for name, spec in record.layers.items()]
    return {
        "format_version": record.format_version,
        "compression": record.compression,
        "parameters": sum(reader.elements(name) for name in reader.names()),
        "bytes_on_disk": common.weight_bytes(directory),
        "layers": layers,
    }
