"""HC-SMoE: experts with alike outputs are clustered, and each cluster becomes its frequency-weighted mean.

Chen et al., "Retraining-Free Merging of Sparse MoE via Hierarchical Clustering", ICML 2025 (arXiv 2410.08589):
an expert is described by its mean output over all calibration tokens, whether routed to it or not; the Euclidean
distances between these are clustered with average linkage; a cluster's weights are averaged by how often its experts
are used. The router keeps its rows. Without fine-tuning in the paper as here.

Two things are done better than in the paper, because both lower perplexity much. The neurons of a cluster's experts are first
permuted to match its most used one's (as MC-SMoE does): where experts did not start as copies of one network, a mean of
unmatched neurons is worth little. And the paper keeps equally many clusters in every layer; here that is one of three ways,
and the best on calibration text is taken (:func:`benchmarks.baselines.counts.choose_counts`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.baselines.counts import budget_of, choose_counts, experts_within
from benchmarks.baselines.merging import check_mergeable, drop_layers, frequency_weights, index_bytes, merge_group, merged_bytes
from benchmarks.baselines.outputs import SubsetLoss, expert_outputs
from benchmarks.baselines.routing import round_as_stored
from benchmarks.study import Calibration, LayerInputs, model_parameters
from d2moe_ext.adapters import ExpertsView, find_experts
from d2moe_ext.bases import cluster


@torch.no_grad()
def mean_outputs(view: ExpertsView, inputs: LayerInputs) -> Tensor:
    """``[E, H]`` float64: each expert's output, averaged over all captured tokens of the layer."""
    return expert_outputs(view, inputs.hidden_states).double().mean(1)


def cluster_loss(features: Tensor, shares: Tensor, labels: Tensor) -> float:
    """Squared distance of the experts' mean outputs to their cluster's, weighted by frequency."""
    loss = 0.0
    for label in labels.unique():
        members = features[labels == label]
        weights = shares[labels == label]
        center = (frequency_weights(weights)[:, None] * members).sum(0)
        loss += float((weights * (members - center).square().sum(1)).sum())
    return loss


@dataclass(frozen=True)
class _Layer:
    """What clustering needs to know of a layer: ``[E, H]`` mean outputs and ``[E]`` tokens."""

    features: Tensor
    tokens: Tensor

    def labels(self, count: int) -> Tensor:
        """``[E]``: the cluster of each expert, by average linkage."""
        return cluster(torch.cdist(self.features, self.features), count)

    def losses(self) -> list[float]:
        """Of 0, 1, ..., E clusters; no layer is left without one here."""
        shares = frequency_weights(self.tokens)
        counts = range(1, len(self.tokens) + 1)
        return [math.inf] + [cluster_loss(self.features, shares, self.labels(count)) for count in counts]

    def groups(self, count: int) -> list[list[int]]:
        """The clusters' experts, the most used first."""
        labels = self.labels(count)
        clusters = [torch.nonzero(labels == label).flatten().tolist() for label in range(count)]
        return [sorted(members, key=lambda expert: -int(self.tokens[expert])) for members in clusters]

    def merge(self, view: ExpertsView, count: int) -> None:
        """Merge each cluster in the view's model."""
        for members in self.groups(count):
            merge_group(view, members, frequency_weights(self.tokens[members]), align=True)


def hc_smoe(model: PreTrainedModel, calibration: Calibration, ratio: float) -> int:
    """Merge the experts of each layer whose mean outputs lie closest, in place.

    Returns:
        Stored bytes of the whole model: an index from router rows to stored experts included.

    Raises:
        ValueError: a ratio out of range or out of reach, or a router of another kind.
    """
    budget = budget_of(model, ratio)
    views = find_experts(model)
    check_mergeable(views)
    round_as_stored(model)
    if 2 * model_parameters(model) <= budget:
        return 2 * model_parameters(model)
    total = experts_within(model, views, budget, router_rows=False, index_bytes=index_bytes(views))
    if total < len(views):
        views = drop_layers(views, [SubsetLoss(v, calibration.inputs[v.name])([]) for v in views], total)
    layers = [
        _Layer(mean_outputs(view, calibration.inputs[view.name]), calibration.stats.layers[view.name].tokens) for view in views
    ]

    def merge(changed: PreTrainedModel, counts: list[int]) -> None:
        for view, layer, count in zip(find_experts(changed), layers, counts, strict=True):
            layer.merge(view, count)

    counts = choose_counts(model, calibration, [layer.losses() for layer in layers], total, merge)
    merge(model, counts)
    return merged_bytes(model, dict(zip([view.name for view in views], counts, strict=True)), views)
