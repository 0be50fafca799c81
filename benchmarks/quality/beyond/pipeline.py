"""The package's default once more, with what a base and a factor cost, and how they are stored, left open.

The steps are those of :func:`d2moe_ext.compress.compress_experts`: base sparsity by predicted error, ranks chosen globally,
alternations, stored bases, final ranks. The budget is counted in bytes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.quality.beyond.storage import BFLOAT16, Storage, choose_ranks, factor_bytes, fixed_bytes
from benchmarks.quality.beyond.stored_layer import StoredLayer
from benchmarks.quality.package_methods import diagonal
from benchmarks.study import FLOAT_BYTES, Calibration, Method, byte_budget
from d2moe_ext.adapters import find_experts
from d2moe_ext.budget import SPARSITIES_TRIED, without_deltas
from d2moe_ext.calibration import CalibrationStats
from d2moe_ext.compress import SPARSITY_TOLERANCE
from d2moe_ext.config import CompressionConfig
from d2moe_ext.hf import patch_model
from d2moe_ext.shapes import model_shapes


class Compressor:
    """All layers of a model at one base sparsity, and the bytes they compete for.

    Raises:
        ValueError: the bases alone take more than the ratio leaves.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stats: CalibrationStats,
        config: CompressionConfig,
        storage: Storage = BFLOAT16,
        layer_class: type[StoredLayer] = StoredLayer,
    ) -> None:
        self.config, self.storage = config, storage
        shapes = model_shapes(model)
        plans = [without_deltas(layer, config, FLOAT_BYTES) for layer in shapes.layers]
        self.fixed = FLOAT_BYTES * shapes.other_parameters + sum(fixed_bytes(plan, storage) for plan in plans)
        self.left = byte_budget(model, config.ratio) - self.fixed
        if self.left < 0:
            raise ValueError(f"ratio must leave the bases their {self.fixed} bytes, got {config.ratio}.")
        self.layers = [
            layer_class(view, stats.layers[view.name], config, plan)
            for view, plan in zip(find_experts(model), plans, strict=True)
        ]

    @property
    def bytes(self) -> int:
        """Of the whole model, at the ranks as they stand."""
        return self.fixed + sum(factor_bytes(layer.plan, self.storage) for layer in self.layers)

    def choose_ranks(self) -> float:
        """Choose the ranks for the bases as they stand; returns the predicted error."""
        savings = [{name: layer.savings(name) for name in layer.plan.ranks} for layer in self.layers]
        plans = choose_ranks([layer.plan for layer in self.layers], savings, self.left, self.storage)
        error = 0.0
        for layer, plan, values in zip(self.layers, plans, savings, strict=True):
            layer.plan = plan
            error += sum(float(v[r:].sum()) for name in values for v, r in zip(values[name], plan.ranks[name], strict=True))
        return error

    def alternate(self) -> float:
        """Refit every base to its truncated deltas; returns the error left."""
        return sum(layer.alternate() for layer in self.layers)

    def settle(self) -> None:
        """Ranks, alternations, stored bases and final ranks."""
        self.choose_ranks()
        for _ in range(self.config.alternations):
            self.alternate()
        for layer in self.layers:
            layer.round_bases()
        self.choose_ranks()


def choose_sparsity(
    model: PreTrainedModel,
    stats: CalibrationStats,
    config: CompressionConfig,
    storage: Storage = BFLOAT16,
    layer_class: type[StoredLayer] = StoredLayer,
) -> CompressionConfig:
    """The configuration with the base sparsity whose predicted error is least, unless it names one."""
    if config.base_sparsity is not None:
        return config
    errors = {}
    for sparsity in SPARSITIES_TRIED:
        try:
            compressor = Compressor(model, stats, replace(config, base_sparsity=sparsity), storage, layer_class)
        except ValueError:  # these bases alone are too large
            continue
        if config.alternations:
            compressor.choose_ranks()
            compressor.alternate()
        errors[sparsity] = compressor.choose_ranks()
    least = min(errors.values())
    chosen = min(sparsity for sparsity, error in errors.items() if error <= least * (1 + SPARSITY_TOLERANCE))
    return replace(config, base_sparsity=chosen)


@torch.no_grad()
def compress_stored(
    model: PreTrainedModel,
    stats: CalibrationStats,
    ratio: float,
    storage: Storage = BFLOAT16,
    layer_class: type[StoredLayer] = StoredLayer,
    **options: Any,
) -> int:
    """Compress ``model`` in place; returns its stored bytes.

    Args:
        stats: with the left Gram that is wanted.
        storage: what bases and factors cost.
        layer_class: how they are stored.
        options: of :class:`CompressionConfig`.
    """
    config = choose_sparsity(model, stats, CompressionConfig(ratio, gauge_fixed=False, **options), storage, layer_class)
    compressor = Compressor(model, stats, config, storage, layer_class)
    compressor.settle()
    for layer in compressor.layers:
        layer.view.replace(layer.run()[0])
    patch_model(model)
    return compressor.bytes


def stored_method(storage: Storage = BFLOAT16, layer_class: type[StoredLayer] = StoredLayer, **options: Any) -> Method:
    """:func:`compress_stored` with diagonal left Grams, as a method."""

    def method(model: PreTrainedModel, calibration: Calibration, ratio: float) -> int:
        return compress_stored(model, diagonal(calibration.stats), ratio, storage, layer_class, **options)

    return method
