"""Merges of a layer's experts into one base, and ways to store that base (the paper's Tables 5 and 6)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.quality.variants.layer import Base, Layer
from benchmarks.study import stored
from d2moe_ext import ops
from d2moe_ext.budget import kept_columns
from d2moe_ext.config import Merge
from d2moe_ext.layer_compression import RIDGE
from d2moe_ext.merge import merge_experts, prune_columns

Merger = Callable[[Layer, str], Tensor]
"""``merger(layer, group)``: the merged base, ``[out, in]`` float32."""

BaseCompressor = Callable[[Layer, str, Tensor], Base]
"""``compressor(layer, group, merged)``."""

TIES_DENSITY = 0.2
TIES_SCALE = 1.0
REGMEAN_OFF_DIAGONAL = 0.9


def weighted_mean(merge: Merge) -> Merger:
    """The package's own merges; ``fisher`` is the paper's."""

    def merged(layer: Layer, group: str) -> Tensor:
        return merge_experts(lambda expert: layer.weight(group, expert), group, layer.stats, merge)[0]

    return merged


def ties(layer: Layer, group: str) -> Tensor:
    """TIES: trim, elect the sign, mean of those that agree.

    Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023 (arXiv 2306.01708). Its task
    vectors are taken from a common pretrained ancestor. Experts have none that is known, so their plain mean stands for it.
    Of each expert's vector the largest fifth by magnitude stays, counted per weight matrix; the scale is 1.
    """
    weights = torch.stack([layer.weight(group, expert) for expert in layer.experts])
    return ties_merge(weights, TIES_DENSITY, TIES_SCALE)


def ties_merge(weights: Tensor, density: float, scale: float) -> Tensor:
    """``[n, out, in]`` to ``[out, in]``: the mean plus ``scale`` times the disjoint mean of what ``density`` leaves."""
    mean = weights.mean(0)
    vectors = weights - mean
    kept = max(1, int(density * mean.numel()))
    flat = vectors.flatten(1)
    top = flat.abs().topk(kept, dim=1).indices
    trimmed = torch.zeros_like(flat).scatter_(1, top, flat.gather(1, top)).view_as(vectors)
    elected = trimmed.sum(0).sign()
    agree = (trimmed.sign() == elected) & (trimmed != 0)
    merged = (trimmed * agree).sum(0) / agree.sum(0).clamp_min(1)
    return mean + scale * merged


def regmean(layer: Layer, group: str) -> Tensor:
    """RegMean: the base whose outputs are nearest to the experts' on their own inputs, in float64.

    Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023 (arXiv 2212.09849):
    ``W_b = (Σ W G) (Σ G)⁻¹`` with the off-diagonals of every Gram scaled by 0.9, its authors' usual choice. Grams are sums
    over tokens, so an expert weighs as many tokens as it saw; one that saw none has no say.
    """
    stats = layer.stats
    grams = stats.gram_down if group == "down" else stats.gram_gate_up
    seen = [expert for expert in layer.experts if int(stats.tokens[expert])]
    weights = torch.stack([layer.weight(group, expert) for expert in layer.experts]).double()
    if not seen:
        return weights.mean(0).float()
    return regmean_merge(weights[seen], grams[seen], REGMEAN_OFF_DIAGONAL, weights.mean(0)).float()


def regmean_merge(weights: Tensor, grams: Tensor, off_diagonal: float, unseen: Tensor) -> Tensor:
    """``[n, out, in]`` and ``[n, in, in]``, float64, to ``[out, in]``; inputs always 0 take ``unseen``'s."""
    diagonals = torch.diag_embed(grams.diagonal(dim1=1, dim2=2))
    scaled = off_diagonal * grams + (1 - off_diagonal) * diagonals
    total, right = scaled.sum(0), (weights @ scaled).sum(0)
    dead = total.diagonal() == 0
    total = total + dead.double().diag()
    right = torch.where(dead, unseen, right)
    return torch.linalg.solve(total, right.T).T


def semi_dynamic(sparsity: float, dynamic: bool = True) -> BaseCompressor:
    """The paper's: half of the pruned columns for good, half for the batch at hand (Algorithm 3).

    Args:
        sparsity: share of the columns to prune.
        dynamic: False: all of them for good, so that fewer are stored.
    """

    def compress(layer: Layer, group: str, merged: Tensor) -> Base:
        inputs = merged.shape[1]
        kept, keep = kept_columns(inputs, sparsity, dynamic)
        pruned = prune_columns(merged[None], layer.energy(group), kept)
        columns = pruned.columns[0] if kept < inputs else None
        return Base(merged, stored(pruned.stored[0]), columns, keep, merged.shape[0] * kept)

    return compress


def truncated_svd(sparsity: float) -> BaseCompressor:
    """A base of low rank with at most the parameters that :func:`semi_dynamic` stores at ``sparsity``.

    It is truncated in the norm of what the base sees: for down that is the sum of the experts' gated activations.
    """

    def compress(layer: Layer, group: str, merged: Tensor) -> Base:
        out, inputs = merged.shape
        rank = min(out * kept_columns(inputs, sparsity)[0] // (out + inputs), out, inputs)
        u, v, _, _ = ops.whitened_svd(merged.double()[None], rank, layer.base_gram(group)[None], None, RIDGE)
        low_rank = stored(u[0].float()) @ stored(v[0].float())
        return Base(merged, low_rank, None, inputs, rank * (out + inputs))

    return compress
