"""What the figures show: how alike a model's experts are, how low their rank is, and which layers bear compression.

Everything is measured once, on the calibration of seed 0, and kept as JSON beside the rows, so that the document can be
written again without the model. Deltas are those of the paper's pipeline: against the Fisher-merged base before pruning.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.methods import PAPER_OPTIONS, paper_method
from benchmarks.quality.runner import Laboratory
from d2moe_ext import ops
from d2moe_ext.adapters import ExpertsView, find_experts
from d2moe_ext.analysis import cka_matrix, energy_retention
from d2moe_ext.budget import plan_compression
from d2moe_ext.calibration import LayerStats
from d2moe_ext.config import CompressionConfig
from d2moe_ext.evaluate import perplexity
from d2moe_ext.layer_compression import shrunk_down_gram, shrunk_gate_up_gram
from d2moe_ext.merge import merge_experts
from d2moe_ext.shapes import model_shapes

RATIO = 0.6
GROUPS = ("gate_up", "down")
# Points of a retention curve: ranks as shares of the full one.
CURVE_POINTS = 101


class _Group:
    """One layer's weights of one input group, their Fisher-merged base and the Gram matrices they are whitened with."""

    def __init__(self, view: ExpertsView, stats: LayerStats, name: str) -> None:
        self.name, self.view, self.stats = name, view, stats
        weight = view.down_weight if name == "down" else view.gate_up_weight
        experts = range(view.layout.num_experts)
        self.weights = torch.stack([weight(expert).detach().float() for expert in experts])
        self.base = merge_experts(weight, name, stats, "fisher")[0]
        pooled = stats.gram_gate_up.sum(0) / int(stats.tokens.sum())
        self.grams = torch.stack(
            [
                shrunk_down_gram(stats, expert) if name == "down" else shrunk_gate_up_gram(stats, pooled, expert)
                for expert in experts
            ]
        )

    @property
    def deltas(self) -> Tensor:
        """``[E, out, in]`` float32."""
        return self.weights - self.base

    def on_hidden_channels(self, weights: Tensor) -> list[Tensor]:
        """Each expert's weight with the hidden channels, which mean the same in every expert, as its rows."""
        return list(weights if self.name == "down" else weights.transpose(1, 2))

    def curve(self, matrices: Tensor, whitened: bool) -> list[float]:
        """Mean retained energy at :data:`CURVE_POINTS` shares of the full rank, from 0 to 1."""
        grams = self.grams if whitened else None
        sigma = ops.whitened_svd(matrices.double(), 0, grams)[2]
        retained = torch.cat([torch.zeros(len(sigma), 1), energy_retention(sigma)], dim=1).mean(0)
        places = torch.linspace(0, len(retained) - 1, CURVE_POINTS).round().long()
        return retained[places].tolist()

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """The deltas' whitened factors, ``[E, out, r]`` and ``[E, r, in]``."""
        return ops.whitened_svd(self.deltas.double(), rank, self.grams)[:2]


def measure_diagnostics(laboratory: Laboratory) -> dict[str, Any]:
    """The figures' data of one model, JSON-clean; see the keys of :func:`_layer` and ``sensitivity``."""
    calibration = laboratory.calibration(0, laboratory.sizes.samples, "calibration")
    model = laboratory.model
    plan = plan_compression(model_shapes(model), CompressionConfig(RATIO, **PAPER_OPTIONS))
    layers = []
    for view, layer in zip(find_experts(model), plan.layers, strict=True):
        ranks = {"gate_up": max(next(iter(layer.ranks.values()))), "down": max(layer.ranks["down"])}
        layers.append(_layer(view, calibration.stats.layers[view.name], ranks))
        laboratory.report(f"diagnostics of {view.name}")
    compressed = copy.deepcopy(model)
    paper_method()(compressed, calibration, RATIO)
    tokens, window = laboratory.judging["in"], laboratory.sizes.window
    return {
        "model": laboratory.blank.model,
        "judge": laboratory.blank.judge,
        "ratio": RATIO,
        "layers": layers,
        "sensitivity": layer_sensitivity(model, compressed, lambda m: perplexity(m, tokens, window=window).perplexity),
    }


def write_diagnostics(laboratory: Laboratory, folder: Path) -> None:
    """Measure and keep them as ``MODEL.figures.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    record = measure_diagnostics(laboratory)
    (folder / f"{record['model']}.figures.json").write_text(json.dumps(record, allow_nan=False) + "\n", encoding="utf-8")


def read_diagnostics(folder: Path) -> list[dict[str, Any]]:
    """What :func:`write_diagnostics` kept, model by model."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.figures.json"))]


@torch.no_grad()
def _layer(view: ExpertsView, stats: LayerStats, ranks: dict[str, int]) -> dict[str, Any]:
    """One layer's alignments ``[E][E]`` of experts and of their deltas' factors, and its retention curves."""
    record: dict[str, Any] = {"name": view.name}
    for name in GROUPS:
        group = _Group(view, stats, name)
        u, v = group.factors(ranks[name])
        parts = {"experts": group.weights, "base": group.base.expand_as(group.weights), "deltas": group.deltas}
        record[name] = {
            "cka": cka_matrix(group.on_hidden_channels(group.weights)).tolist(),
            "rank": ranks[name],
            "cka_u": cka_matrix(list(u)).tolist(),
            "cka_v": cka_matrix(list(v.transpose(1, 2))).tolist(),
            "energy": {
                part: {kind: group.curve(matrices, kind == "whitened") for kind in ("plain", "whitened")}
                for part, matrices in parts.items()
            },
        }
    return record


def layer_sensitivity(model: nn.Module, compressed: nn.Module, judge: Callable[[nn.Module], float]) -> list[float]:
    """The rise in log-perplexity where only one layer's experts are the compressed ones, layer by layer.

    Args:
        model: uncompressed; it is as it was at the end.
        compressed: a compressed copy of it.
        judge: a model's perplexity.
    """
    plain = math.log(judge(model))
    return [math.log(judge(mixed)) - plain for mixed in _one_layer_compressed(model, compressed)]


def _one_layer_compressed(model: nn.Module, compressed: nn.Module) -> Iterator[nn.Module]:
    for name in [view.name for view in find_experts(model)]:
        mixed = copy.deepcopy(model)
        view = next(view for view in find_experts(mixed) if view.name == name)
        view.replace(compressed.get_submodule(name))
        yield mixed
