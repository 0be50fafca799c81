"""What a user chooses about a compression."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Preset = Literal["quality", "performance", "throughput"]
Count = Literal["stored", "paper"]
Merge = Literal["fisher", "fisher_frequency", "frequency", "mean"]
Decomposition = Literal["whitened", "two_sided", "activation_aware", "plain"]
Ranks = Literal["uniform", "global"]
FactorDtype = Literal["model", "int8"]

# The paper's pipeline; its Table 12 gives the share of the base's columns that each of its presets prunes.
_PAPER: dict[str, Any] = {
    "merge": "fisher",
    "decomposition": "whitened",
    "ranks": "uniform",
    "fold": False,
    "joint_gate_up": False,
    "gauge_fixed": False,
    "factor_dtype": "model",
    "alternations": 0,
    "dynamic_pruning": True,
    "sequential": False,
}
PRESETS: dict[str, dict[str, Any]] = {
    # What lost least at equal bytes (docs/quality.md).
    "quality": {
        "base_sparsity": None,
        "merge": "frequency",
        "decomposition": "two_sided",
        "ranks": "global",
        "fold": True,
        "joint_gate_up": True,
        "gauge_fixed": True,
        "factor_dtype": "model",
        "alternations": 10,
        "dynamic_pruning": False,
        "sequential": False,
    },
    "performance": {"base_sparsity": 0.1, **_PAPER},
    "throughput": {"base_sparsity": 0.6, **_PAPER},
}


def check_choice(option: str, value: str, choices: Any) -> None:
    """Raise ValueError unless ``value`` is one of a Literal's strings."""
    if value not in get_args(choices):
        raise ValueError(f"{option} must be one of {', '.join(get_args(choices))}, got {value!r}.")


@dataclass(frozen=True)
class CompressionConfig:
    """How a model is compressed.

    A preset is a set of options, and any of them can be given in its place. An option left at ``None`` is the preset's
    from then on; only ``base_sparsity`` may stay ``None``.

    Args:
        ratio: parameters removed as a share of the **whole** model's, in (0, 1).
        preset: ``quality``: what lost least at equal bytes; ``performance`` and ``throughput``: the paper's pipeline with
            10 % or 60 % of the base's columns pruned (Table 12).
        base_sparsity: share of the base's columns to prune, in [0, 1); ``None``: compression compares several and takes
            the one whose predicted error is least, as columns and ranks compete for the same budget.
        count: ``stored`` counts what the file holds; ``paper`` counts the dynamically pruned columns as gone too.
        merge: the weights of the experts' mean: Fisher (eq. 5), n·Fisher, n (tokens routed), or equal.
        decomposition: what the truncated SVD of a delta is whitened with: the Gram matrix of its inputs (eqs. 6-8),
            that and the Gram matrix of the loss gradients at its outputs, the inputs' norms alone, or nothing.
        ranks: ``uniform`` gives every delta the same preserved share; ``global`` gives rank where an error
            estimate, comparable across experts and layers, falls most per parameter.
        fold: take deltas against the pruned base, so that they repair what pruning removed.
        joint_gate_up: one low-rank delta for gate and up together, which then share V. Layouts that interleave
            gate and up rows always do.
        gauge_fixed: give every V an identity in as many columns as its rank, which is not stored: exact, and what it
            frees goes to ranks (:mod:`d2moe_ext.gauge`).
        factor_dtype: ``model`` stores the deltas' factors in the model's dtype; ``int8`` in eight bits with a scale a row,
            and what that frees goes to ranks (:mod:`d2moe_ext.quantise`).
        alternations: how often the base is refitted to its experts' truncated deltas (:mod:`d2moe_ext.alternation`).
        dynamic_pruning: prune half of the columns per batch, as the paper does, and half for good; else all for good.
        sequential: fit each layer to what the original made of its own inputs, given the inputs that reach it behind the
            compressed layers before it (:mod:`d2moe_ext.sequential`). Needs the calibration batches once more.
        num_bases: bases per projection; experts with similar weights share one.

    Raises:
        ValueError: one sentence naming the option, the rule and the value.
    """

    ratio: float
    preset: Preset = "quality"
    base_sparsity: float | None = None
    count: Count = "stored"
    merge: Merge = None  # type: ignore[assignment]
    decomposition: Decomposition = None  # type: ignore[assignment]
    ranks: Ranks = None  # type: ignore[assignment]
    fold: bool = None  # type: ignore[assignment]
    joint_gate_up: bool = None  # type: ignore[assignment]
    gauge_fixed: bool = None  # type: ignore[assignment]
    factor_dtype: FactorDtype = None  # type: ignore[assignment]
    alternations: int = None  # type: ignore[assignment]
    dynamic_pruning: bool = None  # type: ignore[assignment]
    sequential: bool = None  # type: ignore[assignment]
    num_bases: int = 1

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, Preset)
        options = dict(PRESETS[self.preset])
        if self.decomposition not in (None, "two_sided"):
            options["ranks"] = "uniform"  # the only ones that fit
        for option, value in options.items():
            if getattr(self, option) is None:
                object.__setattr__(self, option, value)
        if not 0.0 < self.ratio < 1.0:
            raise ValueError(f"ratio must lie between 0 and 1, got {self.ratio}.")
        if self.base_sparsity is not None and not 0.0 <= self.base_sparsity < 1.0:
            raise ValueError(f"base_sparsity must be at least 0 and below 1, got {self.base_sparsity}.")
        if self.num_bases < 1:
            raise ValueError(f"num_bases must be at least 1, got {self.num_bases}.")
        check_choice("count", self.count, Count)
        check_choice("merge", self.merge, Merge)
        check_choice("decomposition", self.decomposition, Decomposition)
        check_choice("ranks", self.ranks, Ranks)
        check_choice("factor_dtype", self.factor_dtype, FactorDtype)
        if self.ranks == "global" and self.decomposition != "two_sided":
            raise ValueError(
                "ranks='global' needs decomposition='two_sided', whose singular values are comparable across layers, "
                f"got decomposition={self.decomposition!r}."
            )
        if self.alternations < 0:
            raise ValueError(f"alternations must be at least 0, got {self.alternations}.")
        if self.alternations and not self.fold:
            raise ValueError(f"alternations needs fold=True, which takes deltas against the base it refits, got {self.fold}.")
        if self.sequential and self.dynamic_pruning:
            raise ValueError(
                "sequential needs dynamic_pruning=False, as a layer that prunes by the batch passes on something else in "
                f"each, got {self.dynamic_pruning}."
            )
        if self.sequential and self.decomposition not in ("two_sided", "whitened"):
            raise ValueError(
                "sequential needs decomposition='two_sided' or 'whitened', which weigh what is left out with the Gram "
                f"matrices that it takes anew, got {self.decomposition!r}."
            )

    def to_dict(self) -> dict[str, Any]:
        """A record for config.json."""
        return asdict(self)
