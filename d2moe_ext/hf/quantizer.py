"""The quantization method ``"d2moe"``: how transformers' ``from_pretrained`` and ``save_pretrained`` meet our layers.

transformers lets a package outside it register a quantizer. Ours swaps the experts of the empty model for empty
:class:`~d2moe_ext.experts.D2MoEExperts` before any weight is read, so that the ordinary loader fills them, shard by
shard, straight to their place. transformers' own weight conversions stay as they are: its renamings apply to our
tensors too, in both directions, and its converters (which merge the per-expert tensors of plain layers) match none of
their names.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming, rename_source_key
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from d2moe_ext.adapters import ExpertsView, find_experts
from d2moe_ext.checkpoint import QUANT_METHOD, CompressedLayers, TensorInfo, check_tensors, tensor_infos
from d2moe_ext.experts import D2MoEExperts, UncompressedExperts
from d2moe_ext.spec import ExpertsSpec


@register_quantization_config(QUANT_METHOD)
class D2MoEConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a compressed model; its attributes are the entries of config.json.

    Args:
        entries: see :mod:`d2moe_ext.checkpoint`.

    Raises:
        ValueError: one sentence, for a newer format or entries that describe no compressed model.
    """

    def __init__(self, **entries: Any) -> None:
        self.__dict__.update(CompressedLayers.from_dict(entries).to_dict())

    def compressed_layers(self) -> CompressedLayers:
        """The entries, parsed."""
        return CompressedLayers.from_dict(self.__dict__)


@register_quantizer(QUANT_METHOD)
class D2MoEQuantizer(HfQuantizer):
    """Builds the compressed experts of a model that ``from_pretrained`` is about to fill, and checks them after."""

    requires_calibration = True
    quantization_config: D2MoEConfig

    def __init__(self, quantization_config: D2MoEConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._loading: tuple[PreTrainedModel, list[str] | None] | None = None
        if not hasattr(HfQuantizer, "get_new_dtype"):
            # transformers before 5.17 leaves every renamed tensor of a pre-quantized checkpoint in the file's dtype,
            # and Mixtral's are all renamed. Ours are plain tensors: "not pre-quantized" there means "cast as usual".
            self.pre_quantized = False

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        install_experts(model, self.quantization_config.compressed_layers().layers)
        self._loading = (model, checkpoint_files)

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel | None = None) -> list[Any]:
        # The model is passed since 5.17 only. This is the first moment at which the names in the files can be told.
        assert self._loading is not None  # preprocess_model comes first
        model, files = self._loading
        self._loading = None
        modules = compressed_modules(model)
        if files is not None:
            check_files(model, modules, tensor_infos(files), copy.deepcopy(weight_conversions), str(files[0]))
        return weight_conversions

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, experts in compressed_modules(model).items():
            experts.requires_grad_(False)  # the loader makes every floating parameter trainable
            experts.check_indices(name)
            experts.refresh_column_norms()
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether ``save_pretrained`` works: yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether a trainer may run the model: the method is not made for it."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the forward."""
        return False


def compressed_modules(model: nn.Module) -> dict[str, D2MoEExperts]:
    """The compressed layers of a model, by the path of their experts."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, D2MoEExperts) and not isinstance(module, UncompressedExperts)
    }


def views_of(model: nn.Module, layers: Mapping[str, ExpertsSpec]) -> dict[str, ExpertsView]:
    """The plain experts that ``layers`` describes in their compressed form.

    Raises:
        ValueError: the model has no such layer, or one of another layout.
    """
    views = {view.name: view for view in find_experts(model)}
    for name, spec in layers.items():
        if name not in views:
            raise ValueError(
                f"d2moe: the model must have the experts {name!r} that the checkpoint describes, got {sorted(views)}"
            )
        if views[name].layout != spec.layout:
            raise ValueError(f"d2moe: {name} must have the checkpoint's layout {spec.layout}, got {views[name].layout}")
    return {name: views[name] for name in layers}


def install_experts(model: nn.Module, layers: Mapping[str, ExpertsSpec]) -> None:
    """Put empty compressed experts, with the device and dtype of the plain ones, in their place."""
    for name, view in views_of(model, layers).items():
        weight = view.down_weight(0)
        view.replace(D2MoEExperts(layers[name], view, dtype=weight.dtype, device=weight.device))


def expected_tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Every tensor that a file must hold for these modules, by its name in the model."""
    return {f"{path}.{name}": tensor for path, module in modules.items() for name, tensor in module.state_dict().items()}


def check_files(
    model: PreTrainedModel,
    modules: Mapping[str, nn.Module],
    infos: Mapping[str, TensorInfo],
    weight_conversions: list[Any],
    where: str,
) -> dict[str, str]:
    """Check that the files hold just the tensors of ``modules``; return their names in the files by those in the model.

    transformers itself only warns about missing tensors, and fills them with noise.

    Raises:
        ValueError: one sentence, for the first tensor that is missing, unexpected, or of another shape or dtype.
    """
    expected = expected_tensors(modules)
    # Only renamings: converters merge or split the tensors of plain layers.
    renamings = [conversion for conversion in weight_conversions if isinstance(conversion, WeightRenaming)]
    in_files = {}
    for file_name in sorted(infos):
        name, _ = rename_source_key(file_name, renamings, [], model.base_model_prefix, expected)
        if any(name.startswith(f"{path}.") for path in modules):
            in_files[name] = file_name
    check_tensors(expected, {name: infos[file_name] for name, file_name in in_files.items()}, where)
    return in_files


def mark_compressed(model: PreTrainedModel, specs: dict[str, ExpertsSpec], record: dict[str, Any]) -> None:
    """Tell transformers that ``model``, whose experts were replaced in memory, is compressed, so that it can be saved.

    Args:
        model: its experts at the paths of ``specs`` are :class:`~d2moe_ext.experts.D2MoEExperts`.
        specs: by path.
        record: how it was compressed; goes into config.json and must be plain JSON.

    Raises:
        ValueError: ``specs`` are not those of the model's compressed experts.
    """
    modules = compressed_modules(model)
    if {name: module.spec for name, module in modules.items()} != specs:
        raise ValueError(
            f"mark_compressed: specs must describe the model's compressed experts {sorted(modules)}, got {sorted(specs)}"
        )
    config = D2MoEConfig(**CompressedLayers(specs, record).to_dict())
    quantizer = D2MoEQuantizer(config, pre_quantized=True)
    # As preprocess_model and from_pretrained do it. In __dict__: nn.Module's own typing knows tensors and modules only.
    model.__dict__.update(hf_quantizer=quantizer, is_quantized=True, quantization_method=config.quant_method)
    quantizer.postprocess_model(model)
    if getattr(model, "_weight_conversions", None) is None:
        # Built in memory, not by from_pretrained. Saved as it is, transformers would order the tensors otherwise than
        # after a load, and shards would differ; so remember what it would look up itself.
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        model.__dict__["_weight_conversions"] = [c for c in conversions if not isinstance(c, PrefixChange)]


def unmark_compressed(model: PreTrainedModel, weight_conversions: list[Any] | None) -> None:
    """Undo :func:`mark_compressed`; ``weight_conversions`` are those the model remembered before, if any."""
    model.__dict__["_weight_conversions"] = weight_conversions
    assert isinstance(model.hf_quantizer, D2MoEQuantizer)
    model.hf_quantizer.remove_quantization_config(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.__dict__.pop("_is_quantized", None)
