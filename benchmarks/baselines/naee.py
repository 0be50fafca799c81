"""NAEE: of each layer, keep the experts without whose fellows the layer's output changes least.

Lu et al., "Not All Experts are Equal: Efficient Expert Pruning and Skipping for Mixture-of-Experts Large Language
Models", ACL 2024 (arXiv 2402.14800), section on expert pruning: every set of experts of a layer is tried, its router
renormalised over them, and the set with the smallest reconstruction error of the layer's output is kept. Its dynamic
skipping of experts saves time, not bytes, and is left out; its fine-tuning after pruning is left out as all is.

The paper keeps equally many experts in every layer; here that is one of three ways to spread them, and the best on
calibration text is taken (:func:`benchmarks.baselines.counts.choose_counts`).
"""

from __future__ import annotations

from itertools import combinations

from transformers import PreTrainedModel

from benchmarks.baselines.counts import budget_of, choose_counts, experts_within
from benchmarks.baselines.outputs import SubsetLoss
from benchmarks.baselines.routing import keep_experts, round_as_stored
from benchmarks.study import Calibration, model_parameters
from d2moe_ext.adapters import find_experts

# With more experts than this, trying every set takes too long; they go one by one, the least missed first.
EXHAUSTIVE_EXPERTS = 12


def best_subsets(loss: SubsetLoss) -> list[tuple[float, tuple[int, ...]]]:
    """For 0, 1, ..., E kept experts: the least loss and the set that has it (exact for up to 12 experts)."""
    experts = tuple(range(loss.num_experts))
    if len(experts) <= EXHAUSTIVE_EXPERTS:
        return [min((loss(kept), kept) for kept in combinations(experts, count)) for count in range(len(experts) + 1)]
    found = [(loss(experts), experts)]
    while found[0][1]:
        kept = found[0][1]
        found.insert(0, min((loss(fewer), fewer) for fewer in combinations(kept, len(kept) - 1)))
    return found


def naee(model: PreTrainedModel, calibration: Calibration, ratio: float) -> int:
    """Drop the experts whose absence changes their layer's output least, in place.

    Returns:
        Stored bytes of the whole model.

    Raises:
        ValueError: a ratio out of range or out of reach, or a router of another kind.
    """
    budget = budget_of(model, ratio)
    views = find_experts(model)
    round_as_stored(model)
    total = experts_within(model, views, budget, router_rows=True)
    best = [best_subsets(SubsetLoss(view, calibration.inputs[view.name])) for view in views]

    def prune(changed: PreTrainedModel, counts: list[int]) -> None:
        for view, layer, count in zip(find_experts(changed), best, counts, strict=True):
            keep_experts(view, layer[count][1])

    losses = [[loss for loss, _ in layer] for layer in best]
    prune(model, choose_counts(model, calibration, losses, total, prune))
    return 2 * model_parameters(model)
