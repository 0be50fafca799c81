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
    """

    out: int
    inputs: int
    gauge_fixed: bool

    @property
    def longest(self) -> int:
        """The largest rank that a delta can have."""
        return min(self.out, self.inputs)

    def v_elements(self, rank: int) -> int:
        """Elements that one expert's V stores."""
        return rank * (self.inputs - rank) if self.gauge_fixed else rank * self.inputs

    def of(self, rank: int) -> int:
        """One expert's U, V and pivots."""
        return rank * (self.out + self.gauge_fixed) + self.v_elements(rank)

    def v_rows(self, ranks: Sequence[int]) -> int:
        """Rows of V's tensor for all experts: gauge-fixed, as many as their elements fill, the last one in part."""
        return self.rows_of(sum(map(self.v_elements, ranks)))

    def rows_of(self, elements: int) -> int:
        """Rows that so many elements of V fill, the last one in part."""
        return -(-elements // self.inputs)

    def floats(self, ranks: Sequence[int]) -> int:
        """U and V of all experts, as stored."""
        return sum(ranks) * self.out + self.v_rows(ranks) * self.inputs

    def indices(self, ranks: Sequence[int]) -> int:
        """Pivots of all experts."""
        return sum(ranks) if self.gauge_fixed else 0

    def rank_at(self, share: float) -> float:
        """The rank, not rounded, whose cost is a share of the delta's elements; share is at most 1."""
        allowed = share * self.out * self.inputs
        per_rank = self.out + self.inputs + self.gauge_fixed
        if not self.gauge_fixed:
            return allowed / per_rank
        return (per_rank - math.sqrt(max(per_rank**2 - 4 * allowed, 0.0))) / 2


class Purse:
    """A budget from which ranks are bought, with every element counted as it will be stored.

    Args:
        budget: parameters for all factors and pivots.
    """

    def __init__(self, budget: int) -> None:
        self.left = budget
        self._elements: dict[Hashable, int] = {}

    def buy(self, projection: Hashable, cost: FactorCost, low: int, high: int) -> bool:
        """Raise one expert's rank, if the budget allows it.

        Args:
            projection: whose V the elements go to.
            cost: of its factors.
            low: the expert's rank now.
            high: its rank afterwards, if it is bought.
        """
        before = self._elements.get(projection, 0)
        after = before + cost.v_elements(high) - cost.v_elements(low)
        rows = cost.rows_of(after) - cost.rows_of(before)
        price = rows * cost.inputs + (high - low) * (cost.out + cost.gauge_fixed)
        if price > self.left:
            return False
        self.left -= price
        self._elements[projection] = after
        return True
