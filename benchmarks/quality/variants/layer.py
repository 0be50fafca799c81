"""One layer of the laboratory, and the module that takes its experts' place."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.study import LayerInputs, stored
from d2moe_ext.adapters import ExpertsView
from d2moe_ext.calibration import LayerStats
from d2moe_ext.experts import D2MoEExperts
from d2moe_ext.layer_compression import delta_rows, shrunk_down_gram, shrunk_gate_up_gram
from d2moe_ext.spec import GROUPS, DeltaSpec, ExpertsSpec, GroupSpec, delta_names


@dataclass(frozen=True)
class Layer:
    """One layer's experts, uncompressed, and what calibration knows of them. ``shapes``: ``[out, in]`` of each delta."""

    view: ExpertsView
    stats: LayerStats
    inputs: LayerInputs
    shapes: dict[str, tuple[int, int]]

    @property
    def experts(self) -> range:
        return range(self.view.layout.num_experts)

    @cached_property
    def pooled_gram(self) -> Tensor:
        """``G_pool/n_pool``, ``[H, H]`` float64."""
        return self.stats.gram_gate_up.sum(0) / max(int(self.stats.tokens.sum()), 1)

    def weight(self, group: str, expert: int) -> Tensor:
        """``[out, in]`` float32 of the group ``gate_up`` or ``down``."""
        return (self.view.down_weight if group == "down" else self.view.gate_up_weight)(expert).detach().float()

    def rows(self, name: str) -> slice:
        """The rows of its group that a projection's delta covers."""
        if not self.view.layout.gated:
            return slice(None)
        return delta_rows(name, self.view.layout.gate_up_rows)

    def gram(self, name: str, expert: int) -> Tensor:
        """What a delta is whitened with: the shrunk Gram of its inputs per token, ``[in, in]`` float64."""
        if name == "down":
            return shrunk_down_gram(self.stats, expert)
        return shrunk_gate_up_gram(self.stats, self.pooled_gram, expert)

    def energy(self, group: str) -> Tensor:
        """``[1, in]`` float64: ``‖X_j‖²`` of what the base sees (eq. 9)."""
        return self.stats.down_energy if group == "down" else self.stats.gate_up_energy

    @torch.no_grad()
    def base_gram(self, group: str) -> Tensor:
        """The Gram of what the base sees, ``[in, in]`` float64: for down the experts' outputs already weighed and summed."""
        if group == "gate_up":
            return self.pooled_gram
        x = self.inputs.hidden_states
        summed = x.new_zeros(len(x), self.view.layout.intermediate_size)
        for expert in self.experts:
            weight = ((self.inputs.top_k_index == expert) * self.inputs.top_k_weights).sum(1)
            token = weight.nonzero().flatten()
            bias = self.view.gate_up_bias(expert)
            gate_up = torch.nn.functional.linear(x[token], self.weight("gate_up", expert), bias)
            summed.index_add_(0, token, self.view.apply_gate(gate_up) * weight[token, None])
        return summed.double().T @ summed.double()


@dataclass(frozen=True)
class Base:
    """A layer's compressed base of one group.

    Attributes:
        full: ``[out, in]`` float32, as merged: what the experts' deltas are taken from.
        kept: ``[out, kept]`` float32, what is multiplied, rounded as stored.
        columns: ``[kept]`` int32, ascending; None where all are kept.
        keep: columns multiplied per forward, chosen by eq. 9; ``kept`` where none is pruned dynamically.
        floats: stored.
    """

    full: Tensor
    kept: Tensor
    columns: Tensor | None
    keep: int
    floats: int

    @property
    def masked(self) -> Tensor:
        """``[out, in]`` float32: what is multiplied where no column is pruned dynamically."""
        if self.columns is None:
            return self.kept
        return torch.zeros_like(self.full).index_copy_(1, self.columns.long(), self.kept)

    @property
    def indices(self) -> int:
        """Stored: one for each kept column where there are others."""
        return 0 if self.columns is None else len(self.columns)


class StudyExperts(D2MoEExperts):
    """A layer whose experts are a base and dense deltas, run by the native operators in float32.

    It computes what a layer does that stores the deltas in some smaller form: each is held as itself times an identity,
    which changes no bit of it. Its own size means nothing.

    Args:
        view: the experts that it will replace.
        bases: by group.
        deltas: by group, ``[E, out, in]`` float32.
    """

    def __init__(self, view: ExpertsView, bases: dict[str, Base], deltas: dict[str, Tensor]) -> None:
        layout = view.layout
        names = dict(zip(GROUPS, delta_names(layout, joint_gate_up=True), strict=True))
        specs, state = {}, {}
        for group, name in names.items():
            base, rank = bases[group], min(deltas[group].shape[1:])
            state[f"{group}_base"] = base.kept[None]
            state[f"{group}_expert_to_base"] = torch.zeros(layout.num_experts, dtype=torch.int32)
            if base.columns is not None:
                state[f"{group}_columns"] = base.columns[None]
            specs[name] = DeltaSpec(*self._factor(f"{name}_delta", deltas[group], rank, state))
            bias = view.gate_up_bias if group == "gate_up" else view.down_bias
            if layout.has_bias:
                state[f"{group}_bias"] = stored(
                    torch.stack([row for e in range(layout.num_experts) if (row := bias(e)) is not None])
                )
        groups = {group: GroupSpec(1, bases[group].kept.shape[1], bases[group].keep) for group in GROUPS}
        super().__init__(ExpertsSpec(layout, **groups, deltas=specs), view, dtype=torch.float32)
        state = self.state_dict() | state
        self.load_state_dict(state)
        self.backend = "native"

    @staticmethod
    def _factor(name: str, delta: Tensor, rank: int, state: dict[str, Tensor]) -> tuple[int, int]:
        """Put a delta's factors into ``state``, the identity on its shorter side, shared; returns their rows."""
        experts, out, inputs = delta.shape
        own, shared = torch.arange(experts, dtype=torch.int32) * rank, torch.zeros(experts, dtype=torch.int32)
        if out <= inputs:
            u, v, u_start, v_start = torch.eye(out), delta.reshape(-1, inputs), shared, own
        else:
            u, v, u_start, v_start = delta.transpose(1, 2).reshape(-1, out), torch.eye(inputs), own, shared
        factors = {"u": u, "v": v, "rank": torch.full_like(own, rank), "u_start": u_start, "v_start": v_start}
        state.update({f"{name}_{part}": tensor for part, tensor in factors.items()})
        return len(u), len(v)
