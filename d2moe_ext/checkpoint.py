"""What a compressed checkpoint holds, read and checked without any model: config.json and safetensors files.

config.json says it under ``quantization_config``::

    {"quant_method": "d2moe", "format_version": 2,
     "layers": {"model.layers.0.mlp.experts": {"layout": {...}, "gate_up": {...}, "down": {...}, "deltas": {...}}, ...},
     "compression": {"ratio": 0.4, ...}}

with each layer's :class:`~d2moe_ext.spec.ExpertsSpec` under the path of its experts in the model. The tensors are those
of :class:`~d2moe_ext.experts.D2MoEExperts`. Every error is a ``ValueError`` of one sentence that names the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from d2moe_ext.spec import ExpertsSpec

QUANT_METHOD = "d2moe"
# 2: gauge-fixed factors, factors of int8.
FORMAT_VERSION = 2
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "I8": torch.int8,
}


@dataclass(frozen=True)
class CompressedLayers:
    """What ``quantization_config`` says.

    Attributes:
        layers: the spec of each compressed layer, by the path of its experts in the model.
        compression: how it was compressed (ratio, merge, ...): a record, read by nobody but people.
        format_version: of the files it was read from; it is written in the newest one.
    """

    layers: dict[str, ExpertsSpec]
    compression: dict[str, Any]
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """The ``quantization_config`` of config.json."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "layers": {name: spec.to_dict() for name, spec in self.layers.items()},
            "compression": dict(self.compression),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CompressedLayers:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: another method, a newer format, or an entry that describes no layer.
        """
        if data.get("quant_method") != QUANT_METHOD:
            raise ValueError(f"quantization_config: quant_method must be {QUANT_METHOD!r}, got {data.get('quant_method')!r}")
        version = data.get("format_version")
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"quantization_config: format_version must be at most {FORMAT_VERSION}, which this d2moe_ext reads, "
                f"got {version!r}"
            )
        layers, compression = data.get("layers"), data.get("compression", {})
        if not isinstance(layers, dict) or not layers or not isinstance(compression, dict):
            raise ValueError(
                f"quantization_config: layers must map paths to specs and compression be a mapping, "
                f"got {type(layers).__name__} and {type(compression).__name__}"
            )
        specs = {}
        for name, spec in layers.items():
            try:
                specs[name] = ExpertsSpec.from_dict(spec)
            except ValueError as error:
                raise ValueError(f"quantization_config: layers[{name!r}] is no layer: {error}") from None
        return cls(specs, compression, version)


class TensorInfo(NamedTuple):
    """A stored tensor's shape and dtype, and its file."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    file: Path


def read_compressed_layers(directory: str | Path) -> CompressedLayers:
    """What the config.json of a compressed checkpoint says.

    Raises:
        ValueError: there is no config.json, it is no JSON, or it describes no compressed model.
    """
    file = Path(directory) / "config.json"
    config = _read_json(file)
    if not isinstance(config.get("quantization_config"), dict):
        raise ValueError(f"{file} must hold a quantization_config of a compressed model, got none")
    try:
        return CompressedLayers.from_dict(config["quantization_config"])
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def weight_files(directory: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint, single or sharded.

    Raises:
        ValueError: there is none, or a shard that the index names is missing.
    """
    directory = Path(directory)
    if (directory / INDEX_FILE).is_file():
        weight_map = _read_json(directory / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{directory / INDEX_FILE} must hold a weight_map, got {type(weight_map).__name__}")
        files = [directory / name for name in sorted(set(weight_map.values()))]
    else:
        files = [directory / SINGLE_FILE]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{directory} must hold {file.name}, got a directory without it")
    return files


def tensor_infos(files: Iterable[str | Path]) -> dict[str, TensorInfo]:
    """Shape, dtype and file of every stored tensor, by its name in the files; reads headers only.

    Raises:
        ValueError: a file is truncated or no safetensors file.
    """
    infos: dict[str, TensorInfo] = {}
    for file in map(Path, files):
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                part = tensors.get_slice(name)
                dtype = part.get_dtype()
                infos[name] = TensorInfo(tuple(part.get_shape()), _DTYPES.get(dtype, dtype), file)
    return infos


def check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, TensorInfo], where: str) -> None:
    """Compare the stored tensors of the compressed layers with what the specs ask for.

    Args:
        expected: by name in the model; only shape and dtype are read, so tensors on the meta device do.
        found: everything stored under the compressed layers' paths, by name in the model.
        where: named in the error.

    Raises:
        ValueError: a tensor is missing, unexpected, or has another shape or kind of dtype.
    """
    for name, tensor in expected.items():
        info = found.get(name)
        if info is None:
            raise ValueError(f"{where} must hold the tensor {name}, got a checkpoint without it")
        if info.shape != tuple(tensor.shape):
            raise ValueError(f"{info.file}: {name} must have shape {list(tensor.shape)}, got {list(info.shape)}")
        floating = isinstance(info.dtype, torch.dtype) and info.dtype.is_floating_point
        if info.dtype != tensor.dtype and not (floating and tensor.dtype.is_floating_point):
            kind = "a floating dtype" if tensor.dtype.is_floating_point else tensor.dtype
            raise ValueError(f"{info.file}: {name} must have {kind}, got {info.dtype}")
    for name in sorted(set(found) - set(expected)):
        raise ValueError(f"{found[name].file} must hold only tensors that its config.json describes, got {name}")


def read_tensors(infos: Mapping[str, TensorInfo]) -> Iterator[tuple[str, Tensor]]:
    """Read the tensors that ``infos`` names (by their names in the files), one after another, each file opened once.

    Raises:
        ValueError: a file is truncated or no safetensors file.
    """
    for file in sorted({info.file for info in infos.values()}):
        with _opened(file) as tensors:
            for name, info in infos.items():
                if info.file == file:
                    yield name, tensors.get_tensor(name)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} must be a whole safetensors file, got one that cannot be read ({error})") from None


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file.parent} must be a compressed checkpoint, got a path without {file.name}")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} must be JSON, got {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(data).__name__}")
    return data
