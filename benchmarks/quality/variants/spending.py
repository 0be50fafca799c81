"""What the deltas of all layers may take together, and who gets how much of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Halvings of the interval that holds the common share: enough that no item is off by one.
_HALVINGS = 50


@dataclass(frozen=True)
class Item:
    """Something that can be stored at sizes 0, 1, ..., ``most``.

    Attributes:
        elements: of the dense tensor that it stands for.
        most: the largest size that means anything.
        linear: floats stored per unit of size.
        quadratic: floats stored per squared unit.
        weight: its claim relative to others'; 0 leaves it at size 0.
    """

    elements: int
    most: int
    linear: int
    quadratic: int = 0
    weight: float = 1.0

    def cost(self, size: int) -> int:
        """Floats stored at a size."""
        return self.linear * size + self.quadratic * size * size

    def size_for(self, floats: float) -> int:
        """The largest size whose cost stays within ``floats``."""
        if not self.quadratic:
            return min(self.most, int(floats // self.linear))
        root = (self.linear**2 + 4 * self.quadratic * floats) ** 0.5
        size = min(self.most, int((root - self.linear) / (2 * self.quadratic)) + 1)
        return size if self.cost(size) <= floats else size - 1


def spend(items: Sequence[Item], floats: int) -> list[int]:
    """A size for each item: floats in proportion to weight times elements, what rounding leaves in single steps.

    The steps go to the heaviest items first. Less than ``floats`` is spent only where no item has room or a step is dearer
    than what is left.
    """

    def at(share: float) -> list[int]:
        return [item.size_for(share * item.weight * item.elements) for item in items]

    def cost(sizes: Sequence[int]) -> int:
        return sum(item.cost(size) for item, size in zip(items, sizes, strict=True))

    claims = [item.weight * item.elements for item in items if item.weight > 0]
    if not claims:
        return [0] * len(items)
    low, high = 0.0, 1.01 * max(item.cost(item.most) for item in items) / min(claims)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(at(middle)) <= floats else (low, middle)
    sizes = at(low)
    left = floats - cost(sizes)
    while True:
        before = left
        for index in sorted(range(len(items)), key=lambda i: (-items[i].weight, i)):
            item, size = items[index], sizes[index]
            step = item.cost(size + 1) - item.cost(size)
            if item.weight > 0 and size < item.most and step <= left:
                sizes[index] += 1
                left -= step
        if left == before:
            return sizes
