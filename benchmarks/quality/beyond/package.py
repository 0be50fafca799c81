"""The package's own options around its default, one method each, with diagonal left Grams as the default takes them."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from benchmarks.quality.beyond.pipeline import diagonal
from benchmarks.quality.methods import package_method
from benchmarks.study import Calibration, Method

# The bases keep one column of each projection.
NO_BASE = 0.9999


def around_default(**options: Any) -> Method:
    """The default with some of its options changed."""
    changed = package_method(**options)

    def method(model: PreTrainedModel, calibration: Calibration, ratio: float) -> int:
        reduced = Calibration(calibration.batches, diagonal(calibration.stats), calibration.inputs)
        return changed(model, reduced, ratio)

    return method


PACKAGE: dict[str, Method] = {
    "default, diagonal": around_default(),
    "default, full left Gram": package_method(),
    "zero base": around_default(base_sparsity=NO_BASE),
    "whole base": around_default(base_sparsity=0.0),
    "separate gate and up": around_default(joint_gate_up=False),
    "alternations 0": around_default(alternations=0),
    "alternations 1": around_default(alternations=1),
    "alternations 3": around_default(alternations=3),
    "alternations 12": around_default(alternations=12),
    "plain mean base": around_default(merge="mean"),
    "uniform ranks": around_default(ranks="uniform"),
}
