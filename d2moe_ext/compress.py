"""Compression of a model: columns and ranks for every layer, bases and deltas in turn, then the layers replaced one by one.

(Design section 2; paper, section 3.) Each layer's experts are replaced as soon as they are compressed, so the model is
never held twice; beside it there are the bases, one expert's worth a layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from d2moe_ext.adapters import ExpertsView, find_experts
from d2moe_ext.budget import (
    SPARSITIES_TRIED,
    CompressionPlan,
    ModelShapes,
    fits,
    plan_compression,
)
from d2moe_ext.calibration import CalibrationStats, Progress, sequences_of
from d2moe_ext.config import CompressionConfig
from d2moe_ext.experts import ExpertsSpec
from d2moe_ext.global_ranks import choose_global_ranks
from d2moe_ext.layer_compression import RIDGE, DeltaReport, LayerCompressor
from d2moe_ext.sequential import SequentialCompressor
from d2moe_ext.shapes import model_shapes

# Of base sparsities whose predicted errors differ by less, the smallest is taken: the prediction favours sparse bases, as
# an expert's own delta fits its calibration tokens more closely than the shared base can. On selection text (seed 0, AMD
# EPYC, 2026-11-25) it put 0.4 behind 0.9 by 9.6 % on pydoc_moe at ratio 0.75, while log-perplexity rose 0.70 against 0.80;
# on books-moe, where 0.9 is the best indeed (0.203 against 0.214 for 0.6), it put 0.6 behind by 17 %.
SPARSITY_TOLERANCE = 0.10


@dataclass(frozen=True)
class CompressionReport:
    """What a compression did: the plan it followed and, per layer and projection, what truncation left out.

    ``alternation_errors``: the model's error in the metric of its deltas after each refit of its bases, ranks unchanged;
    with ``sequential`` that of the refits behind the compressed layers.
    """

    plan: CompressionPlan
    deltas: dict[str, dict[str, DeltaReport]]
    specs: dict[str, ExpertsSpec]
    alternation_errors: list[float]

    @property
    def raised_ridges(self) -> list[tuple[str, str, int, float]]:
        """Layer, projection, expert and ridge wherever the ridge had to be raised for Cholesky."""
        return [
            (layer, name, expert, ridge)
            for layer, deltas in self.deltas.items()
            for name, delta in deltas.items()
            for expert, ridge in enumerate(delta.ridge)
            if ridge > RIDGE * 1.5
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-clean."""
        errors = {
            layer: {name: {"relative_error": d.relative_error, "ridge": d.ridge} for name, d in deltas.items()}
            for layer, deltas in self.deltas.items()
        }
        return {
            "config": self.plan.config.to_dict(),
            "plan": self.plan.to_dict(),
            "deltas": errors,
            "alternation_errors": self.alternation_errors,
        }


def _check(views: list[ExpertsView], stats: CalibrationStats, config: CompressionConfig) -> None:
    missing = [view.name for view in views if view.name not in stats.layers]
    if missing:
        raise ValueError(f"compress: stats must hold every MoE layer of the model, got none of {missing[0]}.")
    if stats.num_bases != config.num_bases:
        raise ValueError(
            f"compress: stats must be taken for num_bases={config.num_bases}, got statistics for {stats.num_bases}."
        )
    if config.merge.startswith("fisher") and stats.merge != config.merge:
        raise ValueError(f"compress: stats must be taken for merge={config.merge!r}, got those for {stats.merge!r}.")
    if config.decomposition == "two_sided" and stats.left_gram is None:
        raise ValueError("compress: decomposition='two_sided' needs stats taken with left_gram, got left_gram=None.")
    for view in views:
        for name, weight in (("gate_up", view.gate_up_weight), ("down", view.down_weight)):
            for expert in range(view.layout.num_experts):
                if not bool(weight(expert).isfinite().all()):
                    raise ValueError(
                        f"compress: weights must be finite, got NaN or infinity in {name} of expert {expert} of {view.name}."
                    )


def _calibration_stacks(batches: Iterable[Any] | None, stats: CalibrationStats) -> list[Tensor]:
    """The batches that ``stats`` were taken from, free of padding."""
    if batches is None:
        raise ValueError("compress: sequential=True needs the batches that stats were taken from, got batches=None.")
    stacks = sequences_of(batches, "compress")
    tokens = sum(stack.numel() for stack in stacks)
    if tokens != stats.num_tokens:
        raise ValueError(f"compress: batches must be those of stats, with {stats.num_tokens} tokens, got {tokens}.")
    return stacks


