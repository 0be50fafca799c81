"""Sequential calibration: each layer is fitted on what the compressed layers before it really produce.

With x̂ the input that a layer gets behind the compressed prefix and x the one it got in the original model, for the same
token,

    min over Ŵ of  Σ_t ‖B^½ (W x_t − Ŵ x̂_t)‖²   is, but for a constant,  ‖B^½ (W' − Ŵ) Ĝ^½‖²   with
    W' = W C Ĝ⁻¹,  C = Σ x x̂ᵀ,  Ĝ = Σ x̂ x̂ᵀ.

So the layer is compressed as ever, with W' for W and Ĝ for G. C and Ĝ both get the same multiple of Ĝ's shrinkage target, so
that W' tends to W where there are few tokens. Down sees its layer's compressed gate and up too. Left Grams, base sparsity
and ranks are those of the original statistics. The router is that of the model; which experts a token is counted for is
the original's choice (``teacher``) or that of the compressed prefix (``prefix``), whose expert's original output on x is
then the target. Cost: the alternations twice, and a forward pass as far as each layer; nothing more is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from benchmarks.quality.beyond.pipeline import Compressor, choose_sparsity, diagonal
from benchmarks.quality.beyond.storage import BFLOAT16, Storage
from benchmarks.quality.beyond.stored_layer import StoredLayer
from benchmarks.study import Calibration, Method
from d2moe_ext.adapters import ExpertsView, find_experts
from d2moe_ext.calibration import POOLED_SAMPLE, CalibrationStats, LayerStats, pairs_of
from d2moe_ext.config import CompressionConfig
from d2moe_ext.experts import D2MoEExperts
from d2moe_ext.hf import patch_model

# Tokens' worth of Ĝ's shrinkage target in the targets: with the package's 32 the targets learn the calibration text's own
# ways, which cost 9 % more out of domain on the shipped model at 0.75 and gained nothing in it.
TARGET_SHRINKAGE = 256

Routing = Literal["teacher", "prefix"]


@dataclass(frozen=True)
class Arrivals:
    """What reaches the experts of one layer: ``[T, H]``, ``[T, k]`` ids and ``[T, k]`` router weights."""

    hidden_states: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor


class _Reached(Exception):
    """Ends a forward pass at the layer that is looked at."""


@torch.no_grad()
def arrivals(model: PreTrainedModel, batches: Sequence[Tensor], view: ExpertsView) -> Arrivals:
    """Run ``model`` as far as the experts of ``view`` and keep what reaches them."""
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        calls.append((hidden_states, top_k_index, top_k_weights))
        raise _Reached

    with view.intercept(keep):
        for ids in batches:
            with suppress(_Reached):
                model(input_ids=ids, use_cache=False)
    return Arrivals(*(torch.cat(parts) for parts in zip(*calls, strict=True)))


def carried_over(weight: Tensor, cross: Tensor, gram: Tensor, anchor: Tensor) -> Tensor:
    """``W (C + A)(Ĝ + A)⁻¹``: what W does to x, as well as it can be done to x̂.

    Args:
        weight: ``[out, in]``.
        cross: ``[in, in]`` float64, ``Σ x x̂ᵀ``.
        gram: ``[in, in]`` float64, ``Σ x̂ x̂ᵀ``.
        anchor: ``[in, in]`` float64, positive definite: the larger, the nearer to W.

    Returns:
        ``[out, in]`` float32.
    """
    factor = torch.linalg.cholesky(gram + anchor)
    return torch.cholesky_solve((weight.double() @ (cross + anchor)).T, factor).T.float()


def _anchor(target: Tensor) -> Tensor:
    """A shrinkage target made safely definite."""
    return target + 1e-6 * target.diagonal().mean() * torch.eye(len(target), dtype=target.dtype)


class LayerFit:
    """One layer's targets and Grams behind the compressed prefix.

    Args:
        view: the layer's original experts.
        stats: the original statistics; tokens and Grams are taken anew.
        teacher: what reached the layer in the original model.
        prefix: what reaches it behind the compressed prefix, token by token.
        routing: whose choice of experts counts.
    """

    def __init__(self, view: ExpertsView, stats: LayerStats, teacher: Arrivals, prefix: Arrivals, routing: Routing) -> None:
        self.view, self.original = view, stats
        route = teacher if routing == "teacher" else prefix
        experts = range(view.layout.num_experts)
        self.tokens = [pairs_of(e, route.top_k_index, route.top_k_weights)[0] for e in experts]
        self.x, self.prefix_x = teacher.hidden_states, prefix.hidden_states
        self.targets = {
            "gate_up": [view.gate_up_weight(e).detach().float() for e in experts],
            "down": [view.down_weight(e).detach().float() for e in experts],
        }
        grams = [self.prefix_x[t].double().T @ self.prefix_x[t].double() for t in self.tokens]
        self.stats = replace(
            stats,
            tokens=torch.tensor([len(t) for t in self.tokens]),
            gram_gate_up=torch.stack(grams),
            gram_down=stats.gram_down.clone(),
            pooled_sample=self.prefix_x[:POOLED_SAMPLE],
        )

    def retarget_gate_up(self, shrinkage: float = TARGET_SHRINKAGE) -> None:
        """``W'`` of gate and up, from the layer's inputs."""
        grams = self.stats.gram_gate_up
        anchor = _anchor(shrinkage * grams.sum(0) / max(int(self.stats.tokens.sum()), 1))
        for expert, token in enumerate(self.tokens):
            if len(token):
                cross = self.x[token].double().T @ self.prefix_x[token].double()
                weight = self.targets["gate_up"][expert]
                self.targets["gate_up"][expert] = carried_over(weight, cross, grams[expert], anchor)

    def retarget_down(self, compressed: list[Tensor], shrinkage: float = TARGET_SHRINKAGE) -> None:
        """``W'`` and ``Ĝ`` of down, from what each expert's compressed gate and up ``[R, H]`` make of its inputs."""
        for expert, token in enumerate(self.tokens):
            if not len(token):
                token = torch.arange(len(self.stats.pooled_sample))
            bias = self.view.gate_up_bias(expert)
            h = self.view.apply_gate(linear(self.x[token], self.view.gate_up_weight(expert), bias)).double()
            prefix_h = self.view.apply_gate(linear(self.prefix_x[token], compressed[expert], bias)).double()
            gram = prefix_h.T @ prefix_h
            self.stats.gram_down[expert] = gram
            anchor = torch.eye(len(gram), dtype=gram.dtype) * gram.diagonal().mean() / len(token) * shrinkage
            weight = self.targets["down"][expert]
            self.targets["down"][expert] = carried_over(weight, h.T @ prefix_h, gram, _anchor(anchor))

    def target_view(self) -> ExpertsView:
        """The layer's view with the targets as its weights."""
        view = copy(self.view)
        gate_up, down = self.targets["gate_up"], self.targets["down"]
        view.gate_up_weight = lambda expert: gate_up[expert]  # type: ignore[method-assign]
        view.down_weight = lambda expert: down[expert]  # type: ignore[method-assign]
        return view


