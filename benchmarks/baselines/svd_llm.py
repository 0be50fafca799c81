"""SVD-LLM per expert: truncation-aware whitened SVD of every projection, with no shared base.

Wang et al., "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression", ICLR 2025
(arXiv 2403.07378), applied to each expert as to a dense layer: every projection is truncated in the norm of the
inputs that this expert saw, all by the same share of their parameters. The Grams are shrunk and ridged as ours are
(design section 2.5), without which experts with few tokens would fail. The paper's second step, a LoRA fine-tuning of
the two factors, is part of its best results; nothing here is trained.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from benchmarks.baselines.counts import budget_of
from benchmarks.baselines.ranks import Matrix, ranks_within, truncate
from benchmarks.baselines.routing import projection_weight, projections, round_as_stored
from benchmarks.study import Calibration, model_parameters
from d2moe_ext.adapters import find_experts


def svd_llm(model: PreTrainedModel, calibration: Calibration, ratio: float) -> int:
    """Replace every expert's projections by their whitened truncations, in place.

    Returns:
        Stored bytes of the whole model.

    Raises:
        ValueError: a ratio out of range or out of reach, or experts that are not one stacked module.
    """
    budget = budget_of(model, ratio)
    views = find_experts(model)
    round_as_stored(model)
    places, matrices = [], []
    for view in views:
        for expert in range(view.layout.num_experts):
            for name in projections(view):
                places.append((view.name, expert, name))
                matrices.append(Matrix(*projection_weight(view, name, expert).shape))
    rest = model_parameters(model) - sum(m.rows * m.columns for m in matrices)
    ranks = ranks_within(matrices, budget // 2 - rest)
    chosen = dict(zip(places, ranks, strict=True))
    for view in views:
        for expert in range(view.layout.num_experts):
            wanted = {name: chosen[view.name, expert, name] for name in projections(view)}
            truncate(view, calibration.stats.layers[view.name], expert, wanted)
    return 2 * (rest + sum(m.cost(rank) for m, rank in zip(matrices, ranks, strict=True)))
