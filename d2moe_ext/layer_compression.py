"""One layer on its way from experts to a shared base and low-rank deltas (design sections 2.2 to 2.5)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from d2moe_ext import ops
from d2moe_ext.adapters import ExpertsView
from d2moe_ext.alternation import ExpertTarget, base_error, refit_base
from d2moe_ext.budget import LayerPlan
from d2moe_ext.calibration import LayerStats
from d2moe_ext.config import CompressionConfig
from d2moe_ext.experts import D2MoEExperts, DeltaSpec, ExpertsSpec, GroupSpec
from d2moe_ext.gauge import fix_gauge, flat_rows, with_identity
from d2moe_ext.merge import PrunedBase, shared_bases
from d2moe_ext.quantise import Int8Rows, quantise_rows, refitted_u
from d2moe_ext.reference.whitened_svd import ridged_gram

# Tokens' worth of the shrinkage target mixed into an expert's Gram (design section 2.5).
SHRINKAGE_TOKENS = 32
# What the float64 copies of one call to whitened_svd may take together.
STACK_BYTES = 2**30
# The ridge that whitened_svd starts from; a larger one in a report means that Cholesky had failed.
RIDGE = 1e-6
LEFT_RIDGE = 0.1


@dataclass(frozen=True)
class DeltaReport:
    """What truncation left out of one projection.

    Attributes:
        relative_error: ``[E]``, ``sqrt(Σ_{i>r} σ² / Σ σ²)`` in the whitened norm.
        ridge: ``[E]``, the ridge used.
    """

    relative_error: list[float]
    ridge: list[float]


def shrunk_gate_up_gram(stats: LayerStats, pooled: Tensor, expert: int) -> Tensor:
    """``(G[e] + τ·G_pool/n_pool) / (n[e] + τ)``, ``[H, H]`` float64 (design section 2.5); pooled is ``G_pool/n_pool``."""
    tokens = int(stats.tokens[expert])
    return (stats.gram_gate_up[expert] + SHRINKAGE_TOKENS * pooled) / (tokens + SHRINKAGE_TOKENS)


def shrunk_down_gram(stats: LayerStats, expert: int) -> Tensor:
    """The same for down, ``[I, I]``: its channels mean different things in different experts, so it shrinks to its
    own mean diagonal."""
    gram, tokens = stats.gram_down[expert], max(stats.gram_tokens(expert), 1)
    shrunk = gram / (tokens + SHRINKAGE_TOKENS)
    shrunk.diagonal().add_(gram.diagonal().mean() / tokens * SHRINKAGE_TOKENS / (tokens + SHRINKAGE_TOKENS))
    return shrunk


def _starts(lengths: Tensor) -> Tensor:
    """Where each of several parts begins if they stand one after the other, ``[E]`` int32."""
    return (lengths.cumsum(0) - lengths).to(torch.int32)


def delta_rows(name: str, gate_up_rows: int) -> slice:
    """The rows of its base that a delta covers: gate's are the first half, up's of a gated layer the second."""
    if name == "gate":
        return slice(0, gate_up_rows // 2)
    return slice(gate_up_rows // 2, gate_up_rows) if name == "up" else slice(None)


class LayerCompressor:
    """One layer on its way: its bases, and any expert's delta with the Gram matrices it is whitened with."""

    def __init__(self, view: ExpertsView, stats: LayerStats, config: CompressionConfig, plan: LayerPlan) -> None:
        self.view, self.stats, self.config, self.plan = view, stats, config, plan
        kept = {"gate_up": plan.gate_up_kept, "down": plan.down_kept}
        self.bases: dict[str, PrunedBase] = shared_bases(view, stats, config.merge, kept)
        self.pooled_gram = stats.gram_gate_up.sum(0) / max(int(stats.tokens.sum()), 1)

    def _delta(self, name: str, expert: int) -> Tensor:
        """``Δ[e] = W[e] − W_b·mask``; with ``fold=False`` the paper's, against the base before pruning."""
        group = "down" if name == "down" else "gate_up"
        weight = (self.view.down_weight if group == "down" else self.view.gate_up_weight)(expert).float()
        base = int(self.stats.expert_to_base[expert])
        pruned = self.bases[group]
        delta = weight - (pruned.masked(base) if self.config.fold else pruned.full[base])
        return delta[self._rows(name, len(delta))]

    def _rows(self, name: str, group_rows: int) -> slice:
        """The rows of its group that a delta covers; an ungated layer's only delta of a group covers all."""
        return delta_rows(name, group_rows) if self.view.layout.gated else slice(None)

    def _gram(self, name: str, expert: int) -> Tensor:
        """The right Gram, ``[in, in]``, or its diagonal where only that is wanted."""
        if name == "down":
            gram = shrunk_down_gram(self.stats, expert)
        else:
            gram = shrunk_gate_up_gram(self.stats, self.pooled_gram, expert)
        return gram.diagonal() if self.config.decomposition == "activation_aware" else gram

    def _left_gram(self, name: str, expert: int) -> Tensor:
        """The left Gram of a delta's rows, ``[out, out]`` or its diagonal ``[out]``."""
        left = self.stats.left_gram["down" if name == "down" else "gate_up"][expert]
        rows = self._rows(name, len(left))
        return left[rows] if left.dim() == 1 else left[rows, rows]

    def decompose(self, name: str, experts: list[int], rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A stack of deltas as ``u [B, out, r]``, ``v [B, r, in]``, all singular values, the ridges used."""
        decomposition = self.config.decomposition
        delta = torch.stack([self._delta(name, expert).double() for expert in experts])
        gram = left_gram = None
        if decomposition != "plain":
            gram = torch.stack([self._gram(name, expert) for expert in experts])
        if decomposition == "two_sided":
            left_gram = torch.stack([self._left_gram(name, expert) for expert in experts])
        return ops.whitened_svd(delta, rank, gram, left_gram, RIDGE, LEFT_RIDGE)

    def _stacks(self, name: str) -> list[list[int]]:
        """The experts in stacks: together they keep every core busy, and a stack's copies stay within STACK_BYTES."""
        out, inputs = self.plan.shapes.delta_shapes(self.plan.joint)[name]
        size = max(1, STACK_BYTES // (8 * (out * inputs + inputs * inputs)))
        experts = list(range(self.view.layout.num_experts))
        return [experts[begin : begin + size] for begin in range(0, len(experts), size)]

    @torch.no_grad()
    def savings(self, name: str) -> list[np.ndarray]:
        """Per expert what each rank step takes off the error of the bases' step (:mod:`d2moe_ext.alternation`).

        The right Gram is per token (shrunk); the left one is a sum over tokens, so that ``σ²`` estimates
        ``Σ_t (δᵀΔx)²``. Without a left Gram it is ``n[e]·σ²``. What no token reached saves nothing.
        """
        values = []
        for stack in self._stacks(name):
            for expert, sigma in zip(stack, self.decompose(name, stack, 0)[2].cpu().numpy(), strict=True):
                tokens = int(self.stats.tokens[expert])
                values.append(sigma**2 * (min(tokens, 1) if self.config.decomposition == "two_sided" else tokens))
        return values

    def _factors(self, name: str) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
        """Per expert: its number, ``u [out, r]``, ``v [r, in]`` at its planned rank, all singular values, the ridge."""
        ranks = self.plan.ranks[name]
        for stack in self._stacks(name):
            parts = self.decompose(name, stack, max(ranks[expert] for expert in stack))
            for expert, u, v, sigma, ridge in zip(stack, *parts, strict=True):
                yield expert, u[:, : ranks[expert]], v[: ranks[expert]], sigma, ridge  # the factors are nested in rank

    def factor(self, name: str) -> tuple[dict[str, Tensor], DeltaReport]:
        """A projection's factors over all experts, in the order of the experts, under their names in the file."""
        rows_u, parts_v, pivots, errors, ridges = [], [], [], [], []
        scales: dict[str, list[Tensor]] = {}
        for expert, u, v, sigma, ridge in self._factors(name):
            energy = float(sigma.square().sum())
            errors.append((float(sigma[len(v) :].square().sum()) / energy) ** 0.5 if energy else 0.0)
            ridges.append(float(ridge))
            if self.config.gauge_fixed:
                u, v, chosen = fix_gauge(u, v)
                pivots.append(chosen)
            rows = u.T
            if self.config.factor_dtype == "int8":
                metric = self._metric(name, expert, float(ridge))
                quantised = self._quantised(name, expert, v, pivots[-1] if pivots else None, metric)
                for part, int8 in quantised.items():
                    scales.setdefault(part, []).append(int8.scale)
                rows, v = quantised["u"].values, quantised["v"].values
            rows_u.append(rows)
            parts_v.append(v)
        return self.factor_state(name, rows_u, parts_v, pivots, scales), DeltaReport(errors, ridges)

    def _metric(self, name: str, expert: int, ridge: float) -> Tensor:
        """The right Gram that a delta's SVD is whitened with, ``[in, in]`` float64."""
        inputs = self.plan.factor_costs[name].inputs
        gram = None if self.config.decomposition == "plain" else self._gram(name, expert)
        return ridged_gram(gram, inputs, ridge, self.pooled_gram)

    def _quantised(self, name: str, expert: int, v: Tensor, pivots: Tensor | None, metric: Tensor) -> dict[str, Int8Rows]:
        """Factors of eight bits: what is stored of V, and U's rows ``[r, out]``, refitted to it."""
        dtype = self.view.down_weight(0).dtype
        stored = quantise_rows(v, dtype)
        whole = stored.read() if pivots is None else with_identity(stored.read(), pivots)
        u = refitted_u(self._delta(name, expert).double(), whole, metric)
        return {"u": quantise_rows(u.T, dtype), "v": stored}

    def factor_state(
        self,
        name: str,
        rows_u: list[Tensor],
        parts_v: list[Tensor],
        pivots: list[Tensor],
        scales: dict[str, list[Tensor]],
    ) -> dict[str, Tensor]:
        """A projection's tensors under their names in the file.

        Args:
            rows_u: per expert ``[r, out]``.
            parts_v: per expert ``[r, in]``, or gauge-fixed ``[r, in - r]``.
            pivots: per expert ``[r]``; none where V is stored whole.
            scales: per expert ``[r]`` of u and v where these are int8; none where they are floating.
        """
        cost, ranks = self.plan.factor_costs[name], self.plan.ranks[name]
        device = self.stats.tokens.device
        rank = torch.tensor(ranks, dtype=torch.int32, device=device)
        elements = torch.tensor([cost.v_elements(r) for r in ranks], device=device)
        state = {
            "delta_u": torch.cat(rows_u),
            "delta_v": flat_rows(parts_v, cost.inputs),
            "delta_rank": rank,
            "delta_u_start": _starts(rank),
            "delta_v_start": _starts(elements if cost.gauge_fixed else rank),
        }
        if cost.gauge_fixed:
            state["delta_pivots"] = torch.cat(pivots).to(torch.int32)
        state |= {f"delta_{part}_scale": torch.cat(parts) for part, parts in scales.items()}
        return {f"{name}_{key}": value for key, value in state.items()}

    def _targets(self, group: str) -> list[ExpertTarget]:
        """Per expert what it asks of its base: its weight less its truncated delta, in the metric of the deltas' SVD."""
        weight = self.view.down_weight if group == "down" else self.view.gate_up_weight
        experts = range(self.view.layout.num_experts)
        targets = [weight(expert).to(torch.float64, copy=True) for expert in experts]
        rows, inputs = targets[0].shape
        for name in self.plan.ranks:
            if (name == "down") == (group == "down"):
                for expert, u, v, _, _ in self._factors(name):
                    targets[expert][self._rows(name, rows)] -= u @ v
        name = "down" if group == "down" else "gate_up"
        plain = self.config.decomposition == "plain"
        grams = (None if plain else self._gram(name, expert) for expert in experts)
        return [
            ExpertTarget(target, ridged_gram(gram, inputs, RIDGE, target), self._left_weights(group, expert, rows))
            for expert, (target, gram) in enumerate(zip(targets, grams, strict=True))
        ]

    def _left_weights(self, group: str, expert: int, rows: int) -> Tensor:
        """``B[e]`` of the base's step, ridged as in the deltas' SVD; without a left Gram the number of tokens."""
        tokens = float(self.stats.tokens[expert])
        if self.config.decomposition != "two_sided" or not tokens:
            return torch.full((rows,), tokens, dtype=torch.float64, device=self.stats.tokens.device)
        left = self.stats.left_gram[group][expert]
        ridged = ridged_gram(left, rows, LEFT_RIDGE, left)
        if left.dim() == 1:
            return ridged.diagonal()
        if group == "gate_up" and "gate" in self.plan.ranks:  # decomposed apart: no term crosses them
            for one, other in (("gate", "up"), ("up", "gate")):
                ridged[delta_rows(one, rows), delta_rows(other, rows)] = 0
        return ridged

    @torch.no_grad()
    def alternate(self) -> float:
        """Refit the bases to the deltas truncated at the planned ranks; returns the layer's error in their metric."""
        error = 0.0
        for group, pruned in self.bases.items():
            targets = self._targets(group)
            full = pruned.full.clone()
            for base in range(len(full)):
                experts = [target for e, target in enumerate(targets) if int(self.stats.expert_to_base[e]) == base]
                refitted = refit_base(pruned.masked(base).double(), experts, pruned.columns[base])
                error += base_error(refitted, experts)
                full[base] = refitted.to(full.dtype)
            self.bases[group] = PrunedBase(full, pruned.columns)
        return error

    def round_bases(self) -> None:
        """Round the bases to the dtype they are stored in, so that the deltas also repair what that loses."""
        dtype = self.view.down_weight(0).dtype
        self.bases = {g: PrunedBase(p.full.to(dtype).float(), p.columns) for g, p in self.bases.items()}

    def spec(self) -> ExpertsSpec:
        plan = self.plan
        costs = plan.factor_costs
        deltas = {name: DeltaSpec(u_rows=sum(r), v_rows=costs[name].v_rows(r)) for name, r in plan.ranks.items()}
        return ExpertsSpec(
            layout=self.view.layout,
            gate_up=GroupSpec(plan.num_bases, plan.gate_up_kept, plan.gate_up_keep),
            down=GroupSpec(plan.num_bases, plan.down_kept, plan.down_keep),
            deltas=deltas,
            gauge_fixed=plan.gauge_fixed,
            factor_dtype=self.config.factor_dtype,
        )

    @torch.no_grad()
    def run(self) -> tuple[D2MoEExperts, dict[str, DeltaReport]]:
        """The compressed experts, ready to take the view's place."""
        view = self.view
        weight = view.down_weight(0)
        experts = D2MoEExperts(self.spec(), view, dtype=weight.dtype, device=weight.device)
        state: dict[str, Tensor] = {}
        for group, pruned in self.bases.items():
            state[f"{group}_base"] = pruned.stored
            state[f"{group}_expert_to_base"] = self.stats.expert_to_base
            if pruned.columns.shape[1] < pruned.full.shape[2]:
                state[f"{group}_columns"] = pruned.columns
        if view.layout.has_bias:
            for group, bias in (("gate_up", view.gate_up_bias), ("down", view.down_bias)):
                rows = [row for e in range(view.layout.num_experts) if (row := bias(e)) is not None]
                state[f"{group}_bias"] = torch.stack(rows)
        reports = {}
        for name in self.plan.ranks:
            factors, reports[name] = self.factor(name)
            state |= factors
        for key, value in state.items():
            if not bool(value.isfinite().all()):
                raise RuntimeError(f"compress: {key} of {view.name} must be finite, got NaN or infinity.")
        own = experts.state_dict()
        # The submodules of the model's gate, and the norm after each expert, came with the view.
        submodules = {key: value for key, value in own.items() if "." in key}
        experts.load_state_dict(submodules | {key: value.to(own[key].dtype) for key, value in state.items()})
        return experts, reports
