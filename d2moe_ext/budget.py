"""From a ratio to kept columns and ranks, counted as design section 4 of the documentation says.

Nothing here touches a weight: shapes go in, a plan comes out. ``d2moe plan`` prints it and ``compress`` follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from d2moe_ext.config import CompressionConfig
from d2moe_ext.factor_cost import FactorCost, Purse, equal_share

INDEX_BYTES = 4
# A safetensors header spends about this much on a tensor: its name, dtype, shape and two offsets.
HEADER_BYTES_PER_TENSOR = 118
# The rounded total may stay below the target by this share and never exceeds it.
LANDING_SHARE = 0.005
# The shares of the bases' columns to prune that compression compares where the choice is left to it.
SPARSITIES_TRIED = (0.0, 0.2, 0.4, 0.6, 0.9)
# Before there are statistics to compare with, a plan gives the bases at most this share of the experts' budget.
BASE_SHARE = 0.4


@dataclass(frozen=True)
class LayerShapes:
    """One MoE layer's routed experts. Sizes in elements; ``experts_per_token`` is the router's top k."""

    name: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    experts_per_token: int
    gated: bool = True
    interleaved: bool = False
    has_bias: bool = False

    @property
    def gate_up_rows(self) -> int:
        return self.intermediate_size * (2 if self.gated else 1)

    @property
    def weight_parameters(self) -> int:
        per_expert = (self.gate_up_rows + self.intermediate_size) * self.hidden_size
        return self.num_experts * per_expert

    @property
    def bias_parameters(self) -> int:
        return self.num_experts * (self.gate_up_rows + self.hidden_size) if self.has_bias else 0

    def delta_shapes(self, joint: bool) -> dict[str, tuple[int, int]]:
        """``[out, in]`` of each delta a compressed expert holds."""
        hidden, inter = self.hidden_size, self.intermediate_size
        down = {"down": (hidden, inter)}
        if not self.gated:
            return {"up": (inter, hidden)} | down
        if joint or self.interleaved:
            return {"gate_up": (2 * inter, hidden)} | down
        return {"gate": (inter, hidden), "up": (inter, hidden)} | down


@dataclass(frozen=True)
class ModelShapes:
    """What counting needs to know of a model.

    Args:
        layers: its MoE layers.
        total_parameters: all parameters, tied ones once.
        lookup_parameters: parameters a token only looks up (an untied input embedding): no FLOPs.
        other_tensors: stored tensors outside the routed experts.
        element_size: bytes of a parameter on disk.
    """

    layers: tuple[LayerShapes, ...]
    total_parameters: int
    lookup_parameters: int
    other_tensors: int
    element_size: int

    @property
    def other_parameters(self) -> int:
        return self.total_parameters - sum(s.weight_parameters + s.bias_parameters for s in self.layers)


@dataclass(frozen=True)
class LayerPlan:
    """One compressed layer: columns stored (``kept``) and multiplied per forward (``keep``), ranks ``[E]``, and how factors are
    stored (:class:`~d2moe_ext.factor_cost.FactorCost`).
    """

    shapes: LayerShapes
    num_bases: int
    gate_up_kept: int
    gate_up_keep: int
    down_kept: int
    down_keep: int
    ranks: dict[str, list[int]]
    joint: bool
    gauge_fixed: bool = False
    int8_per_parameter: int = 0

    @property
    def factor_costs(self) -> dict[str, FactorCost]:
        """By projection, in the order of ``ranks``."""
        shapes = self.shapes.delta_shapes(self.joint)
        return {name: FactorCost(*shape, self.gauge_fixed, self.int8_per_parameter) for name, shape in shapes.items()}

    @property
    def base_elements(self) -> int:
        """Elements of the stored bases."""
        return self._base(self.gate_up_kept, self.down_kept)

    def _base(self, gate_up_columns: int, down_columns: int) -> int:
        s = self.shapes
        return self.num_bases * (s.gate_up_rows * gate_up_columns + s.hidden_size * down_columns)

    def base_parameters(self, count: str) -> int:
        if count == "paper":
            return self._base(self.gate_up_keep, self.down_keep)
        return self.base_elements

    @property
    def index_elements(self) -> int:
        """Columns (absent where all are kept), expert_to_base, and of each delta rank and starts, and its pivots if any."""
        s = self.shapes
        columns = self.gate_up_kept if self.gate_up_kept < s.hidden_size else 0
        columns += self.down_kept if self.down_kept < s.intermediate_size else 0
        per_delta = 3 * s.num_experts * len(s.delta_shapes(self.joint))
        pivots = sum(cost.indices(self.ranks[name]) for name, cost in self.factor_costs.items())
        return self.num_bases * columns + 2 * s.num_experts + per_delta + pivots

    @property
    def delta_elements(self) -> int:
        """Elements of the factors as they are stored."""
        return sum(cost.elements(self.ranks[name]) for name, cost in self.factor_costs.items())

    @property
    def delta_parameters(self) -> int:
        """The factors as they are counted: elements, or where these are int8 the parameters of as many bytes, and scales."""
        return sum(cost.parameters(self.ranks[name]) for name, cost in self.factor_costs.items())

    def parameters(self, count: str) -> int:
        return self.base_parameters(count) + self.index_elements + self.shapes.bias_parameters + self.delta_parameters

    @property
    def stored_tensors(self) -> int:
        s = self.shapes
        columns = (self.gate_up_kept < s.hidden_size) + (self.down_kept < s.intermediate_size)
        per_delta = 5 + self.gauge_fixed + (2 if self.int8_per_parameter else 0)
        return 4 + columns + 2 * s.has_bias + per_delta * len(s.delta_shapes(self.joint))

    @property
    def active_parameters(self) -> float:
        """Parameters one token multiplies, over an average token: each base of its experts once, k deltas."""
        return self._active(self.delta_elements)

    @property
    def read_parameters(self) -> float:
        """The same, counted by their bytes."""
        return self._active(self.delta_parameters)

    def _active(self, deltas: int) -> float:
        s = self.shapes
        k = s.experts_per_token
        distinct_bases = self.num_bases * (1 - (1 - 1 / self.num_bases) ** k)
        base = self._base(self.gate_up_keep, self.down_keep) / self.num_bases * distinct_bases
        return base + k * (deltas + s.bias_parameters) / s.num_experts

    def to_dict(self) -> dict[str, Any]:
        names = ("gate_up_kept", "gate_up_keep", "down_kept", "down_keep", "ranks")
        return {"name": self.shapes.name} | {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class CompressionPlan:
    """A model's compressed shape, and what it costs before and after.

    ``delta_share`` is the share of the deltas' elements that the ratio leaves for their factors, before rounding:
    the "preserved" figure of the paper's Table 12, from 0 to 1.
    """

    model: ModelShapes
    config: CompressionConfig
    layers: tuple[LayerPlan, ...]
    delta_share: float

    def _parameters(self, count: str) -> int:
        return self.model.other_parameters + sum(layer.parameters(count) for layer in self.layers)

    @cached_property
    def compressed_parameters(self) -> int:
        """By the configuration's way of counting."""
        return self._parameters(self.config.count)

    @cached_property
    def stored_parameters(self) -> int:
        return self._parameters("stored")

    @property
    def bytes_before(self) -> int:
        tensors = self.model.other_tensors + sum(2 + 2 * layer.shapes.has_bias for layer in self.layers)
        return self.model.total_parameters * self.model.element_size + tensors * HEADER_BYTES_PER_TENSOR

    @property
    def bytes_after(self) -> int:
        indices = sum(layer.index_elements for layer in self.layers)
        tensors = self.model.other_tensors + sum(layer.stored_tensors for layer in self.layers)
        floats = self.stored_parameters - indices
        return floats * self.model.element_size + indices * INDEX_BYTES + tensors * HEADER_BYTES_PER_TENSOR

    @property
    def active_parameters_before(self) -> int:
        """Parameters one token multiplies in the uncompressed model."""
        per_layer = (
            s.experts_per_token * (s.weight_parameters + s.bias_parameters) // s.num_experts for s in self.model.layers
        )
        return self.model.other_parameters - self.model.lookup_parameters + sum(per_layer)

    @property
    def active_parameters_after(self) -> int:
        other = self.model.other_parameters - self.model.lookup_parameters
        return round(other + sum(layer.active_parameters for layer in self.layers))

    @property
    def bytes_per_token_after(self) -> int:
        """Bytes of the parameters one token multiplies."""
        other = self.model.other_parameters - self.model.lookup_parameters
        return self.model.element_size * round(other + sum(layer.read_parameters for layer in self.layers))

    def to_dict(self) -> dict[str, Any]:
        """What ``d2moe plan --json`` prints. FLOPs are two per active parameter; attention scores are not in them."""
        element = self.model.element_size
        return {
            "total_parameters": self.model.total_parameters,
            "compressed_parameters": self.compressed_parameters,
            "stored_parameters": self.stored_parameters,
            "ratio": 1 - self.compressed_parameters / self.model.total_parameters,
            "delta_share": self.delta_share,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "active_parameters_before": self.active_parameters_before,
            "active_parameters_after": self.active_parameters_after,
            "flops_per_token_before": 2 * self.active_parameters_before,
            "flops_per_token_after": 2 * self.active_parameters_after,
            "bytes_per_token_before": element * self.active_parameters_before,
            "bytes_per_token_after": self.bytes_per_token_after,
            "layers": [layer.to_dict() for layer in self.layers],
        }


