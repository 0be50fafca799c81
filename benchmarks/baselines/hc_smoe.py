"""HC-SMoE: experts with alike outputs are clustered, and each cluster becomes its frequency-weighted mean.

Chen et al., "Retraining-Free Merging of Sparse MoE via Hierarchical Clustering", ICML 2025 (arXiv 2410.08589):
an expert is described by its mean output over all calibration tokens, whether routed to it or not; the Euclidean
distances between these are clustered with average linkage; a cluster's weights are averaged by how often its experts
are used. The router keeps its rows. Without fine-tuning in the paper as here.

The paper keeps equally many clusters in every layer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.baselines.counts import budget_of, experts_within, spread
from benchmarks.baselines.merging import check_routers, drop_layers, frequency_weights, index_bytes, merge_group, merged_bytes
from benchmarks.baselines.outputs import SubsetLoss, expert_outputs
from benchmarks.baselines.routing import round_as_stored
from benchmarks.study import Calibration, LayerInputs, model_parameters
from d2moe_ext.adapters import ExpertsView, find_experts
from d2moe_ext.bases import cluster

UNIFORM = True


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


def _losses(features: Tensor, shares: Tensor, distances: Tensor) -> list[float]:
    """The clusters' loss for 0 (nothing is kept), 1, ..., E clusters, relative to that of one."""
    values = [cluster_loss(features, shares, cluster(distances, count)) for count in range(1, len(features) + 1)]
    scale = max(values[0], 1e-30)
    return [1e6] + [value / scale for value in values]


def hc_smoe(model: PreTrainedModel, calibration: Calibration, ratio: float) -> int:
    """Merge the experts of each layer whose mean outputs lie closest, in place.

    Returns:
        Stored bytes of the whole model: an index from router rows to stored experts included.

    Raises:
        ValueError: a ratio out of range or out of reach, or a router of another kind.
    """
    budget = budget_of(model, ratio)
    views = find_experts(model)
    check_routers(views)
    round_as_stored(model)
    if 2 * model_parameters(model) <= budget:
        return 2 * model_parameters(model)
    total = experts_within(model, views, budget, router_rows=False, index_bytes=index_bytes(views))
    if total < len(views):
        views = drop_layers(views, [SubsetLoss(v, calibration.inputs[v.name])([]) for v in views], total)
    features = [mean_outputs(view, calibration.inputs[view.name]) for view in views]
    tokens = [calibration.stats.layers[view.name].tokens for view in views]
    distances = [torch.cdist(feature, feature) for feature in features]
    losses = [_losses(f, frequency_weights(t), d) for f, t, d in zip(features, tokens, distances, strict=True)]
    groups = {}
    for view, frequency, distance, count in zip(views, tokens, distances, spread(losses, total, UNIFORM), strict=True):
        labels = cluster(distance, count)
        groups[view.name] = [torch.nonzero(labels == label).flatten().tolist() for label in range(count)]
        for members in groups[view.name]:
            merge_group(view, members, frequency_weights(frequency[members]))
    return merged_bytes(model, groups, views)
