"""Diagnostics of an uncompressed model: how alike its experts are, how fast their spectra fall, who is routed where.

Measures alone; :mod:`d2moe_ext.advice` turns them into a recommendation. Layer by layer, never more than one layer's
deltas at a time. Whitened means multiplied by ``S`` with ``S Sᵀ`` the expert's shrunk Gram matrix (design section 2.5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from d2moe_ext import ops
from d2moe_ext.adapters import ExpertsView, find_experts
from d2moe_ext.bases import cluster, weight_distances
from d2moe_ext.budget import LayerShapes, kept_columns
from d2moe_ext.calibration import CalibrationStats, LayerStats, Progress
from d2moe_ext.config import PRESETS
from d2moe_ext.layer_compression import STACK_BYTES, delta_rows, shrunk_down_gram, shrunk_gate_up_gram
from d2moe_ext.merge import prune_columns
from d2moe_ext.shapes import model_shapes

GROUPS = ("gate_up", "down")
# Of the singular values, from the largest down, whose energy is reported.
TOP_SHARES = (0.10, 0.25, 0.50)
# Of a base's columns, from the smallest metric up: what the throughput preset removes for good (paper, Table 12).
LOWEST_COLUMNS = PRESETS["throughput"]["base_sparsity"] / 2
# Numbers of bases whose errors are predicted; each costs one decomposition of every delta.
MOST_BASES = 8


def linear_cka(a: Tensor, b: Tensor) -> float:
    """Linear centred kernel alignment (paper, eq. 11) of two matrices with the same rows.

    ``⟨K, L⟩ / (‖K‖ ‖L‖)`` in the Frobenius norm with ``K = (Ha)(Ha)ᵀ``, ``L = (Hb)(Hb)ᵀ`` and H the centring of columns:
    from 0 to 1, blind to scale and to any rotation or permutation of the columns. In float64. Two matrices ``[n, p]`` of
    independent entries do not come to 0 but to about ``p / (n + p)``: read a value against that.

    Args:
        a: ``[n, p]``; rows are the samples.
        b: ``[n, q]``.

    Returns:
        The alignment; 0 where all rows of one matrix are equal, so that there is nothing to compare.

    Raises:
        ValueError: the matrices differ in their rows.
    """
    if a.dim() != 2 or b.dim() != 2 or len(a) != len(b):
        raise ValueError(f"linear_cka: a and b must be [n, p] and [n, q], got {list(a.shape)} and {list(b.shape)}.")
    if len(a) <= max(a.shape[1], b.shape[1]):
        return float(cka_matrix([a, b])[0, 1])
    # ⟨K, L⟩ = ‖(Ha)ᵀ(Hb)‖², without a matrix of n by n.
    a, b = _centred(a), _centred(b)
    norms = (a.T @ a).norm() * (b.T @ b).norm()
    return float((a.T @ b).square().sum() / norms) if norms > 0 else 0.0


def cka_matrix(weights: Sequence[Tensor]) -> Tensor:
    """:func:`linear_cka` of every pair, ``[E, E]`` float64, symmetric.

    Args:
        weights: E matrices ``[n, p_e]``; it holds one ``[n, n]`` float64 of each.
    """
    kernels = []
    for weight in weights:
        centred = _centred(weight)
        kernel = (centred @ centred.T).flatten()
        norm = kernel.norm()
        kernels.append(kernel / norm if norm > 0 else kernel)
    stack = torch.stack(kernels)
    return (stack @ stack.T).clamp(0, 1)


def _centred(weight: Tensor) -> Tensor:
    weight = weight.double()
    return weight - weight.mean(0)


def mean_off_diagonal(matrix: Tensor) -> float:
    """The mean over all pairs of different experts of ``[E, E]``; 1 where there is only one expert."""
    count = len(matrix)
    return float((matrix.sum() - matrix.diagonal().sum()) / (count * (count - 1))) if count > 1 else 1.0


def energy_retention(singular_values: Tensor) -> Tensor:
    """``Σ_{i≤r} σ_i² / Σ σ_i²`` (paper, eq. 12) for r = 1 … n: the share of the energy that rank r keeps.

    Args:
        singular_values: ``[..., n]``, descending.

    Returns:
        ``[..., n]`` float64, rising to 1; all 1 where every singular value is 0.
    """
    energy = singular_values.double().square()
    total = energy.sum(-1, keepdim=True)
    shares = energy.cumsum(-1) / torch.where(total > 0, total, 1.0)
    return torch.where(total > 0, shares, 1.0).clamp(max=1)


def top_energy(singular_values: Tensor) -> list[float]:
    """Energy in the top :data:`TOP_SHARES` of the singular values ``[B, n]``, the mean over B."""
    retention, count = energy_retention(singular_values), singular_values.shape[-1]
    return [float(retention[..., max(1, round(share * count)) - 1].mean()) for share in TOP_SHARES]


def low_column_share(base: Tensor, energy: Tensor, share: float = LOWEST_COLUMNS) -> float:
    """``Σ C_j²`` over the lowest ``share`` of the columns, of ``Σ C_j²`` over all, with eq. 9's ``C_j = ‖W_b[:,j]‖ ‖X_j‖``.

    Squares, because they add up: ``Σ C_j²`` is the output's energy if channels are uncorrelated.

    Args:
        base: ``[out, in]``.
        energy: ``[in]``, ``‖X_j‖²``.
        share: of the columns.
    """
    metric = (base.double().square().sum(0) * energy.double()).sort().values
    total = float(metric.sum())
    return float(metric[: int(share * len(metric))].sum()) / total if total > 0 else 0.0


@dataclass(frozen=True)
class Routing:
    """Where a layer's router sent the calibration tokens.

    Attributes:
        tokens: ``[E]``, (token, expert) pairs of each expert.
        shares: ``[E]``, the same as shares of all pairs; they sum to 1.
        unreached: experts that no token reached.
        entropy: ``−Σ p log p / log E`` of the shares: 1 is a uniform load, 0 a single expert.
    """

    tokens: list[int]
    shares: list[float]
    unreached: list[int]
    entropy: float

    @classmethod
    def of(cls, tokens: Tensor) -> Routing:
        """From n[e], ``[E]`` int64, of which at least one is positive."""
        shares = (tokens.double() / tokens.sum()).tolist()
        entropy = -sum(share * math.log(share) for share in shares if share > 0)
        return cls(
            tokens=tokens.tolist(),
            shares=shares,
            unreached=torch.nonzero(tokens == 0).flatten().tolist(),
            entropy=entropy / math.log(len(shares)) if len(shares) > 1 else 1.0,
        )


@dataclass(frozen=True)
class Spectrum:
    """What truncating one projection's deltas would leave out.

    Attributes:
        squares: ``[E, min(out, in)]`` float64, squared whitened singular values of the deltas, per token.
        energy: ``[E]`` float64, ``‖W[e] S_e‖²``: the output's energy, per token.
        tokens: ``[E]`` float64, n[e].
    """

    squares: Tensor
    energy: Tensor
    tokens: Tensor

    def relative_error(self, ranks: Sequence[int]) -> float:
        """``Σ_e n[e] Σ_{i>r} σ² / Σ_e n[e] ‖W[e] S_e‖²``: the squared error of the outputs over their energy."""
        left = torch.stack([row[rank:].sum() for row, rank in zip(self.squares, ranks, strict=True)])
        energy = float((self.tokens * self.energy).sum())
        return float((self.tokens * left).sum()) / energy if energy > 0 else 0.0


@dataclass(frozen=True)
class LayerAnalysis:
    """One layer's diagnostics. Entries ``{group: …}`` are for ``gate_up`` and ``down``.

    Attributes:
        name: the path of the experts.
        cka: ``{group: …}``, the mean over pairs of experts. Rows are the hidden channels, which mean the same in every
            expert, so the order of an expert's neurons does not matter.
        cka_independent: ``{group: …}``, about what experts of independent entries would come to (see :func:`linear_cka`).
        retention: ``{"experts" | "base" | "deltas": {"plain" | "whitened": [shares at TOP_SHARES]}}``, with the plain mean
            of all experts as the base; means over experts and groups.
        explained: ``{number of bases: share}``: ``1 − Σ‖(W[e]−W_b)S_e‖² / Σ‖W[e]S_e‖²``, the mean over groups.
        low_columns: ``{group: …}``, :func:`low_column_share` of the mean base.
        routing: where tokens went.
        spectra: ``{number of bases: {projection: Spectrum}}``.
    """

    name: str
    cka: dict[str, float]
    cka_independent: dict[str, float]
    retention: dict[str, dict[str, list[float]]]
    explained: dict[int, float]
    low_columns: dict[str, float]
    routing: Routing
    spectra: dict[int, dict[str, Spectrum]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-clean, without the spectra."""
        routing = asdict(self.routing)
        explained = {str(bases): share for bases, share in self.explained.items()}
        record = {"name": self.name, "cka": self.cka, "cka_independent": self.cka_independent, "retention": self.retention}
        return record | {"explained_by_bases": explained, "low_columns": self.low_columns, "routing": routing}


