"""What a user chooses about a compression."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Preset = Literal["performance", "throughput"]
Count = Literal["stored", "paper"]
Merge = Literal["fisher", "fisher_frequency", "frequency", "mean"]
Decomposition = Literal["whitened", "two_sided", "activation_aware", "plain"]
Ranks = Literal["uniform", "global"]

# Paper, Table 12: the share of the base's columns that each preset prunes, half statically, half per batch.
PRESET_BASE_SPARSITY: dict[str, float] = {"performance": 0.1, "throughput": 0.6}


def check_choice(option: str, value: str, choices: Any) -> None:
    """Raise ValueError unless ``value`` is one of a Literal's strings."""
    if value not in get_args(choices):
        raise ValueError(f"{option} must be one of {', '.join(get_args(choices))}, got {value!r}.")


@dataclass(frozen=True)
class CompressionConfig:
    """How a model is compressed.

    Args:
        ratio: parameters removed as a share of the **whole** model's, in (0, 1).
        preset: ``performance`` prunes 10 % of the base's columns, ``throughput`` 60 % (paper, Table 12).
        base_sparsity: share of the base's columns to prune, in [0, 1); ``None`` takes the preset's.
        count: ``stored`` counts what the file holds; ``paper`` counts the dynamically pruned columns as gone too.
        merge: the weights of the experts' mean: Fisher (eq. 5), n·Fisher, n (tokens routed), or equal.
        decomposition: what the truncated SVD of a delta is whitened with: the Gram matrix of its inputs (eqs. 6-8),
            that and the Gram matrix of the loss gradients at its outputs, the inputs' norms alone, or nothing.
        ranks: ``uniform`` gives every delta the same preserved share; ``global`` gives rank where an error
            estimate, comparable across experts and layers, falls most per parameter.
        fold: take deltas against the pruned base, so that they repair what pruning removed.
        joint_gate_up: one low-rank delta for gate and up together, which then share V. Layouts that interleave
            gate and up rows always do.
        num_bases: bases per projection; experts with similar weights share one.

    Raises:
        ValueError: one sentence naming the option, the rule and the value.
    """

    ratio: float
    preset: Preset = "performance"
    base_sparsity: float | None = None
    count: Count = "stored"
    merge: Merge = "fisher"
    decomposition: Decomposition = "whitened"
    ranks: Ranks = "uniform"
    fold: bool = True
    joint_gate_up: bool = False
    num_bases: int = 1

    def __post_init__(self) -> None:
        if not 0.0 < self.ratio < 1.0:
            raise ValueError(f"ratio must lie between 0 and 1, got {self.ratio}.")
        if self.base_sparsity is not None and not 0.0 <= self.base_sparsity < 1.0:
            raise ValueError(f"base_sparsity must be at least 0 and below 1, got {self.base_sparsity}.")
        if self.num_bases < 1:
            raise ValueError(f"num_bases must be at least 1, got {self.num_bases}.")
        check_choice("preset", self.preset, Preset)
        check_choice("count", self.count, Count)
        check_choice("merge", self.merge, Merge)
        check_choice("decomposition", self.decomposition, Decomposition)
        check_choice("ranks", self.ranks, Ranks)
        if self.ranks == "global" and self.decomposition != "two_sided":
            raise ValueError(
                "ranks='global' needs decomposition='two_sided', whose singular values are comparable across layers, "
                f"got decomposition={self.decomposition!r}."
            )

    @property
    def sparsity(self) -> float:
        """The share of the base's columns that is pruned, static and dynamic together."""
        return PRESET_BASE_SPARSITY[self.preset] if self.base_sparsity is None else self.base_sparsity

    def to_dict(self) -> dict[str, Any]:
        """A record for config.json; ``base_sparsity`` is spelled out."""
        return {**asdict(self), "base_sparsity": self.sparsity}
