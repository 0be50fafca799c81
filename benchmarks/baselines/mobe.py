"""MoBE: every expert's projection is its own left factor times a mixture of basis matrices that its layer shares.

Chen et al., "MoBE: Mixture-of-Basis-Experts for Compressing MoE-based LLMs", 2025 (arXiv 2508.05257):
``W_e = A_e · f(Σ_j α_{e,j} B_j)`` for gate and up. The paper fits this with Adam against the plain error of the weights, with a
nonlinear ``f``. Here nothing is trained by gradient descent: ``f`` is the identity, and the fit is alternating least squares in
the metric of the inputs that each expert saw (:mod:`benchmarks.baselines.basis_fit`).

The paper leaves down as it is. At a ratio of 0.6 that leaves nothing for gate and up, and at 0.4 it does worse (by 2 % in
perplexity on the shipped model's selection text), so down is treated the same way, transposed: its bases stand on the side of
the hidden state, which all experts share as they share it in gate and up, and its own factor on the side of its intermediate
channels, which mean different things in different experts.

How many bases a projection gets is left open by the paper: of several numbers of bases, each with the rank that its budget
then allows, the one with the smallest error after a few rounds is kept, per layer and projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.baselines.basis_fit import Mixture, Target, alternate, solve_left, start
from benchmarks.baselines.counts import budget_of
from benchmarks.baselines.ranks import expert_gram, pooled_gram
from benchmarks.baselines.routing import projection_weight, projections, round_as_stored, write_projection
from benchmarks.study import Calibration, model_parameters, stored
from d2moe_ext.adapters import ExpertsView, find_experts
from d2moe_ext.calibration import LayerStats
from d2moe_ext.layer_compression import SHRINKAGE_TOKENS

# Numbers of bases that are tried, as shares of the experts (0: one basis). As many bases as experts would share nothing; that
# fit starts better than six bases of eight, and ends worse.
BASES = (0, 0.25, 0.5, 0.75)
TRIAL_ROUNDS = 1
ROUNDS = 8


@dataclass
class Group:
    """One projection of one layer: what is fitted and what may be spent on it."""

    view: ExpertsView
    stats: LayerStats
    name: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """``E, P, Q``: experts, the experts' own side, the shared side."""
        out, inputs = projection_weight(self.view, self.name, 0).shape
        experts = self.view.layout.num_experts
        return (experts, inputs, out) if self.name == "down" else (experts, out, inputs)

    @property
    def parameters(self) -> int:
        """Of the projection of all experts."""
        experts, own, shared = self.shape
        return experts * own * shared

    def cost(self, num_bases: int, rank: int) -> int:
        """``A``, ``B`` and ``α`` together."""
        experts, own, shared = self.shape
        return rank * (experts * own + num_bases * shared) + experts * num_bases

    def rank_for(self, num_bases: int, parameters: float) -> int:
        """The largest rank within ``parameters``; 0 where none is."""
        experts, own, shared = self.shape
        fits = int((parameters - experts * num_bases) // (experts * own + num_bases * shared))
        return max(0, min(fits, own, shared))

    def target(self) -> Target:
        """The weights of all experts, down's transposed, with the metric on the side of their inputs.

        An expert's Gram is per token; it is scaled by its tokens, so that the fit minimises the error over the text.
        """
        pooled = pooled_gram(self.stats)
        grams, weights = [], []
        for expert in range(self.view.layout.num_experts):
            tokens = int(self.stats.tokens[expert]) + SHRINKAGE_TOKENS
            grams.append(expert_gram(self.stats, self.name, expert, pooled) * tokens)
            weight = projection_weight(self.view, self.name, expert).detach().double()
            weights.append(weight.T if self.name == "down" else weight)
        metric = torch.stack(grams)
        if self.name == "down":
            return Target(torch.stack(weights), left_metric=metric)
        return Target(torch.stack(weights), right_metric=metric)

    def write(self, target: Target, mixture: Mixture) -> None:
        """Put the rounded fit in the place of the weights; ``A`` is solved for again once ``α`` and ``B`` are rounded."""
        weights, bases = rounded(mixture.weights), rounded(mixture.bases)
        mixed = Mixture(mixture.left, weights, bases).mixed()
        product = (rounded(solve_left(target, mixed)) @ mixed).float()
        for expert, weight in enumerate(product):
            write_projection(self.view, self.name, expert, weight.T if self.name == "down" else weight)


def rounded(x: Tensor) -> Tensor:
    """As the file gives it back, in float64 for further use."""
    return stored(x.float()).double()


def choose_bases(group: Group, target: Target, parameters: float) -> int:
    """The number of bases whose fit within ``parameters`` is best after a few rounds."""
    trials = []
    for num_bases in sorted({max(1, round(share * group.shape[0])) for share in BASES}):
        rank = group.rank_for(num_bases, parameters)
        if rank > 0:
            _, errors = alternate(target, start(target, rank, num_bases), TRIAL_ROUNDS)
            trials.append((errors[-1], num_bases))
    if not trials:
        raise ValueError(f"mobe: the budget must hold rank 1 of {group.name} of {group.view.name}, got {int(parameters)}.")
    return min(trials)[1]


def _groups(views: list[ExpertsView], calibration: Calibration) -> Iterator[Group]:
    for view in views:
        for name in projections(view):
            yield Group(view, calibration.stats.layers[view.name], name)


@torch.no_grad()
def mobe(model: PreTrainedModel, calibration: Calibration, ratio: float) -> int:
    """Replace every expert's projections by mixtures of basis matrices, in place.

    Returns:
        Stored bytes of the whole model.

    Raises:
        ValueError: a ratio out of range or out of reach, or experts that are not one stacked module.
    """
    budget = budget_of(model, ratio) // 2
    views = find_experts(model)
    round_as_stored(model)
    if model_parameters(model) <= budget:
        return 2 * model_parameters(model)
    groups = list(_groups(views, calibration))
    available = sum(group.parameters for group in groups)
    within = budget - (model_parameters(model) - available)
    bases = [choose_bases(group, group.target(), within * group.parameters / available) for group in groups]
    ranks = [group.rank_for(m, within * group.parameters / available) for group, m in zip(groups, bases, strict=True)]
    spent = sum(group.cost(m, r) for group, m, r in zip(groups, bases, ranks, strict=True))
    for index, (group, num_bases) in enumerate(zip(groups, bases, strict=True)):
        step = group.cost(num_bases, ranks[index] + 1) - group.cost(num_bases, ranks[index])
        if spent + step <= within and ranks[index] < min(group.shape[1:]):
            ranks[index] += 1
            spent += step
    for group, num_bases, rank in zip(groups, bases, ranks, strict=True):
        target = group.target()
        mixture, _ = alternate(target, start(target, rank, num_bases), ROUNDS)
        group.write(target, mixture)
    return 2 * (model_parameters(model) - available + spent)
