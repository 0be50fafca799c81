"""The paper's pipeline with exchangeable parts: merge, base, deltas, and how the bytes are spread over the deltas.

Everything that is not exchanged is the paper's: deltas are taken from the base before pruning, gate and up apart, s = 0.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.quality.package_methods import PAPER_OPTIONS, stats_for
from benchmarks.quality.variants.bases import BaseCompressor, Merger, semi_dynamic, weighted_mean
from benchmarks.quality.variants.deltas import DeltaCompressor, LowRank
from benchmarks.quality.variants.layer import Base, Layer, StudyExperts
from benchmarks.quality.variants.spending import Item, spend
from benchmarks.study import FLOAT_BYTES, INDEX_BYTES, Calibration, byte_budget, stored
from d2moe_ext.adapters import find_experts
from d2moe_ext.budget import ModelShapes, plan_compression, without_deltas
from d2moe_ext.config import PRESETS, CompressionConfig
from d2moe_ext.shapes import model_shapes
from d2moe_ext.spec import GROUPS

PAPER_SPARSITY: float = PRESETS["performance"]["base_sparsity"]

_FISHER, _SEMI_DYNAMIC, _LOW_RANK = weighted_mean("fisher"), semi_dynamic(PAPER_SPARSITY), LowRank()

Sizes = list[dict[str, list[int]]]
"""Per layer and projection, the size of each of its items."""

Weights = Callable[["Study"], list[list[float]]]
"""``weights(study)``: per layer, what each expert's deltas may claim relative to others'."""


@dataclass(frozen=True)
class Pipeline:
    """A method of the study, made of its parts.

    Args:
        merge: how the experts become a base.
        base: how the base is stored.
        delta: how the deltas are stored.
        fold: deltas are taken from the base as it is stored, not as it was merged.
        weights: None: the same share everywhere, as the package rounds it. Else the bytes are spread in proportion.
        version: raised by hand where the code changes what is computed.
    """

    merge: Merger = _FISHER
    base: BaseCompressor = _SEMI_DYNAMIC
    delta: DeltaCompressor = _LOW_RANK
    fold: bool = False
    weights: Weights | None = None
    version: int = 1

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, calibration: Calibration, ratio: float) -> int:
        study = Study(model, calibration, ratio, self)
        sizes = study.sizes()
        for index, layer in enumerate(study.layers):
            layer.view.replace(study.experts(index, sizes[index]))
        _round_rest(model)
        return study.stored_bytes(sizes)


class Study:
    """One model on its way through a pipeline: its layers with their bases, and what is left for the deltas.

    Raises:
        ValueError: the ratio is out of reach even without deltas.
    """

    def __init__(self, model: PreTrainedModel, calibration: Calibration, ratio: float, pipeline: Pipeline) -> None:
        self.model, self.calibration, self.ratio, self.pipeline = model, calibration, ratio, pipeline
        self.config = CompressionConfig(ratio, **PAPER_OPTIONS)
        stats = stats_for(model, calibration, self.config)
        self.shapes: ModelShapes = model_shapes(model)
        self.layers = [
            Layer(view, stats.layers[view.name], calibration.inputs[view.name], shapes.delta_shapes(joint=False))
            for view, shapes in zip(find_experts(model), self.shapes.layers, strict=True)
        ]
        self.bases: list[dict[str, Base]] = [
            {group: pipeline.base(layer, group, pipeline.merge(layer, group)) for group in GROUPS} for layer in self.layers
        ]
        self.budget = byte_budget(model, ratio)
        self.floats_left = (self.budget - self.bytes_without_deltas()) // FLOAT_BYTES
        if self.floats_left < 0:
            raise ValueError(
                f"ratio must leave room for the bases, {self.bytes_without_deltas()} bytes with the rest of the model, "
                f"got {ratio}, which leaves {self.budget}."
            )

    def bytes_without_deltas(self) -> int:
        """The rest of the model, biases, bases, and the indices of the package's own format."""
        floats = self.shapes.other_parameters + sum(shapes.bias_parameters for shapes in self.shapes.layers)
        floats += sum(base.floats for bases in self.bases for base in bases.values())
        indices = sum(base.indices for bases in self.bases for base in bases.values())
        # expert_to_base of both groups; a rank and two starts of every delta
        indices += sum(len(layer.experts) * (2 + 3 * len(layer.shapes)) for layer in self.layers)
        return FLOAT_BYTES * floats + INDEX_BYTES * indices

    def items(self) -> list[dict[str, list[Item]]]:
        delta = self.pipeline.delta
        return [{name: delta.items(layer, name) for name in layer.shapes} for layer in self.layers]

    def stored_bytes(self, sizes: Sizes) -> int:
        """Of the whole model at these sizes."""
        floats = sum(
            item.cost(size)
            for items, chosen in zip(self.items(), sizes, strict=True)
            for name in items
            for item, size in zip(items[name], chosen[name], strict=True)
        )
        return self.bytes_without_deltas() + FLOAT_BYTES * floats

    def sizes(self) -> Sizes:
        """What each delta gets."""
        if self.pipeline.weights is not None:
            return self.weighted_sizes(self.pipeline.weights(self))
        if isinstance(self.pipeline.delta, LowRank):
            return self.uniform_ranks()
        return self.weighted_sizes(None)

    def uniform_ranks(self) -> Sizes:
        """The package's plan for the floats that are left."""
        bare = [without_deltas(shapes, self.config, FLOAT_BYTES) for shapes in self.shapes.layers]
        least = self.shapes.other_parameters + sum(layer.parameters("stored") for layer in bare)
        # The half keeps the rounding of 1 - ratio from losing a whole parameter.
        ratio = 1 - (least + self.floats_left + 0.5) / self.shapes.total_parameters
        config = CompressionConfig(**(self.config.to_dict() | {"ratio": ratio}))
        plan = plan_compression(self.shapes, config, [layer.stats.tokens.tolist() for layer in self.layers])
        return [layer.ranks for layer in plan.layers]

    def weighted_sizes(self, weights: list[list[float]] | None) -> Sizes:
        """Sizes in proportion to the experts' weights, in single steps; None: all alike."""
        places, items = [], []
        for index, by_name in enumerate(self.items()):
            for name, own in by_name.items():
                for expert, item in enumerate(own):
                    places.append((index, name))
                    items.append(item if weights is None else _weighed(item, weights[index][expert]))
        sizes: Sizes = [{name: [] for name in layer.shapes} for layer in self.layers]
        for (index, name), size in zip(places, spend(items, self.floats_left), strict=True):
            sizes[index][name].append(size)
        return sizes

    def experts(self, index: int, sizes: Mapping[str, list[int]]) -> StudyExperts:
        """A layer's experts at these sizes; the layer itself stays as it is."""
        layer, bases = self.layers[index], self.bases[index]
        dense: dict[str, Tensor] = {}
        for group, base in bases.items():
            from_base = base.masked if self.pipeline.fold else base.full
            deltas = torch.stack([layer.weight(group, expert) - from_base for expert in layer.experts])
            for name in layer.shapes:
                if (name == "down") == (group == "down"):
                    rows = layer.rows(name)
                    compressed = self.pipeline.delta.compress(layer, name, deltas[:, rows].double(), sizes[name])
                    deltas[:, rows] = compressed
            dense[group] = deltas
        return StudyExperts(layer.view, bases, dense)


def _round_rest(model: nn.Module) -> None:
    """Round every parameter as a bfloat16 file would, but those of :class:`StudyExperts`, made of rounded factors already."""
    made = {id(p) for module in model.modules() if isinstance(module, StudyExperts) for p in module.parameters(recurse=False)}
    for parameter in model.parameters():
        if id(parameter) not in made:
            parameter.copy_(stored(parameter))


def _weighed(item: Item, weight: float) -> Item:
    return Item(item.elements, item.most, item.linear, item.quadratic, weight)
