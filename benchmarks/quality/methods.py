"""Every method by its name: the paper's own pipeline, this package's options, further variants, and the rivals."""

from __future__ import annotations

from benchmarks.baselines import BASELINES
from benchmarks.quality.beyond import BEYOND
from benchmarks.quality.package_methods import PAPER_OPTIONS, package_method, paper_method, round_stored, stored_bytes
from benchmarks.quality.variants import PAPER_VARIANTS
from benchmarks.study import Method

__all__ = [
    "BASELINES",
    "BEYOND",
    "PAPER_OPTIONS",
    "PAPER_VARIANTS",
    "all_methods",
    "package_method",
    "paper_method",
    "round_stored",
    "stored_bytes",
]


def _own_methods() -> dict[str, Method]:
    return {
        "paper": paper_method(),
        "default": package_method(version=2),
        "paper, frequency": paper_method(merge="frequency"),
        "paper, mean": paper_method(merge="mean"),
        "paper, n·Fisher": paper_method(merge="fisher_frequency"),
        "paper, activation-aware": paper_method(decomposition="activation_aware"),
        "paper, plain": paper_method(decomposition="plain"),
        "fold": paper_method(fold=True),
        "fold, joint": paper_method(fold=True, joint_gate_up=True),
        "fold, joint, two-sided": paper_method(fold=True, joint_gate_up=True, decomposition="two_sided"),
        "fold, joint, two-sided, global": paper_method(
            fold=True, joint_gate_up=True, decomposition="two_sided", ranks="global"
        ),
        "fold, joint, two-sided, global, alternated": package_method(base_sparsity=0.05, gauge_fixed=False),
        "fold, joint, two-sided, global, alternated, gauge-fixed": package_method(base_sparsity=0.05),
    }


# They build on package_methods: this module imports them, not the other way round.
_REGISTRIES: tuple[dict[str, Method], ...] = (_own_methods(), PAPER_VARIANTS, BEYOND, BASELINES)


def all_methods() -> dict[str, Method]:
    """Every method by name.

    Raises:
        ValueError: two registries use the same name.
    """
    methods: dict[str, Method] = {}
    for registry in _REGISTRIES:
        for name, method in registry.items():
            if name in methods:
                raise ValueError(f"quality: a method's name must be used once, got {name!r} twice.")
            methods[name] = method
    return methods
