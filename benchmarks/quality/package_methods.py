"""The package's own compression as a method of the study; everything that compares with it starts here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.study import FLOAT_BYTES, INDEX_BYTES, Calibration, Method, byte_budget, stored
from d2moe_ext.budget import SPARSITIES_TRIED, without_deltas
from d2moe_ext.calibration import CalibrationStats, LeftGram, calibrate
from d2moe_ext.compress import compress_experts
from d2moe_ext.config import CompressionConfig
from d2moe_ext.experts import D2MoEExperts
from d2moe_ext.hf import patch_model
from d2moe_ext.shapes import model_shapes

# The paper's pipeline: every other method's rise is also shown as a share of its.
PAPER_OPTIONS: dict[str, Any] = {"preset": "performance"}


def package_method(*, version: int = 1, left_gram: LeftGram = "diagonal", **options: Any) -> Method:
    """The package's own compression as a method.

    The experts are compressed in float32, then everything is rounded as a bfloat16 file would; dynamic pruning is as the
    options say and the native operators run the forward.

    Args:
        version: raised by hand where what the options mean has changed, so that results are measured anew.
        left_gram: what two-sided deltas are whitened with: the command line takes the diagonal.
        options: of :class:`d2moe_ext.config.CompressionConfig`, but for the ratio.
    """

    def method(model: PreTrainedModel, calibration: Calibration, ratio: float) -> int:
        config = _within_budget(model, CompressionConfig(ratio, **options))
        stats = stats_for(model, calibration, config, left_gram)
        compress_experts(model, stats, config, batches=calibration.batches, element_size=FLOAT_BYTES)
        round_stored(model)
        patch_model(model)
        return stored_bytes(model)

    method.version = version  # type: ignore[attr-defined]  # read by method_version
    return method


def paper_method(**changes: Any) -> Method:
    """The paper's pipeline with some of its options changed."""
    return package_method(**(PAPER_OPTIONS | changes))


def _within_budget(model: PreTrainedModel, config: CompressionConfig) -> CompressionConfig:
    """``config`` with its ratio raised by what the study counts and the package does not: the second half of an index.

    The package counts parameters, and an index as one of them; the study counts bytes, two per float and four per index.
    """
    # Where compression chooses the columns, the longest lists of them are allowed for.
    sparsity = SPARSITIES_TRIED[1] if config.base_sparsity is None else config.base_sparsity
    shapes = model_shapes(model)
    layers = [without_deltas(layer, replace(config, base_sparsity=sparsity), FLOAT_BYTES) for layer in shapes.layers]
    costs = [cost for layer in layers for cost in layer.factor_costs.values()]
    indices = sum(layer.index_elements for layer in layers)
    allowed = byte_budget(model, config.ratio) // FLOAT_BYTES
    if config.gauge_fixed:
        # A pivot comes with a rank; ranks up to half of the largest (of int8: up to the largest) cost so much or more, each.
        # Where they did not, the laboratory would refuse the row.
        highest = [cost.longest if config.factor_dtype == "int8" else cost.longest // 2 for cost in costs]
        cheapest = min(cost.of(rank) / rank for cost, rank in zip(costs, highest, strict=True))
        indices += int((allowed - shapes.other_parameters) / cheapest)
    allowed -= indices * (INDEX_BYTES - FLOAT_BYTES) // FLOAT_BYTES
    # The half keeps the rounding of 1 - ratio from losing a whole parameter.
    ratio = 1 - (allowed + 0.5) / shapes.total_parameters
    return CompressionConfig(**(config.to_dict() | {"ratio": ratio}))


class _OtherStats:
    """Statistics of the shared sequences for options that the shared ones do not serve, kept for the next ratio."""

    def __init__(self) -> None:
        self.kept: tuple[Calibration, tuple[object, ...], CalibrationStats] | None = None

    def take(
        self, model: PreTrainedModel, calibration: Calibration, config: CompressionConfig, left_gram: LeftGram | None
    ) -> CalibrationStats:
        options = (config.merge, config.num_bases, left_gram)
        if self.kept is None or self.kept[0] is not calibration or self.kept[1] != options:
            self.kept = None  # these are the largest tensors of a study: never two sets of them
            stats = calibrate(model, calibration.batches, merge=config.merge, num_bases=config.num_bases, left_gram=left_gram)
            self.kept = (calibration, options, stats)
        return self.kept[2]


_OTHER_STATS = _OtherStats()


def diagonal(stats: CalibrationStats) -> CalibrationStats:
    """Statistics with their left Grams reduced to the diagonal, as the command line takes them."""
    layers = {
        name: replace(layer, left_gram={g: b.diagonal(dim1=1, dim2=2).contiguous() for g, b in layer.left_gram.items()})
        for name, layer in stats.layers.items()
    }
    return replace(stats, layers=layers, left_gram="diagonal")


def stats_for(
    model: PreTrainedModel, calibration: Calibration, config: CompressionConfig, left_gram: LeftGram = "diagonal"
) -> CalibrationStats:
    """The shared statistics, or others of the same sequences."""
    stats = calibration.stats
    two_sided = config.decomposition == "two_sided"
    if config.num_bases == stats.num_bases and (config.merge == stats.merge or not config.merge.startswith("fisher")):
        return diagonal(stats) if two_sided and left_gram == "diagonal" else stats
    return _OTHER_STATS.take(model, calibration, config, left_gram if two_sided else None)


@torch.no_grad()
def round_stored(model: nn.Module) -> None:
    """Round every floating parameter as a bfloat16 file would, in place; the model stays float32."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.copy_(stored(parameter))
    for module in model.modules():
        if isinstance(module, D2MoEExperts):
            module.refresh_column_norms()


def stored_bytes(model: nn.Module) -> int:
    """Bytes of a model's file without headers, from its own tensors: 2 per float, tied ones once, 1 per int8, 4 per index."""
    weights = sum(p.numel() * (1 if p.dtype == torch.int8 else FLOAT_BYTES) for p in model.parameters())
    indices = sum(
        tensor.numel()
        for module in model.modules()
        if isinstance(module, D2MoEExperts)
        for tensor in module.state_dict().values()
        if tensor.dtype == torch.int32
    )
    return weights + INDEX_BYTES * indices
