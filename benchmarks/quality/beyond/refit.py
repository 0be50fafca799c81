"""U refitted in closed form after V and the base are rounded.

``U = (W − Ŵ_b) G V̂ᵀ (V̂ G V̂ᵀ)⁻¹`` (:func:`benchmarks.quality.beyond.stored_layer.refitted`), then rounded. Cost: an
``in x in x r`` product and an ``r x r`` solve per delta; nothing more is stored.
"""

from __future__ import annotations

from torch import Tensor

from benchmarks.quality.beyond.stored_layer import StoredLayer, refitted
from benchmarks.study import stored


class RefittedLayer(StoredLayer):
    """bfloat16, and U the best for the rounded V."""

    def stored_factors(self, name: str, expert: int, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        v = stored(v).double()
        u = refitted(self._delta(name, expert).double(), v, self.metric(name, expert))
        return stored(u).double(), v
