"""The package's sequential calibration with other ways to store factors, or with the original weights as targets.

The steps are those of :func:`d2moe_ext.compress.compress_experts` with ``sequential``; the budget is counted in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.quality.beyond.pipeline import Compressor, choose_sparsity, diagonal
from benchmarks.quality.beyond.storage import BFLOAT16, Storage
from benchmarks.quality.beyond.stored_layer import StoredLayer
from benchmarks.study import Calibration, Method
from d2moe_ext.adapters import find_experts
from d2moe_ext.calibration import CalibrationStats, sequences_of
from d2moe_ext.config import CompressionConfig
from d2moe_ext.hf import patch_model
from d2moe_ext.sequential import TARGET_SHRINKAGE, SequentialCompressor


@torch.no_grad()
def compress_sequentially(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    stats: CalibrationStats,
    ratio: float,
    storage: Storage = BFLOAT16,
    layer_class: type[StoredLayer] = StoredLayer,
    shrinkage: float = TARGET_SHRINKAGE,
    **options: Any,
) -> int:
    """Compress ``model`` in place, layer by layer on its own compressed prefix; returns its stored bytes."""
    config = choose_sparsity(model, stats, CompressionConfig(ratio, gauge_fixed=False, **options), storage, layer_class)
    compressor = Compressor(model, stats, config, storage, layer_class)
    compressor.settle()
    stacks = sequences_of(batches)
    sequential = SequentialCompressor(model, stacks, find_experts(model), lambda stage, done, total: None, shrinkage)
    for layer in compressor.layers:
        layer.view.replace(sequential.compress(layer)[0])
    patch_model(model)
    return compressor.bytes


def sequential_method(storage: Storage = BFLOAT16, layer_class: type[StoredLayer] = StoredLayer, **options: Any) -> Method:
    """:func:`compress_sequentially` with diagonal left Grams, as a method."""

    def method(model: PreTrainedModel, calibration: Calibration, ratio: float) -> int:
        stats = diagonal(calibration.stats)
        return compress_sequentially(model, calibration.batches, stats, ratio, storage, layer_class, **options)

    return method
