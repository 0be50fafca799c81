"""Native operators in a model that is already in memory, and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from d2moe_ext import _native
from d2moe_ext.adapters import find_experts, restore
from d2moe_ext.checkpoint import read_compressed_layers, read_tensors, tensor_infos, weight_files
from d2moe_ext.experts import Backend, D2MoEExperts, UncompressedExperts
from d2moe_ext.hf.quantizer import check_files, compressed_modules, mark_compressed, unmark_compressed, views_of

Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass
class _Patch:
    """What :func:`unpatch_model` undoes.

    Attributes:
        originals: the plain experts by path; none if the model was compressed.
        marked: whether the model was marked as compressed.
        weight_conversions: what it remembered of its loading before it was.
    """

    originals: dict[str, nn.Module]
    marked: bool = False
    weight_conversions: list[Any] | None = None


def patch_model(model: Model, checkpoint: str | Path | None = None, backend: Backend = "native") -> Model:
    """Run the experts of ``model`` through this package's operators, in place.

    Args:
        model: a compressed model, whose layers change their backend; or a plain one, whose experts are then computed as
            they are (one base for each expert, no deltas) and share their weights with the original modules.
        checkpoint: a directory of a compressed model: its layers are loaded into the plain ``model``, in the device and
            dtype of what they replace. The plain experts are kept for :func:`unpatch_model`; to hold the compressed
            ones only, load the directory with ``from_pretrained``.
        backend: ``"native"``, for inference (a gradient that would be needed raises), or ``"torch"``, the
            differentiable reference.

    Returns:
        ``model``.

    Raises:
        ValueError: one sentence: another backend, native operators for a model on a GPU from a build without CUDA, a
            model that is patched already or has no experts, a checkpoint for a compressed model, or one that is damaged or
            of another model. The model is then as it was.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"patch_model: backend must be 'native' or 'torch', got {backend!r}")
    if "_d2moe_patch" in model.__dict__:
        raise ValueError(f"patch_model: the model must not be patched already, got a patched {type(model).__name__}")
    if backend == "native":
        _check_build(model)
    modules = compressed_modules(model)
    if checkpoint is not None:
        if modules:
            raise ValueError(
                f"patch_model: the model must be plain where a checkpoint is given, got {len(modules)} compressed layers"
            )
        patch = _load_layers(model, Path(checkpoint))
    elif modules:
        patch = _Patch({})
    else:
        patch = _wrap_plain(model)
    for module in model.modules():
        if isinstance(module, D2MoEExperts):
            module.set_backend(backend)
    # In __dict__: what is kept must not count as part of the model.
    model.__dict__["_d2moe_patch"] = patch
    return model


def _check_build(model: nn.Module) -> None:
    if not _native.C.build_info()["cuda"] and any(parameter.device.type == "cuda" for parameter in model.parameters()):
        raise ValueError(
            "patch_model: the backend must be 'torch' for a model on a GPU where d2moe_ext was built without CUDA, got 'native'"
        )


def unpatch_model(model: Model) -> Model:
    """Undo :func:`patch_model`, in place: the very modules and weights that stood there before.

    Raises:
        ValueError: the model is not patched.
    """
    patch = model.__dict__.pop("_d2moe_patch", None)
    if patch is None:
        raise ValueError(f"unpatch_model: the model must be patched, got an unpatched {type(model).__name__}")
    for name, original in patch.originals.items():
        restore(model, name, original)
    if patch.marked:
        unmark_compressed(model, patch.weight_conversions)
    for module in compressed_modules(model).values():
        module.set_backend("torch")
    return model


def _wrap_plain(model: PreTrainedModel) -> _Patch:
    originals = {}
    for view in find_experts(model):
        originals[view.name] = view.module
        view.replace(UncompressedExperts(view))
    return _Patch(originals)


def _load_layers(model: PreTrainedModel, directory: Path) -> _Patch:
    described = read_compressed_layers(directory)
    views = views_of(model, described.layers)
    infos = tensor_infos(weight_files(directory))
    # Everything is read and checked before the model is touched.
    modules, devices = {}, {}
    for name, view in views.items():
        weight = view.down_weight(0)
        modules[name] = D2MoEExperts(described.layers[name], view, dtype=weight.dtype, device="meta")
        devices[name] = weight.device
    in_files = check_files(model, modules, infos, get_model_conversion_mapping(model), str(directory))
    in_model = {file_name: name for name, file_name in in_files.items()}
    for file_name, tensor in read_tensors({file_name: infos[file_name] for file_name in in_model}):
        path = next(path for path in modules if in_model[file_name].startswith(f"{path}."))
        name = in_model[file_name].removeprefix(f"{path}.")
        if "." in name:
            continue  # a norm after each expert: the plain model's own, which compression leaves alone
        empty = getattr(modules[path], name)
        value = tensor.to(device=devices[path], dtype=empty.dtype, copy=True)
        setattr(modules[path], name, nn.Parameter(value, requires_grad=False) if isinstance(empty, nn.Parameter) else value)
    for name, module in modules.items():
        module.check_indices(name)
    originals = {name: view.module for name, view in views.items()}
    for name, view in views.items():
        view.replace(modules[name])
    patch = _Patch(originals, marked=True, weight_conversions=getattr(model, "_weight_conversions", None))
    mark_compressed(model, described.layers, described.compression)  # which also computes the column norms
    return patch
