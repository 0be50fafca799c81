"""The shared bases of a layer: a weighted mean of its experts, and the columns that stay (design sections 2.2, 2.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from d2moe_ext import ops
from d2moe_ext.adapters import ExpertsView
from d2moe_ext.calibration import LayerStats
from d2moe_ext.config import Merge


def merge_experts(weight: Callable[[int], Tensor], name: str, stats: LayerStats, merge: Merge) -> Tensor:
    """``W_b = Σ F[e]∘W[e] / Σ F[e]`` (eq. 5), elementwise; where the weights sum to 0, the plain mean.

    Args:
        weight: an expert's ``[out, in]`` weight.
        name: ``gate_up`` or ``down``.
        stats: the layer's; its ``fisher_weighted`` and ``fisher_sum`` are of the same merge.
        merge: how experts are weighed.

    Returns:
        ``[K, out, in]`` float32.
    """
    means, weighted, total = [], [], []
    for base in range(len(stats.down_energy)):
        experts = torch.nonzero(stats.expert_to_base == base).flatten().tolist()
        means.append(torch.stack([weight(e).float() for e in experts]).mean(0))
        if merge == "frequency":
            weighted.append(torch.stack([weight(e).float() * stats.tokens[e] for e in experts]).sum(0))
            total.append(stats.tokens[experts].sum().float().expand_as(means[-1]))
    mean = torch.stack(means)
    if merge == "mean":
        return mean
    if merge == "frequency":
        numerator, denominator = torch.stack(weighted), torch.stack(total)
    else:
        numerator, denominator = stats.fisher_weighted[name], stats.fisher_sum[name]
    reached = denominator > 0
    return torch.where(reached, numerator / torch.where(reached, denominator, 1.0), mean)


@dataclass(frozen=True)
class PrunedBase:
    """The bases of one input group after static pruning.

    Attributes:
        full: ``[K, out, in]`` float32, before pruning.
        columns: ``[K, kept]`` int32, sorted: the columns that are stored.
    """

    full: Tensor
    columns: Tensor

    @property
    def stored(self) -> Tensor:
        """``[K, out, kept]``."""
        index = self.columns.long()[:, None, :].expand(-1, self.full.shape[1], -1)
        return self.full.gather(2, index)

    def masked(self, base: int) -> Tensor:
        """``[out, in]``: a base with its pruned columns at 0."""
        mask = torch.zeros(self.full.shape[2], dtype=torch.bool, device=self.full.device)
        mask[self.columns[base].long()] = True
        return self.full[base] * mask


def prune_columns(full: Tensor, energy: Tensor, kept: int) -> PrunedBase:
    """Keep the ``kept`` columns with the largest ``C_j = ‖W_b[:,j]‖₂ · ‖X_j‖₂`` (eq. 9) of each base.

    Args:
        full: ``[K, out, in]`` float32.
        energy: ``[K, in]``, ``‖X_j‖²`` over the calibration tokens of each base.
        kept: columns to keep.
    """
    # One row whose entries are the norms has exactly these column norms.
    norms = energy.sqrt().float()
    columns = [ops.column_select(norms[base : base + 1], full[base].norm(dim=0), kept)[1] for base in range(len(full))]
    return PrunedBase(full, torch.stack(columns))


def shared_bases(view: ExpertsView, stats: LayerStats, merge: Merge, kept: dict[str, int]) -> dict[str, PrunedBase]:
    """The pruned bases of both input groups, ``gate_up`` and ``down``; ``kept`` gives each group's columns."""
    groups = {
        "gate_up": (view.gate_up_weight, stats.gate_up_energy),
        "down": (view.down_weight, stats.down_energy),
    }
    bases = {}
    for name, (weight, energy) in groups.items():
        bases[name] = prune_columns(merge_experts(weight, name, stats, merge), energy, kept[name])
    return bases
