"""``d2moe bench``: how fast one MoE layer of a model runs, held against what the machine can do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2moe_ext.cli import common
from d2moe_ext.cli.options import DtypeOption, JsonOption, TrustOption

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from d2moe_ext.adapters import ExpertsLayout
    from d2moe_ext.bench.contenders import Contender

_TOKENS = (1, 64, 512)
_OUTPUT_WRONG = 1


def bench_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A model's directory, compressed or not.")],
    layer: Annotated[int, typer.Option(help="Which of the MoE layers, counted from 0.")] = 0,
    tokens: Annotated[
        list[int] | None, typer.Option(help="Tokens of a forward; may be given again. Without it 1, 64 and 512.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Rounds at most.")] = 30,
    seconds: Annotated[float, typer.Option(help="Seconds of timed calls for each size, after which rounds end.")] = 10.0,
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Time one MoE layer of a model: transformers' implementations if it is not compressed, plain torch, native operators.

    On random inputs that are routed evenly, with cold caches; each output is compared with the plain one first. The floor is
    the time in which this machine could at best read the bytes and do the FLOPs.
    """
    sizes = list(_TOKENS) if tokens is None else tokens
    _check(directory, sizes, repeats, seconds)
    network = common.load_model(str(directory), dtype, trust_remote_code)
    record = _measure(network, layer, sizes, repeats, seconds)
    if as_json:
        common.print_json(record)
    else:
        from d2moe_ext.report_bench import bench_tables

        common.stdout_console().print(bench_tables(record))
    from d2moe_ext.bench.layer import wrong_rows

    for row in wrong_rows(record["rows"]):
        print(f"d2moe: {row['contender']}, {row['tokens']} tokens: {row['note']}.", file=sys.stderr)
    if wrong_rows(record["rows"]):
        raise typer.Exit(_OUTPUT_WRONG)


def _check(directory: Path, tokens: list[int], repeats: int, seconds: float) -> None:
    if not directory.is_dir():
        raise ValueError(f"DIR must be a model's directory, got {str(directory)!r}.")
    if min(tokens) < 1:
        raise ValueError(f"--tokens must be at least 1, got {min(tokens)}.")
    if repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {repeats}.")
    if not seconds > 0:
        raise ValueError(f"--seconds must be greater than 0, got {seconds}.")


def _measure(network: PreTrainedModel, layer: int, tokens: list[int], repeats: int, seconds: float) -> dict[str, Any]:
    from d2moe_ext.bench.contenders import make_inputs
    from d2moe_ext.bench.floors import Gauges
    from d2moe_ext.bench.layer import Setting, measure_cell
    from d2moe_ext.bench.record import make_record, shown_command
    from d2moe_ext.bench.timing import Budget, CacheFlush
    from d2moe_ext.shapes import experts_per_token

    name, layout, contenders = _contenders(network, layer)
    setting = Setting(Gauges([str(network.dtype).removeprefix("torch.")]), Budget(repeats, seconds), CacheFlush())
    rows: list[dict[str, Any]] = []
    with common.progress_bar() as progress:
        for done, count in enumerate(tokens):
            progress("sizes", done, len(tokens))
            inputs = make_inputs(layout, experts_per_token(network), count, network.dtype)
            rows += [{"shape": name} | row for row in measure_cell(contenders, inputs, setting)]
    return make_record("checkpoint", rows, setting.gauges.floors, shown_command("d2moe", sys.argv[1:]))


def _contenders(network: PreTrainedModel, layer: int) -> tuple[str, ExpertsLayout, list[Contender]]:
    """The layer's name, its layout, and who computes it."""
    from d2moe_ext.adapters import find_experts
    from d2moe_ext.bench.contenders import compressed_contenders, plain_contenders
    from d2moe_ext.hf.quantizer import compressed_modules

    compressed = compressed_modules(network)
    names = list(compressed) or [view.name for view in find_experts(network)]
    if not 0 <= layer < len(names):
        raise ValueError(f"--layer must be in 0..{len(names) - 1}, the model's MoE layers, got {layer}.")
    name = names[layer]
    if compressed:
        module = compressed[name]
        return name, module.spec.layout, compressed_contenders(module, "compressed", torch_too=True)
    view = find_experts(network)[layer]
    return name, view.layout, plain_contenders(view, torch_too=True)