def kept_columns(columns: int, sparsity: float, dynamic: bool = True) -> tuple[int, int]:
    """Columns left by static pruning, and by dynamic pruning after it (paper, Algorithm 3); without it, both the same."""
    if not dynamic:
        kept = columns - int(columns * sparsity)
        return kept, kept
    pruned = int(columns * sparsity * 0.5)
    return columns - pruned, columns - 2 * pruned


def rank_step(rank: float) -> int:
    """The kernels' step at a rank: 16, or 8 below 64."""
    return 16 if rank >= 64 else 8


def without_deltas(shapes: LayerShapes, config: CompressionConfig, element_size: int) -> LayerPlan:
    """A layer's plan with every rank 0: the smallest it can be. ``element_size``: bytes of a parameter on disk."""
    if config.num_bases > shapes.num_experts:
        raise ValueError(
            f"num_bases must be at most the number of experts of {shapes.name} ({shapes.num_experts}), got {config.num_bases}."
        )
    assert config.base_sparsity is not None  # plan_compression settles it
    gate_up_kept, gate_up_keep = kept_columns(shapes.hidden_size, config.base_sparsity, config.dynamic_pruning)
    down_kept, down_keep = kept_columns(shapes.intermediate_size, config.base_sparsity, config.dynamic_pruning)
    return LayerPlan(
        shapes=shapes,
        num_bases=config.num_bases,
        gate_up_kept=gate_up_kept,
        gate_up_keep=gate_up_keep,
        down_kept=down_kept,
        down_keep=down_keep,
        ranks={name: [0] * shapes.num_experts for name in shapes.delta_shapes(config.joint_gate_up)},
        joint=config.joint_gate_up,
        gauge_fixed=config.gauge_fixed,
        int8_per_parameter=element_size if config.factor_dtype == "int8" else 0,
    )


