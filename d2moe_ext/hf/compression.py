"""Compression of a transformers model in memory, so that it can then be saved."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel

from d2moe_ext.calibration import CalibrationStats, Progress
from d2moe_ext.compress import CompressionReport, compress_experts
from d2moe_ext.config import CompressionConfig
from d2moe_ext.hf.quantizer import mark_compressed


def compress(
    model: PreTrainedModel,
    stats: CalibrationStats,
    config: CompressionConfig,
    progress: Progress | None = None,
    batches: Iterable[Any] | None = None,
) -> CompressionReport:
    """Compress a model's experts in place; afterwards ``model.save_pretrained`` writes what ``from_pretrained`` loads.

    Each layer's experts are replaced as soon as they are compressed, so the model is never held twice; a failure half
    way (which only running out of memory or an interruption can cause) leaves the layers before it compressed.

    Args:
        model: an uncompressed, unpatched model.
        stats: from :func:`d2moe_ext.calibrate` on this model, for the same ``merge`` and ``num_bases``.
        config: what is wanted.
        progress: called with a stage's name, what is done and the total.
        batches: what ``stats`` were taken from, once more; read where ``config.sequential`` asks for it.

    Returns:
        The plan that was followed and what truncation left out, layer by layer.

    Raises:
        ValueError: before anything is replaced: statistics that do not fit, weights that are not finite, a ratio out of
            reach (with the range that is within it), batches that are missing or others, or a model that is compressed,
            patched or quantized already.
        RuntimeError: a Gram matrix that stays indefinite under the largest ridge; with ``sequential`` also activations
            behind the compressed layers that are not finite.
    """
    if getattr(model, "is_quantized", False):
        method = getattr(model, "quantization_method", "another method")
        raise ValueError(f"compress: the model must be neither compressed nor quantized, got one with {method}.")
    if "_d2moe_patch" in model.__dict__:
        raise ValueError("compress: the model must not be patched, got a patched one: use unpatch_model first.")
    report = compress_experts(model, stats, config, progress, batches)
    mark_compressed(model, report.specs, config.to_dict())
    return report