def _gate_up(layer: StoredLayer, expert: int, factors: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    """An expert's compressed gate and up, ``[R, H]`` float32."""
    base = layer.bases["gate_up"].masked(int(layer.stats.expert_to_base[expert])).double()
    parts = []
    for name, (u, v) in factors.items():
        ranks = layer.plan.ranks[name]
        start = sum(ranks[:expert])
        rows = slice(start, start + ranks[expert])
        parts.append(u[rows].T @ v[rows])
    return (base + torch.cat(parts)).float()


def compress_layer(
    fit: LayerFit, prepared: StoredLayer, within: bool = True, shrinkage: float = TARGET_SHRINKAGE
) -> D2MoEExperts:
    """One layer at its planned ranks: gate and up first, then down on what they compute.

    Args:
        prepared: says the layer's plan, configuration and class.
        within: down also makes up for its own layer's gate and up; else it is fitted to what the original ones compute.
    """
    fit.retarget_gate_up(shrinkage)
    layer = type(prepared)(fit.target_view(), fit.stats, prepared.config, prepared.plan)
    layer.bases.pop("down")
    _alternate(layer)
    upper = [name for name in layer.plan.ranks if name != "down"]
    factors = {name: layer.factor(name)[:2] for name in upper}
    experts = range(fit.view.layout.num_experts)
    gate_up = [_gate_up(layer, e, factors) if within else fit.view.gate_up_weight(e).detach() for e in experts]
    fit.retarget_down(gate_up, shrinkage)
    lower = type(prepared)(fit.target_view(), fit.stats, prepared.config, prepared.plan)
    lower.bases.pop("gate_up")
    _alternate(lower)
    lower.bases = {**layer.bases, **lower.bases}
    return lower.run()[0]


def _alternate(layer: StoredLayer) -> None:
    for _ in range(layer.config.alternations):
        layer.alternate()
    layer.round_bases()


@torch.no_grad()
def compress_sequentially(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    stats: CalibrationStats,
    ratio: float,
    storage: Storage = BFLOAT16,
    layer_class: type[StoredLayer] = StoredLayer,
    routing: Routing = "teacher",
    within: bool = True,
    shrinkage: float = TARGET_SHRINKAGE,
    **options: Any,
) -> int:
    """Compress ``model`` in place, layer by layer on its own compressed prefix; returns its stored bytes."""
    config = choose_sparsity(model, stats, CompressionConfig(ratio, **options), storage, layer_class)
    compressor = Compressor(model, stats, config, storage, layer_class)
    compressor.settle()
    teachers = [arrivals(model, batches, view) for view in find_experts(model)]
    for layer, teacher in zip(compressor.layers, teachers, strict=True):
        prefix = arrivals(model, batches, layer.view)
        fit = LayerFit(layer.view, stats.layers[layer.view.name], teacher, prefix, routing)
        experts = compress_layer(fit, layer, within, shrinkage)
        experts.backend = "native"
        layer.view.replace(experts)
    patch_model(model)
    return compressor.bytes


def sequential_method(
    storage: Storage = BFLOAT16, layer_class: type[StoredLayer] = StoredLayer, routing: Routing = "teacher", **options: Any
) -> Method:
    """:func:`compress_sequentially` with diagonal left Grams, as a method."""

    def method(model: PreTrainedModel, calibration: Calibration, ratio: float) -> int:
        stats = diagonal(calibration.stats)
        return compress_sequentially(model, calibration.batches, stats, ratio, storage, layer_class, routing, **options)

    return method