def planned_sparsity(model: ModelShapes, config: CompressionConfig) -> float:
    """The share of the base's columns to prune: the configuration's, or where it leaves the choice, the least of those
    compared with which the bases take at most BASE_SHARE of what the ratio leaves to the experts."""
    if config.base_sparsity is not None:
        return config.base_sparsity
    left = (1 - config.ratio) * model.total_parameters - model.other_parameters
    for sparsity in SPARSITIES_TRIED:
        bare = _bare(model, replace(config, base_sparsity=sparsity))
        if sum(layer.base_parameters(config.count) for layer in bare) <= BASE_SHARE * left:
            return sparsity
    return SPARSITIES_TRIED[-1]


def _bare(model: ModelShapes, config: CompressionConfig) -> list[LayerPlan]:
    return [without_deltas(shapes, config, model.element_size) for shapes in model.layers]


def _spare(model: ModelShapes, config: CompressionConfig, bare: Sequence[LayerPlan]) -> int:
    """Parameters the ratio leaves for the deltas' factors; negative where it cannot be reached."""
    least = model.other_parameters + sum(layer.parameters(config.count) for layer in bare)
    return int((1 - config.ratio) * model.total_parameters) - least


def fits(model: ModelShapes, config: CompressionConfig) -> bool:
    """Whether the ratio can be reached with the configuration's base sparsity."""
    return _spare(model, config, _bare(model, config)) >= 0


