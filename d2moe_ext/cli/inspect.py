"""``d2moe inspect``: what a compressed model's directory holds, without loading the model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2moe_ext.cli import common
from d2moe_ext.cli.options import JsonOption, TrustOption

if TYPE_CHECKING:
    from d2moe_ext.checkpoint import CompressedLayers, TensorInfo
    from d2moe_ext.experts import D2MoEExperts


def inspect_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A compressed model's directory.")],
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show how a model was compressed, and each layer's columns, ranks and size."""
    record = describe(directory, trust_remote_code)
    if as_json:
        common.print_json(record)
    else:
        from d2moe_ext.report import inspection_tables

        common.stdout_console().print(inspection_tables(record, str(directory)))


def describe(directory: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """What ``d2moe inspect --json`` prints: config.json, the files' headers and the ranks are all that is read.

    The model is built on the meta device, because it alone knows which names its tensors have in the files.

    Raises:
        ValueError: the directory holds no compressed model, or not exactly its tensors.
    """
    from d2moe_ext import checkpoint

    compressed = checkpoint.read_compressed_layers(directory)
    infos = checkpoint.tensor_infos(checkpoint.weight_files(directory))
    modules, in_files = _modules(directory, compressed, infos, trust_remote_code)
    rank_names = {in_files[name]: name for name in in_files if name.endswith("_delta_rank")}
    ranks = checkpoint.read_tensors({name: infos[name] for name in rank_names})
    rank_lists = {rank_names[name]: tensor.tolist() for name, tensor in ranks}
    return {
        "format_version": compressed.format_version,
        "compression": compressed.compression,
        "parameters": sum(math.prod(info.shape) for info in infos.values()),
        "bytes_on_disk": common.weight_bytes(directory),
        "layers": [
            _layer(name, module, rank_lists) | {"bytes": _stored_bytes(name, in_files, infos)}
            for name, module in modules.items()
        ],
    }


def _modules(
    directory: Path, compressed: CompressedLayers, infos: dict[str, TensorInfo], trust_remote_code: bool
) -> tuple[dict[str, D2MoEExperts], dict[str, str]]:
    """The compressed layers without memory behind them, and the names in the files of their tensors."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    from d2moe_ext.hf.quantizer import check_files, compressed_modules, install_experts

    config = common.load_config(str(directory), trust_remote_code)
    model = common.meta_model(config, "auto", trust_remote_code)
    install_experts(model, compressed.layers)
    modules = compressed_modules(model)
    return modules, check_files(model, modules, infos, get_model_conversion_mapping(model), str(directory))


def _layer(name: str, module: D2MoEExperts, ranks: dict[str, list[int]]) -> dict[str, Any]:
    spec = module.spec
    return {
        "name": name,
        "num_experts": spec.layout.num_experts,
        "num_bases": spec.gate_up.num_bases,
        "gate_up_kept": spec.gate_up.kept,
        "gate_up_keep": spec.gate_up.keep,
        "down_kept": spec.down.kept,
        "down_keep": spec.down.keep,
        "gauge_fixed": spec.gauge_fixed,
        "factor_dtype": spec.factor_dtype,
        "ranks": {delta: ranks[f"{name}.{delta}_delta_rank"] for delta in spec.delta_order},
        "parameters": sum(tensor.numel() for tensor in module.state_dict().values()),
    }


def _stored_bytes(layer: str, in_files: dict[str, str], infos: dict[str, TensorInfo]) -> int:
    """Of a layer's tensors, without the files' headers."""
    stored = [infos[file_name] for name, file_name in in_files.items() if name.startswith(f"{layer}.")]
    return sum(math.prod(info.shape) * info.dtype.itemsize for info in stored if not isinstance(info.dtype, str))
