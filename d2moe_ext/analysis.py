"""Diagnostics of a model's experts: how alike they are, and how much of them a low rank keeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def linear_cka(a: Tensor, b: Tensor) -> float:
    """Linear centred kernel alignment of ``[n, p]`` and ``[n, q]``, from 0 to 1, in float64."""
    return float(cka_matrix([a, b])[0, 1])


def cka_matrix(weights: Sequence[Tensor]) -> Tensor:
    """:func:`linear_cka` of every pair of E matrices ``[n, p_e]``: ``[E, E]`` float64."""
    kernels = []
    for weight in weights:
        centred = weight.double() - weight.double().mean(0)
        kernel = (centred @ centred.T).flatten()
        kernels.append(kernel / kernel.norm().clamp_min(torch.finfo(torch.float64).tiny))
    stack = torch.stack(kernels)
    return (stack @ stack.T).clamp(0, 1)


def energy_retention(singular_values: Tensor) -> Tensor:
    """``Σ_{i≤r} σ_i² / Σ σ_i²`` for r = 1 … n of ``[..., n]`` descending singular values, float64."""
    energy = singular_values.double().square()
    return energy.cumsum(-1) / energy.sum(-1, keepdim=True)