class _Group:
    """The experts' weights of one input group, with the Gram matrices they are whitened with."""

    def __init__(self, view: ExpertsView, stats: LayerStats, name: str) -> None:
        self.name, self.experts = name, range(view.layout.num_experts)
        self._weight = view.down_weight if name == "down" else view.gate_up_weight
        self._stats = stats
        self._pooled = stats.gram_gate_up.sum(0) / max(int(stats.tokens.sum()), 1)
        self.energy = (stats.down_energy if name == "down" else stats.gate_up_energy).sum(0)

    def weight(self, expert: int) -> Tensor:
        """``[out, in]`` float32."""
        return self._weight(expert).detach().float()

    def gram(self, expert: int) -> Tensor:
        """``[in, in]`` float64."""
        if self.name == "down":
            return shrunk_down_gram(self._stats, expert)
        return shrunk_gate_up_gram(self._stats, self._pooled, expert)

    def mean(self, experts: Sequence[int]) -> Tensor:
        """``[out, in]`` float32, one expert at a time."""
        return sum((self.weight(expert) for expert in experts[1:]), self.weight(experts[0]).clone()) / len(experts)

    def cluster_energy(self, experts: Sequence[int]) -> Tensor:
        """``[in]``: ``‖X_j‖²`` that the shared base of some experts sees; for down of part of them, an estimate without
        the products between experts."""
        if len(experts) == len(self.experts):
            return self.energy
        stats = self._stats
        if self.name == "gate_up":
            return stats.gram_gate_up[list(experts)].diagonal(dim1=1, dim2=2).sum(0)
        gates = [stats.gate_mass[e] / max(int(stats.tokens[e]), 1) for e in experts]
        return torch.stack([g**2 * stats.gram_down[e].diagonal() for g, e in zip(gates, experts, strict=True)]).sum(0)

    def output_energy(self, expert: int, matrix: Tensor) -> float:
        """``‖A S_e‖² = tr(A G Aᵀ)``."""
        matrix = matrix.double()
        return float(((matrix @ self.gram(expert)) * matrix).sum())

    def singular_values(self, matrix: Callable[[int], Tensor], whitened: bool) -> Tensor:
        """Of ``matrix(e)`` or ``matrix(e) S_e`` for every expert, ``[E, min(out, in)]`` float64, a stack at a time."""
        out, inputs = matrix(0).shape
        size = max(1, STACK_BYTES // (8 * (out * inputs + inputs * inputs)))
        found = []
        for begin in range(0, len(self.experts), size):
            stack = self.experts[begin : begin + size]
            gram = torch.stack([self.gram(expert) for expert in stack]) if whitened else None
            found.append(ops.whitened_svd(torch.stack([matrix(expert) for expert in stack]), 0, gram)[2].cpu())
        return torch.cat(found)


def _members(labels: Tensor) -> list[list[int]]:
    return [torch.nonzero(labels == base).flatten().tolist() for base in range(int(labels.max()) + 1)]


def explained_share(group: _Group, clusters: Sequence[Sequence[int]]) -> float:
    """``1 − Σ‖(W[e]−W_b)S_e‖² / Σ‖W[e]S_e‖²`` with the plain mean of each cluster as its base; 1 where all is 0."""
    left = total = 0.0
    for experts in clusters:
        base = group.mean(experts)
        for expert in experts:
            weight = group.weight(expert)
            left += group.output_energy(expert, weight - base)
            total += group.output_energy(expert, weight)
    return 1 - left / total if total > 0 else 1.0


def _retention(groups: Sequence[_Group]) -> dict[str, dict[str, list[float]]]:
    parts: dict[str, dict[str, list[float]]] = {"experts": {}, "base": {}, "deltas": {}}
    for kind in ("plain", "whitened"):
        tops: dict[str, list[list[float]]] = {part: [] for part in parts}
        for group in groups:
            base = group.mean(group.experts)
            matrices = {"experts": group.weight, "base": _constant(base), "deltas": _difference(group, base)}
            for part, matrix in matrices.items():
                tops[part].append(top_energy(group.singular_values(matrix, kind == "whitened")))
        for part, rows in tops.items():
            parts[part][kind] = [sum(values) / len(values) for values in zip(*rows, strict=True)]
    return parts


def _constant(base: Tensor) -> Callable[[int], Tensor]:
    return lambda expert: base


def _difference(group: _Group, base: Tensor) -> Callable[[int], Tensor]:
    return lambda expert: group.weight(expert) - base


def _rows_of_deltas(group: _Group, bases: dict[int, Tensor], rows: slice) -> Callable[[int], Tensor]:
    return lambda expert: (group.weight(expert) - bases[expert])[rows]


def _spectra(
    view: ExpertsView, stats: LayerStats, shapes: LayerShapes, clusters: Sequence[Sequence[int]]
) -> Iterator[tuple[str, Spectrum]]:
    """The spectra of the deltas against the mean of each cluster, whose columns the performance preset has pruned."""
    projections = shapes.delta_shapes(joint=False)
    for name in GROUPS:
        group = _Group(view, stats, name)
        bases: dict[int, Tensor] = {}
        for experts in clusters:
            mean = group.mean(experts)
            kept = kept_columns(mean.shape[1], PRESETS["performance"]["base_sparsity"])[0]
            bases |= dict.fromkeys(experts, prune_columns(mean[None], group.cluster_energy(experts)[None], kept).masked(0))
        for projection in projections:
            if (projection == "down") != (name == "down"):
                continue
            rows = delta_rows(projection, shapes.gate_up_rows) if shapes.gated else slice(None)
            squares = group.singular_values(_rows_of_deltas(group, bases, rows), whitened=True).square()
            energy = [group.output_energy(expert, group.weight(expert)[rows]) for expert in group.experts]
            yield projection, Spectrum(squares, torch.tensor(energy, dtype=torch.float64), stats.tokens.double().cpu())


def base_counts(num_experts: int) -> list[int]:
    """1, 2, 4, …, below the number of experts, and that number."""
    return [2**power for power in range(num_experts.bit_length()) if 2**power < num_experts] + [num_experts]


@torch.no_grad()
def analyze_layer(view: ExpertsView, stats: LayerStats, shapes: LayerShapes) -> LayerAnalysis:
    """The diagnostics of one layer; see :class:`LayerAnalysis`.

    Args:
        view: its experts.
        stats: its statistics, taken for one base.
        shapes: its shapes.
    """
    groups = [_Group(view, stats, name) for name in GROUPS]
    distances = weight_distances(view)
    clusters = {bases: _members(cluster(distances, bases)) for bases in base_counts(shapes.num_experts)}
    gate_up, down = groups
    cka = {
        "gate_up": mean_off_diagonal(cka_matrix([gate_up.weight(expert).T for expert in gate_up.experts])),
        "down": mean_off_diagonal(cka_matrix([down.weight(expert) for expert in down.experts])),
    }
    hidden, inter, rows = shapes.hidden_size, shapes.intermediate_size, shapes.gate_up_rows
    return LayerAnalysis(
        name=view.name,
        cka=cka,
        cka_independent={"gate_up": rows / (hidden + rows), "down": inter / (hidden + inter)},
        retention=_retention(groups),
        explained={k: sum(explained_share(group, members) for group in groups) / 2 for k, members in clusters.items()},
        low_columns={group.name: low_column_share(group.mean(group.experts), group.energy) for group in groups},
        routing=Routing.of(stats.tokens),
        spectra={
            bases: dict(_spectra(view, stats, shapes, members))
            for bases, members in clusters.items()
            if bases <= MOST_BASES and (bases < shapes.num_experts or bases == 1)
        },
    )


def analyze_layers(model: nn.Module, stats: CalibrationStats, progress: Progress | None = None) -> list[LayerAnalysis]:
    """The diagnostics of every MoE layer.

    Args:
        model: uncompressed.
        stats: of the same model, for one base; any merge will do, as bases are plain means here.
        progress: called with a stage's name, what is done and the total.

    Raises:
        ValueError: no MoE layer, or statistics of another model or for more than one base.
    """
    if stats.num_bases != 1:
        raise ValueError(f"analyze: stats must be taken for num_bases=1, got statistics for {stats.num_bases}.")
    views, shapes = find_experts(model), model_shapes(model)
    missing = [view.name for view in views if view.name not in stats.layers]
    if missing:
        raise ValueError(f"analyze: stats must hold every MoE layer of the model, got none of {missing[0]}.")
    found = []
    for view, layer in zip(views, shapes.layers, strict=True):
        found.append(analyze_layer(view, stats.layers[view.name], layer))
        if progress is not None:
            progress("Analyzing layers", len(found), len(views))
    return found
