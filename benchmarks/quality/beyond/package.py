"""The package's own options around its default, one method each, with diagonal left Grams as the default takes them."""

from __future__ import annotations

from benchmarks.quality.package_methods import package_method
from benchmarks.study import Method

# The bases keep one column of each projection.
NO_BASE = 0.9999


PACKAGE: dict[str, Method] = {
    "full left Gram": package_method(left_gram="full"),
    "zero base": package_method(base_sparsity=NO_BASE),
    "whole base": package_method(base_sparsity=0.0),
    "separate gate and up": package_method(joint_gate_up=False),
    "alternations 0": package_method(alternations=0),
    "alternations 1": package_method(alternations=1),
    "alternations 3": package_method(alternations=3),
    "alternations 12": package_method(alternations=12),
    "plain mean base": package_method(merge="mean"),
    "uniform ranks": package_method(ranks="uniform"),
}
