"""From a model's diagnostics to a number of bases, a ratio and a preset, with the reasons; a heuristic.

Every threshold below stands with the measurement that chose it. Nothing here touches a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from d2moe_ext.analysis import LOWEST_COLUMNS, LayerAnalysis
from d2moe_ext.budget import ModelShapes, plan_compression
from d2moe_ext.config import CompressionConfig, Preset

RATIOS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)

# What the thresholds were chosen on: `examples/pydoc_moe` (6 M parameters) and books-moe (22 M), both with 8 experts, 2 per
# token; calibrated on 64 windows of 256 tokens, measured on 40 others of the same text, performance preset with fold, dynamic
# pruning on. The quality preset rises less at every ratio (docs/quality.md), so the ratio errs on the safe side with it.
CALIBRATED_ON = "two small models with 8 experts of which a token takes 2 (6 M and 22 M parameters)"
# Predicted error and measured rise in log-perplexity, at ratios 0.2 … 0.7: pydoc_moe 0.163 0.040, 0.207 0.067, 0.264 0.116,
# 0.321 0.191, 0.405 0.346, 0.556 0.772; books-moe 0.094 0.026, 0.116 0.037, 0.148 0.054, 0.207 0.105, 0.292 0.202, 0.450 0.436.
# So 0.25 is a rise of 0.10 to 0.15, about where the curves bend upwards.
LARGEST_ERROR = 0.25
# More bases must lower the predicted error by this share: a choice, since each also costs FLOPs (design section 2.7). On
# both models one base was best, predicted and measured. Against one base of equal predicted error, 2 bases rose 9 to 21 %
# less (pydoc_moe 0.297 0.144, 0.514 0.582; books-moe 0.192 0.078, 0.414 0.296), 4 bases 15 and 54 % (0.416 0.319; 0.335
# 0.118): the prediction leans towards fewer.
BASES_MARGIN = 0.10
# Errors below bfloat16's own rounding are none.
NEGLIGIBLE_ERROR = 2.0**-9
# The share of Σ C_j² that the lowest 30 % of the columns may carry for the throughput preset: a third of the squared error
# above, as the part pruned per batch costs at least as much again, and truncation must have its third. On both models the
# share was 0.14 to 0.16, and the preset cost 0.22 to 1.03 in log-perplexity over the other at equal ratios; none was at
# hand where it is harmless.
LARGEST_LOW_COLUMNS = LARGEST_ERROR**2 / 3


@dataclass(frozen=True)
class PredictedError:
    """What truncation would do to the experts' outputs at one ratio.

    Attributes:
        ratio: of the whole model's parameters.
        num_bases: bases per projection.
        error: ``‖ΔY‖ / ‖Y‖``, the root of the mean over layers and projections of its square; None where the ratio cannot
            be reached.
        worst_layer: the layer with the largest error, and that error.
        worst_error: likewise.
    """

    ratio: float
    num_bases: int
    error: float | None
    worst_layer: str | None = None
    worst_error: float | None = None


def predict_error(layers: Sequence[LayerAnalysis], shapes: ModelShapes, ratio: float, num_bases: int = 1) -> PredictedError:
    """The error that the ranks of a plan leave: whitened deltas, uniform ranks, every stored column in use.

    Static pruning of the performance preset is in it; dynamic pruning and what one layer's error does to the next are not.

    Args:
        layers: every MoE layer's diagnostics.
        shapes: the model's.
        ratio: parameters removed as a share of the whole model's.
        num_bases: one that the layers' spectra were taken for.
    """
    config = CompressionConfig(
        ratio=ratio,
        preset="performance",
        decomposition="whitened",
        ranks="uniform",
        joint_gate_up=False,
        num_bases=num_bases,
    )
    try:
        plan = plan_compression(shapes, config, [layer.routing.tokens for layer in layers])
    except ValueError:  # the one that says which ratios can be reached
        return PredictedError(ratio, num_bases, None)
    squares = []
    for layer, planned in zip(layers, plan.layers, strict=True):
        spectra = layer.spectra[num_bases]
        # An interleaved layout's plan has gate and up in one delta, as its spectra have.
        errors = [spectra[name].relative_error(ranks) for name, ranks in planned.ranks.items()]
        squares.append(sum(errors) / len(errors))
    worst = max(range(len(layers)), key=squares.__getitem__)
    error = (sum(squares) / len(squares)) ** 0.5
    return PredictedError(ratio, num_bases, error, layers[worst].name, squares[worst] ** 0.5)


@dataclass(frozen=True)
class Advice:
    """What to compress with; ``ratio`` is None where none can be reached. ``reasons`` are sentences, one for each choice."""

    num_bases: int
    ratio: float | None
    preset: Preset
    reasons: dict[str, str]
    predictions: list[PredictedError]

    def to_dict(self) -> dict[str, Any]:
        """JSON-clean, with the thresholds."""
        thresholds = {
            "largest_error": LARGEST_ERROR,
            "bases_margin": BASES_MARGIN,
            "largest_low_columns": LARGEST_LOW_COLUMNS,
        }
        return asdict(self) | {"thresholds": thresholds, "calibrated_on": CALIBRATED_ON}


def advise(layers: Sequence[LayerAnalysis], shapes: ModelShapes) -> Advice:
    """Recommend bases, ratio and preset.

    - *Bases*: at the ratio that one base would get, more of them where that lowers the predicted error by
      :data:`BASES_MARGIN`; at equal parameters each costs rank.
    - *Ratio*: of :data:`RATIOS` the largest whose predicted error stays below :data:`LARGEST_ERROR`.
    - *Preset*: throughput where the columns that it removes for good carry at most :data:`LARGEST_LOW_COLUMNS`.

    Args:
        layers: every MoE layer's diagnostics.
        shapes: the model's.
    """
    counts = sorted(set.intersection(*(set(layer.spectra) for layer in layers)))
    predictions = {bases: [predict_error(layers, shapes, ratio, bases) for ratio in RATIOS] for bases in counts}
    every = [prediction for bases in counts for prediction in predictions[bases]]
    preset, preset_reason = _choose_preset(layers)
    start = _choose_ratio(predictions[1])
    if start is None:
        reason = f"No ratio from {RATIOS[0]} up can be reached: too few of the parameters stand in routed experts."
        return Advice(1, None, preset, {"ratio": reason, "preset": preset_reason}, every)
    best, bases_reason = choose_bases(start, predictions)
    chosen = _choose_ratio(predictions[best.num_bases])
    assert chosen is not None  # best itself can be reached
    assert chosen.error is not None
    if chosen.error < LARGEST_ERROR:
        ratio_reason = f"The largest ratio of the table whose predicted error, {chosen.error:.3f}, stays below {LARGEST_ERROR}."
    else:
        ratio_reason = (
            f"The smallest that can be reached; its predicted error, {chosen.error:.3f}, is not below {LARGEST_ERROR}, so "
            "expect to pay in quality."
        )
    reasons = {"num_bases": bases_reason, "ratio": ratio_reason, "preset": preset_reason}
    return Advice(chosen.num_bases, chosen.ratio, preset, reasons, every)


def _choose_ratio(predictions: Sequence[PredictedError]) -> PredictedError | None:
    """The largest ratio below the threshold, else the smallest that can be reached."""
    reachable = [(prediction, prediction.error) for prediction in predictions if prediction.error is not None]
    good = [prediction for prediction, error in reachable if error < LARGEST_ERROR]
    if good:
        return good[-1]
    return reachable[0][0] if reachable else None


def choose_bases(start: PredictedError, predictions: dict[int, list[PredictedError]]) -> tuple[PredictedError, str]:
    """The number of bases with the least error at the ratio of ``start``, and why."""
    place = RATIOS.index(start.ratio)
    best = start
    for row in predictions.values():
        error = row[place].error
        if error is not None and best.error is not None and best.error > NEGLIGIBLE_ERROR:
            best = row[place] if error < (1 - BASES_MARGIN) * best.error else best
    known = [row[place] for row in predictions.values() if row[place].error is not None]
    errors = ", ".join(f"{entry.num_bases}: {entry.error:.3f}" for entry in known)
    reason = f"Predicted errors at ratio {start.ratio} by number of bases, each paid for in rank: {errors}."
    return best, reason


def _choose_preset(layers: Sequence[LayerAnalysis]) -> tuple[Preset, str]:
    shares = [sum(layer.low_columns.values()) / len(layer.low_columns) for layer in layers]
    share = sum(shares) / len(shares)
    harmless = share <= LARGEST_LOW_COLUMNS
    reason = (
        f"The {LOWEST_COLUMNS:.0%} of the base's columns with the lowest metric (eq. 9), which throughput removes for good, "
        f"carry {share:.1%} of the sum of its squares, {'at most' if harmless else 'more than'} {LARGEST_LOW_COLUMNS:.1%}."
    )
    return ("throughput" if harmless else "quality"), reason