def delta_budget(model: ModelShapes, config: CompressionConfig, bare: Sequence[LayerPlan]) -> int:
    """Parameters the ratio leaves for the deltas' factors.

    Raises:
        ValueError: the ratio cannot be reached even with every rank 0, with the range that can.
    """
    budget = _spare(model, config, bare)
    if budget < 0:
        least = int((1 - config.ratio) * model.total_parameters) - budget
        reachable = 1 - least / model.total_parameters
        raise ValueError(
            f"ratio must lie between 0 and {max(reachable, 0):.4f} for this model at base sparsity {config.base_sparsity:g} "
            f"and num_bases {config.num_bases}, counted as {config.count!r}, got {config.ratio}."
        )
    return budget


def plan_compression(
    model: ModelShapes, config: CompressionConfig, tokens_per_expert: Sequence[Sequence[int]] | None = None
) -> CompressionPlan:
    """Columns and uniform ranks for a ratio.

    Args:
        model: the model's shapes.
        config: what is wanted; its ``ranks`` is not looked at (:mod:`d2moe_ext.global_ranks` starts from this plan).
        tokens_per_expert: ``[layers][E]``; where given, the most routed experts get the steps that rounding leaves.

    Raises:
        ValueError: the ratio cannot be reached, or a layer has fewer experts than bases.
    """
    config = replace(config, base_sparsity=planned_sparsity(model, config))
    bare = _bare(model, config)
    budget = delta_budget(model, config, bare)
    elements = sum(layer.shapes.weight_parameters for layer in bare)
    share = budget / elements
    # Every expert can then be given its floor, however much the last rows of V are filled up.
    padding = sum(cost.padding for layer in bare for cost in layer.factor_costs.values())
    costs = [cost for layer in bare for cost in layer.factor_costs.values() for _ in range(layer.shapes.num_experts)]
    floors = equal_share(costs, max(budget - padding, 0))
    finer = 1
    while True:
        layers = _round_ranks(bare, floors, budget, tokens_per_expert, finer)
        plan = CompressionPlan(model, config, tuple(layers), share)
        target = (1 - config.ratio) * model.total_parameters
        # Only models far smaller than any real one need a finer step than the kernels' own.
        if plan.compressed_parameters >= (1 - LANDING_SHARE) * target or finer == 8:
            return plan
        finer *= 2


def _round_ranks(
    bare: Sequence[LayerPlan],
    share: float,
    budget: int,
    tokens_per_expert: Sequence[Sequence[int]] | None,
    finer: int,
) -> list[LayerPlan]:
    """Floor every rank to its step, then hand single steps to experts while the budget lasts."""
    ranks = [{name: list(r) for name, r in layer.ranks.items()} for layer in bare]
    purse, offers = Purse(budget), []
    for index, layer in enumerate(bare):
        order = expert_order(layer.shapes.num_experts, tokens_per_expert[index] if tokens_per_expert else None)
        for name, cost in layer.factor_costs.items():
            exact = cost.rank_at(share)
            step = max(1, rank_step(exact) // finer)
            floor = int(exact // step) * step
            offers += [(0, index, name, expert, 0, floor) for expert in order]
            offers += [(place, index, name, e, floor, floor + step) for place, e in enumerate(order, 1)]
    # By place first, so that every layer's most routed expert is served before any layer's second.
    for _, index, name, expert, low, high in sorted(offers):
        cost, owned = bare[index].factor_costs[name], ranks[index][name]
        if owned[expert] == low and high <= cost.longest and purse.buy((index, name), cost, low, high):
            owned[expert] = high
    return [replace(layer, ranks=r) for layer, r in zip(bare, ranks, strict=True)]


def expert_order(num_experts: int, tokens: Sequence[int] | None) -> list[int]:
    """Experts from the most to the least routed; by index where nothing is known."""
    return sorted(range(num_experts), key=lambda e: (-tokens[e] if tokens else 0, e))
