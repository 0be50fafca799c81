"""MC-SMoE, its merging: rarely used experts join the dominant expert that the router treats most alike.

Li et al., "Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy", ICLR 2024
(arXiv 2310.01334). Usage frequencies, normalised in each layer by its most used expert, choose the dominant experts over
the whole model, so that layers keep different numbers; every other expert joins the dominant one of its layer whose
router logits are most similar (cosine over the calibration tokens). A group's neurons are first permuted to match
the dominant expert's (weight matching over gate, up and down together, a linear assignment), then averaged by frequency.

The second stage of the paper, low rank plus structured sparsity on the merged experts, is left out: merging alone reaches
the budgets studied here, and the paper recovers what that stage costs by fine-tuning with distillation, which also
follows its merging. Nothing here is trained. Every layer keeps an expert as long as the budget holds one for each; below that,
which the paper does not go to, the layers that put out least lose theirs.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from benchmarks.baselines.counts import budget_of, experts_within
from benchmarks.baselines.merging import check_mergeable, drop_layers, frequency_weights, index_bytes, merge_group, merged_bytes
from benchmarks.baselines.outputs import SubsetLoss
from benchmarks.baselines.routing import round_as_stored
from benchmarks.study import Calibration, model_parameters
from d2moe_ext.adapters import find_experts


def dominant_experts(tokens: list[Tensor], total: int) -> list[list[int]]:
    """Per layer the experts that stay: the ``total`` most used, by frequency over that of the layer's most used one."""
    scored = []
    for layer, counts in enumerate(tokens):
        relative = counts.double() / counts.max().clamp_min(1)
        first = int(relative.argmax())
        # Every layer's most used expert stays, whatever the others have.
        scored += [(-(2.0 if e == first else float(relative[e])), layer, e) for e in range(len(counts))]
    chosen = sorted(scored)[:total]
    return [sorted(e for _, where, e in chosen if where == layer) for layer in range(len(tokens))]


def group_by_router(router_logits: Tensor, dominant: list[int]) -> list[list[int]]:
    """Groups of experts, each led by its dominant one; the others join by cosine similarity of ``router_logits [T, E]``."""
    columns = normalize(router_logits.double().T, dim=1)
    similarity = columns @ columns[dominant].T
    groups = [[leader] for leader in dominant]
    for expert in range(router_logits.shape[1]):
        if expert not in dominant:
            groups[int(similarity[expert].argmax())].append(expert)
    return groups


def mc_smoe(model: PreTrainedModel, calibration: Calibration, ratio: float) -> int:
    """Merge every expert that is not dominant into the dominant one routed most alike, in place.

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
    tokens = [calibration.stats.layers[view.name].tokens for view in views]
    stored_experts = {}
    for view, counts, dominant in zip(views, tokens, dominant_experts(tokens, total), strict=True):
        for members in group_by_router(calibration.inputs[view.name].router_logits, dominant):
            merge_group(view, members, frequency_weights(counts[members]), align=True)
        stored_experts[view.name] = len(dominant)
    return merged_bytes(model, stored_experts, views)
