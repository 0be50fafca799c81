"""Rules for which deltas get more of the bytes: trimming (the paper's Figure 4) and sensitive layers (Figure 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from benchmarks.quality.variants.pipeline import Study, Weights
from d2moe_ext.adapters import restore
from d2moe_ext.evaluate import perplexity

# Of the calibration text, what is read to measure each layer.
SENSITIVITY_TOKENS = 8192
# A layer whose compression does not raise the loss counts as this share of the mean rise.
LEAST_RISE = 0.05


def trim(count: int) -> Weights:
    """The ``count`` experts of each layer with the fewest calibration tokens lose their delta.

    The bytes they free go to the other experts' ranks. (The paper lets the ratio rise instead.)
    """

    def weights(study: Study) -> list[list[float]]:
        chosen = []
        for layer in study.layers:
            if count >= len(layer.experts):
                raise ValueError(f"trim must be less than the {len(layer.experts)} experts of {layer.view.name}, got {count}.")
            order = sorted(layer.experts, key=lambda expert: (int(layer.stats.tokens[expert]), expert))
            trimmed = set(order[:count])
            chosen.append([0.0 if expert in trimmed else 1.0 for expert in layer.experts])
        return chosen

    return weights


def layer_rises(study: Study) -> list[float]:
    """Per layer, the rise in log-perplexity on calibration text when only its experts are compressed, at uniform ranks."""
    text = torch.cat([batch.flatten() for batch in study.calibration.batches])[:SENSITIVITY_TOKENS]
    window = study.calibration.batches[0].shape[1]

    def loss() -> float:
        return math.log(perplexity(study.model, text, window=window).perplexity)

    plain, sizes, rises = loss(), study.uniform_ranks(), []
    for index, layer in enumerate(study.layers):
        view, original = layer.view, layer.view.module
        compressed = study.experts(index, sizes[index])
        view.replace(compressed)
        try:
            rises.append(loss() - plain)
        finally:
            restore(study.model, view.name, original)
            view.module = original
    return rises


def shares_of(rises: Sequence[float]) -> list[float]:
    """The square root of each layer's rise over their mean, small and negative rises counted as ``LEAST_RISE`` of it.

    Where a layer's rise is ``a/r`` in its rank r, ranks in proportion to ``√a`` minimise the sum for a fixed sum of ranks.
    """
    mean = sum(max(rise, 0.0) for rise in rises) / len(rises)
    if mean == 0:
        return [1.0] * len(rises)
    return [math.sqrt(max(rise / mean, LEAST_RISE)) for rise in rises]


def by_sensitivity(study: Study) -> list[list[float]]:
    """Every expert of a layer weighs what :func:`shares_of` gives its layer."""
    shares = shares_of(layer_rises(study))
    return [[share] * len(layer.experts) for share, layer in zip(shares, study.layers, strict=True)]
