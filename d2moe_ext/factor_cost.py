"""What the low-rank factors of one projection cost, counted as design section 4 of the documentation says."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FactorCost:
    """Parameters of the factors of deltas of one shape.

    Args:
        out: rows of a delta.
        inputs: its columns.
        gauge_fixed: V's columns at its pivots, an identity, are not stored; the pivots are (:mod:`d2moe_ext.gauge`).
        int8_per_parameter: how many elements of int8 take a parameter's bytes, where the factors are int8 with a scale a row
            (:mod:`d2moe_ext.quantise`); 0 where they are floating.
    """

    out: int
    inputs: int
    gauge_fixed: bool
    int8_per_parameter: int = 0

    @property
    def longest(self) -> int:
        """The largest rank that a delta can have."""
        return min(self.out, self.inputs)

    @property
    def per_parameter(self) -> int:
        """Elements of U and V that are counted as one parameter."""
        return self.int8_per_parameter or 1

    @property
    def beside(self) -> int:
        """Parameters of a rank beside its elements: a pivot, and the scales of its rows of U and V."""
        return self.gauge_fixed + (2 if self.int8_per_parameter else 0)

    @property
    def padding(self) -> int:
        """The most that all experts' factors together cost beyond what each of them does."""
        return (self.inputs if self.gauge_fixed else 0) + (1 if self.int8_per_parameter else 0)

    def v_elements(self, rank: int) -> int:
        """Elements that one expert's V stores."""
        return rank * (self.inputs - rank) if self.gauge_fixed else rank * self.inputs

    def of(self, rank: int) -> float:
        """One expert's U, V, pivots and scales."""
        return (rank * self.out + self.v_elements(rank)) / self.per_parameter + rank * self.beside

    def v_rows(self, ranks: Sequence[int]) -> int:
        """Rows of V's tensor for all experts: gauge-fixed, as many as their elements fill, the last one in part."""
        return self._rows_of(sum(map(self.v_elements, ranks)))

    def _rows_of(self, elements: int) -> int:
        return -(-elements // self.inputs)

    def elements(self, ranks: Sequence[int]) -> int:
        """U and V of all experts, as stored."""
        return sum(ranks) * self.out + self.v_rows(ranks) * self.inputs

    def parameters(self, ranks: Sequence[int]) -> int:
        """U, V and scales of all experts, as counted; without pivots, which are indices."""
        return self.spent(sum(ranks), sum(map(self.v_elements, ranks))) - self.indices(ranks)

    def spent(self, rank: int, v_elements: int) -> int:
        """What all experts' factors cost whose ranks, and whose V's elements, add up to these."""
        elements = rank * self.out + self._rows_of(v_elements) * self.inputs
        return -(-elements // self.per_parameter) + rank * self.beside

    def indices(self, ranks: Sequence[int]) -> int:
        """Pivots of all experts."""
        return sum(ranks) if self.gauge_fixed else 0

    def rank_at(self, share: float) -> float:
        """The rank, not rounded, whose cost is a share of the delta's elements; the largest where that costs less."""
        allowed = share * self.out * self.inputs * self.per_parameter
        per_rank = self.out + self.inputs + self.beside * self.per_parameter
        rank = allowed / per_rank
        if self.gauge_fixed:
            rank = (per_rank - math.sqrt(max(per_rank**2 - 4 * allowed, 0.0))) / 2
        return min(rank, self.longest)


def equal_share(costs: Sequence[FactorCost], budget: float) -> float:
    """The share of every delta's elements that a budget pays, one entry of ``costs`` a delta.

    What a delta cannot spend, because its full rank of int8 costs less, goes to the others; 1 where none can.
    """
    below = list(costs)
    while below:
        share = budget / sum(cost.out * cost.inputs for cost in below)
        limited = [cost for cost in below if cost.of(cost.longest) >= share * cost.out * cost.inputs]
        if len(limited) == len(below):
            return share
        whole = set(below) - set(limited)
        budget -= sum(cost.of(cost.longest) for cost in below if cost in whole)
        below = limited
    return 1.0


class Purse:
    """A budget from which ranks are bought, with every element counted as it will be stored.

    Args:
        budget: parameters for all factors, pivots and scales.
    """

    def __init__(self, budget: int) -> None:
        self.left = budget
        self._bought: dict[Hashable, tuple[int, int]] = {}

    def buy(self, projection: Hashable, cost: FactorCost, low: int, high: int) -> bool:
        """Raise one expert's rank, if the budget allows it.

        Args:
            projection: whose factors these are.
            cost: of its factors.
            low: the expert's rank now.
            high: its rank afterwards, if it is bought.
        """
        rank, elements = self._bought.get(projection, (0, 0))
        after = (rank + high - low, elements + cost.v_elements(high) - cost.v_elements(low))
        price = cost.spent(*after) - cost.spent(rank, elements)
        if price > self.left:
            return False
        self.left -= price
        self._bought[projection] = after
        return True
