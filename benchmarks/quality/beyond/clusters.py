"""Two bases a projection, and what says which experts share one.

``weights``: ``‖W_i − W_j‖²``, the package's. ``whitened``: ``Σ over projections of tr(D G D') / its mean``, with
``D = W_i − W_j`` and ``G`` half the sum of both experts' Grams per token: ``‖D S‖²`` with ``SS' = G``. ``co-activation``:
``1 − c_ij / √(n_i n_j)``, c the tokens that both experts fire for, so that a token's experts share one product with the base.
Clusters are average linkage. Cost: a second base, paid for in rank; one more forward pass for the new bases' column energies.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.quality.beyond.pipeline import compress_stored, diagonal
from benchmarks.study import Calibration, Method
from d2moe_ext.adapters import ExpertsView, find_experts
from d2moe_ext.bases import cluster, weight_distances
from d2moe_ext.calibration import CalibrationStats, LayerStats, _ForwardPass, _frozen, _run_forward, _silent, sequences_of

Distance = Literal["weights", "whitened", "co-activation"]


def whitened_distances(view: ExpertsView, stats: LayerStats) -> Tensor:
    """``[E, E]`` float64, each projection's divided by its mean over the pairs."""
    count = view.layout.num_experts
    total = torch.zeros(count, count, dtype=torch.float64)
    for weight, grams in ((view.gate_up_weight, stats.gram_gate_up), (view.down_weight, stats.gram_down)):
        means = [grams[e] / stats.gram_tokens(e) for e in range(count)]
        distances = torch.zeros_like(total)
        for i in range(count):
            for j in range(i):
                difference = (weight(i) - weight(j)).detach().double()
                gram = (means[i] + means[j]) / 2
                distances[i, j] = distances[j, i] = float(((difference @ gram) * difference).sum())
        total += distances / (distances.sum() / (count * (count - 1)))
    return total


def co_activation_distances(top_k_index: Tensor, num_experts: int) -> Tensor:
    """``[E, E]`` float64 from ``[T, k]`` ids; experts that never fire are as far as can be from all others."""
    fires = torch.zeros(len(top_k_index), num_experts, dtype=torch.float64).scatter_(1, top_k_index, 1.0)
    together = fires.T @ fires
    norms = together.diagonal().sqrt().clamp_min(1.0)
    distances = 1 - together / (norms[:, None] * norms[None, :])
    distances.fill_diagonal_(0.0)
    return distances


def rebased(
    model: PreTrainedModel, batches: list[Tensor], stats: CalibrationStats, labels: dict[str, Tensor], num_bases: int
) -> CalibrationStats:
    """``stats`` for the bases ``labels`` names: ``[E]`` int32 by layer."""
    views = find_experts(model)
    scratch = {}  # only the energies are wanted of it
    for view in views:
        layer = stats.layers[view.name]
        scratch[view.name] = replace(
            layer,
            expert_to_base=labels[view.name],
            tokens=torch.zeros_like(layer.tokens),
            gate_mass=torch.zeros_like(layer.gate_mass),
            gram_gate_up=torch.zeros_like(layer.gram_gate_up),
            gram_down=torch.zeros_like(layer.gram_down),
            down_energy=torch.zeros(num_bases, layer.down_energy.shape[1], dtype=torch.float64),
        )
    with _frozen(model):
        _run_forward(model, [_ForwardPass(v, scratch[v.name]) for v in views], sequences_of(batches), _silent)
    layers = {
        name: replace(stats.layers[name], expert_to_base=labels[name], down_energy=taken.down_energy)
        for name, taken in scratch.items()
    }
    return replace(stats, layers=layers, num_bases=num_bases)


def clustered_method(distance: Distance, num_bases: int = 2, **options: Any) -> Method:
    """The default with several bases, their experts clustered by a distance."""

    def method(model: PreTrainedModel, calibration: Calibration, ratio: float) -> int:
        stats = diagonal(calibration.stats)
        labels = {}
        for view in find_experts(model):
            if distance == "weights":
                distances = weight_distances(view)
            elif distance == "whitened":
                distances = whitened_distances(view, stats.layers[view.name])
            else:
                distances = co_activation_distances(calibration.inputs[view.name].top_k_index, view.layout.num_experts)
            labels[view.name] = cluster(distances, num_bases)
        stats = rebased(model, calibration.batches, stats, labels, num_bases)
        return compress_stored(model, stats, ratio, num_bases=num_bases, **options)

    return method