class _ModelCompressor:
    """All layers of a model at one base sparsity, and the ranks they compete for."""

    def __init__(self, views: list[ExpertsView], stats: CalibrationStats, plan: CompressionPlan, report: Progress) -> None:
        self.plan, self.report = plan, report
        self.layers = [
            LayerCompressor(view, stats.layers[view.name], plan.config, layer)
            for view, layer in zip(views, plan.layers, strict=True)
        ]

    def choose_ranks(self, stage: str) -> float:
        """Choose the ranks for the bases as they stand; returns the error that truncation will leave, predicted."""
        savings = []
        for done, layer in enumerate(self.layers, 1):
            savings.append({name: layer.savings(name) for name in layer.plan.ranks})
            self.report(stage, done, len(self.layers))
        if self.plan.config.ranks == "global":
            self.plan = choose_global_ranks(self.plan, savings)
        error = 0.0
        for layer, ranked, values in zip(self.layers, self.plan.layers, savings, strict=True):
            layer.plan = ranked
            error += sum(float(v[r:].sum()) for name in values for v, r in zip(values[name], ranked.ranks[name], strict=True))
        return error

    def alternate(self, stage: str) -> float:
        """Refit every base to its truncated deltas; returns the error left, in the deltas' metric."""
        total = 0.0
        for done, layer in enumerate(self.layers, 1):
            total += layer.alternate()
            self.report(stage, done, len(self.layers))
        return total

    def round_bases(self) -> None:
        for layer in self.layers:
            layer.round_bases()


def _choose_base_sparsity(
    views: list[ExpertsView],
    stats: CalibrationStats,
    config: CompressionConfig,
    shapes: ModelShapes,
    tokens: list[list[int]],
    report: Progress,
) -> float:
    """The base sparsity with the least predicted error: what the bases do not take, the deltas get."""
    errors = {}
    for sparsity in SPARSITIES_TRIED:
        tried = replace(config, base_sparsity=sparsity)
        if not fits(shapes, tried):
            continue
        compressor = _ModelCompressor(views, stats, plan_compression(shapes, tried, tokens), report)
        if config.alternations:
            compressor.choose_ranks(f"Base sparsity {sparsity:g}: singular values")
            compressor.alternate(f"Base sparsity {sparsity:g}: alternation")
        errors[sparsity] = compressor.choose_ranks(f"Base sparsity {sparsity:g}: predicted error")
    least = min(errors.values())
    return min(sparsity for sparsity, error in errors.items() if error <= least * (1 + SPARSITY_TOLERANCE))


@torch.no_grad()
def compress_experts(
    model: nn.Module,
    stats: CalibrationStats,
    config: CompressionConfig,
    progress: Progress | None = None,
    batches: Iterable[Any] | None = None,
    element_size: int | None = None,
) -> CompressionReport:
    """Replace every MoE layer's experts by compressed ones, in place.

    What can be wrong is refused before anything is replaced. Use :func:`d2moe_ext.compress` for a transformers model:
    it also makes the model savable.

    ``element_size``: bytes of a parameter in the file, which a factor of int8 is counted by, where the model will be stored in
    another dtype than it has.

    Raises:
        ValueError: statistics of another model or for other options, weights that are not finite, a ratio that
            cannot be reached, or with ``config.sequential`` batches that are missing or not those of ``stats``.
        RuntimeError: a Gram matrix that stays indefinite under the largest ridge, or with ``config.sequential``
            activations behind the compressed layers that are not finite.
    """
    views = find_experts(model)
    _check(views, stats, config)
    stacks = _calibration_stacks(batches, stats) if config.sequential else []
    tokens = [stats.layers[view.name].tokens.tolist() for view in views]
    shapes = model_shapes(model)
    if element_size is not None:
        shapes = replace(shapes, element_size=element_size)
    plan_compression(shapes, config, tokens)  # refuses a ratio out of reach
    report = progress or (lambda stage, done, total: None)
    if config.base_sparsity is None:
        chosen = _choose_base_sparsity(views, stats, config, shapes, tokens, report)
        config = replace(config, base_sparsity=chosen)
    compressor = _ModelCompressor(views, stats, plan_compression(shapes, config, tokens), report)
    errors = []
    # With sequential this is for the ranks alone: bases and deltas are then fitted anew, layer by layer.
    if config.alternations and not (config.sequential and config.ranks == "uniform"):
        compressor.choose_ranks("Singular values")
        errors = [compressor.alternate(f"Alternation {step + 1}") for step in range(config.alternations)]
    compressor.round_bases()
    if config.ranks == "global":
        compressor.choose_ranks("Final ranks")
    sequential = None
    if config.sequential:
        for layer in compressor.layers:
            layer.bases.clear()
        sequential = SequentialCompressor(model, stacks, views, report)
        errors = [0.0] * config.alternations
    deltas, specs = {}, {}
    for done, layer in enumerate(compressor.layers, 1):
        if sequential is None:
            experts, deltas[layer.view.name] = layer.run()
        else:
            experts, deltas[layer.view.name], left = sequential.compress(layer)
            errors = [total + error for total, error in zip(errors, left, strict=True)]
        specs[layer.view.name] = experts.spec
        layer.view.replace(experts)
        layer.bases.clear()
        report("Compressing layers", done, len(views))
    return CompressionReport(compressor.plan, deltas, specs, errors)
