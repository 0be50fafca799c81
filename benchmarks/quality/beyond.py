"""The package's own options around its default, one method each, with diagonal left Grams as the default takes them."""

from __future__ import annotations

from typing import Any

from benchmarks.quality.package_methods import package_method
from benchmarks.study import Method

# The bases keep one column of each projection.
NO_BASE = 0.9999


def _around(**options: Any) -> Method:
    """The default with one choice changed; its version is the default's."""
    return package_method(version=2, **options)


BEYOND: dict[str, Method] = {
    "whole factors": _around(gauge_fixed=False),
    "full left Gram": _around(left_gram="full"),
    "zero base": _around(base_sparsity=NO_BASE),
    "whole base": _around(base_sparsity=0.0),
    "separate gate and up": _around(joint_gate_up=False),
    "alternations 0": _around(alternations=0),
    "alternations 1": _around(alternations=1),
    "alternations 3": _around(alternations=3),
    "alternations 16": _around(alternations=16),
    "plain mean base": _around(merge="mean"),
    "uniform ranks": _around(ranks="uniform"),
    "2 bases": _around(num_bases=2),
    "sequential": _around(sequential=True),
    "8-bit factors": _around(factor_dtype="int8"),
}
