"""What bases and factors take in the file, and ranks bought greedily by what they save per byte."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from benchmarks.study import FLOAT_BYTES, INDEX_BYTES
from d2moe_ext.budget import LayerPlan, rank_step


@dataclass(frozen=True)
class Storage:
    """How many bytes a base of ``rows x columns`` takes, and the factors of a delta of ``rank``, ``[out, in]``."""

    base: Callable[[int, int], int]
    factors: Callable[[int, int, int], int]


def _floats(rows: int, columns: int) -> int:
    return FLOAT_BYTES * rows * columns


BFLOAT16 = Storage(base=_floats, factors=lambda rank, out, inputs: FLOAT_BYTES * rank * (out + inputs))


def fixed_bytes(layer: LayerPlan, storage: Storage) -> int:
    """Bytes of a compressed layer without its factors: bases, biases and indices."""
    s = layer.shapes
    bases = storage.base(s.gate_up_rows, layer.gate_up_kept) + storage.base(s.hidden_size, layer.down_kept)
    return layer.num_bases * bases + FLOAT_BYTES * s.bias_parameters + INDEX_BYTES * layer.index_elements


def factor_bytes(layer: LayerPlan, storage: Storage) -> int:
    """Bytes of all factors of a compressed layer."""
    shapes = layer.shapes.delta_shapes(layer.joint)
    return sum(storage.factors(rank, *shapes[name]) for name, ranks in layer.ranks.items() for rank in ranks)


@dataclass(frozen=True)
class _Step:
    """Raise one delta's rank from ``low`` to ``high``."""

    owner: tuple[int, str, int]
    low: int
    high: int
    price: int
    saving: float


def _bounds(longest: int) -> list[int]:
    """The ranks on offer: the kernels' steps, the last one cut at ``longest``."""
    bounds = [0]
    while bounds[-1] < longest:
        bounds.append(min(bounds[-1] + rank_step(bounds[-1]), longest))
    return bounds


def _concave(prices: Sequence[int], savings: Sequence[float]) -> list[int]:
    """Which points lie on the upper concave hull: between them the saving per byte falls, as greedy buying needs."""
    hull: list[int] = []
    for point in range(len(prices)):
        while len(hull) > 1:
            first, last = hull[-2], hull[-1]
            before = (savings[last] - savings[first]) * (prices[point] - prices[first])
            if before > (savings[point] - savings[first]) * (prices[last] - prices[first]):
                break
            hull.pop()
        hull.append(point)
    return hull


def _buy(steps: list[_Step], ranks: list[dict[str, list[int]]], left: int) -> int:
    """Buy what fits, dearest saving per byte first; returns the bytes left."""
    # A stable sort keeps a delta's own steps in order where savings tie.
    for step in sorted(steps, key=lambda s: -s.saving / s.price):
        layer, name, expert = step.owner
        if ranks[layer][name][expert] == step.low and step.price <= left:
            ranks[layer][name][expert] = step.high
            left -= step.price
    return left


def choose_ranks(
    layers: Sequence[LayerPlan], savings: Sequence[Mapping[str, Sequence[np.ndarray]]], budget: int, storage: Storage
) -> list[LayerPlan]:
    """The layers with the ranks that save most per byte, over the whole model.

    Args:
        layers: their ranks are replaced.
        savings: per layer and projection, for each expert what each rank saves, descending.
        budget: bytes for all factors.
        storage: what a rank costs; the price of a further rank may fall with the rank.
    """
    ranks = [{name: [0] * len(r) for name, r in layer.ranks.items()} for layer in layers]
    envelope: list[_Step] = []
    single: list[_Step] = []
    for index, layer in enumerate(layers):
        for name, (out, inputs) in layer.shapes.delta_shapes(layer.joint).items():
            bounds = _bounds(min(out, inputs))
            prices = [storage.factors(bound, out, inputs) for bound in bounds]
            for expert, values in enumerate(savings[index][name]):
                total = np.concatenate([[0.0], np.cumsum(values)])[bounds]
                for points, steps in ((_concave(prices, total), envelope), (list(range(len(bounds))), single)):
                    for a, b in pairwise(points):
                        owner = (index, name, expert)
                        steps.append(_Step(owner, bounds[a], bounds[b], prices[b] - prices[a], total[b] - total[a]))
    _buy(single, ranks, _buy(envelope, ranks, budget))
    return [replace(layer, ranks=r) for layer, r in zip(layers, ranks, strict=True)]
