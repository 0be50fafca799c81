"""Draws the diagnostics of one model and puts them into sentences; follows the paper's Figures 1, 2, 5 and 6."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.quality.diagnostics import CURVE_POINTS, GROUPS

_GROUP_TITLES = {"gate_up": "gate and up", "down": "down"}
_PART_COLOURS = {"experts": "#000000", "base": "#0072B2", "deltas": "#D55E00"}
MOST_LAYERS = 6


def draw_diagnostics(record: dict[str, Any], folder: Path) -> list[Path]:
    """Draw ``KIND_MODEL.png`` for experts, energy, factors and layers."""
    drawings = {
        "experts": _heat_maps(record, {"CKA of experts": "cka"}),
        "energy": _energy(record),
        "factors": _heat_maps(record, {"CKA of the deltas' U": "cka_u", "CKA of the deltas' V": "cka_v"}),
        "layers": _sensitivity(record),
    }
    paths = []
    for kind, figure in drawings.items():
        paths.append(folder / f"{kind}_{record['model']}.png")
        figure.savefig(paths[-1], dpi=100, metadata={"Software": None})
    return paths


def _shown(layers: Sequence[Any]) -> list[int]:
    """At most :data:`MOST_LAYERS` of them, the first and the last among them."""
    if len(layers) <= MOST_LAYERS:
        return list(range(len(layers)))
    return sorted({round(i * (len(layers) - 1) / (MOST_LAYERS - 1)) for i in range(MOST_LAYERS)})


def _heat_maps(record: dict[str, Any], kinds: dict[str, str]) -> Figure:
    layers = _shown(record["layers"])
    rows = [(title, key, group) for group in GROUPS for title, key in kinds.items()]
    figure = Figure(figsize=(1.9 * len(layers) + 1.2, 2.2 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(layers), squeeze=False)
    for axes_row, (title, key, group) in zip(grid, rows, strict=True):
        for axes, layer in zip(axes_row, layers, strict=True):
            image = axes.imshow(record["layers"][layer][group][key], vmin=0, vmax=1, cmap="viridis")
            axes.set_title(f"layer {layer}", fontsize=9)
            axes.tick_params(labelsize=7)
        axes_row[0].set_ylabel(f"{title},\n{_GROUP_TITLES[group]}", fontsize=8)
    figure.colorbar(image, ax=grid, shrink=0.6)
    return figure


def _energy(record: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(8, 6), layout="constrained")
    shares = [index / (CURVE_POINTS - 1) for index in range(CURVE_POINTS)]
    for axes_row, group in zip(figure.subplots(2, 2), GROUPS, strict=True):
        for axes, kind in zip(axes_row, ("plain", "whitened"), strict=True):
            for part, colour in _PART_COLOURS.items():
                curves = [layer[group]["energy"][part][kind] for layer in record["layers"]]
                mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
                axes.plot(shares, mean, label=part, color=colour)
            axes.set_title(f"{_GROUP_TITLES[group]}, {kind}", fontsize=10)
            axes.set_xlabel("rank, share of the full one")
            axes.set_ylabel("energy kept")
            axes.grid(True, alpha=0.3)
            axes.legend(loc="lower right")
    return figure


def _sensitivity(record: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(record["sensitivity"])), record["sensitivity"], color="#0072B2")
    axes.set_xticks(range(len(record["sensitivity"])))
    axes.set_xlabel("the only layer that is compressed")
    axes.set_ylabel("rise in log-perplexity")
    axes.grid(True, axis="y", alpha=0.3)
    return figure


def diagnostics_table(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of a table with the numbers behind the images, one line per layer."""
    head = ["layer"]
    for group in GROUPS:
        title = _GROUP_TITLES[group]
        head += [f"CKA of experts, {title}", "of U", "of V"]
    head.append("rise, this layer alone")
    lines = []
    for index, (layer, rise) in enumerate(zip(record["layers"], record["sensitivity"], strict=True)):
        means = [_mean(layer[group][key]) for group in GROUPS for key in ("cka", "cka_u", "cka_v")]
        lines.append([str(index), *(f"{mean:.3f}" for mean in means), f"{rise:.4f}"])
    return head, lines


def _mean(matrix: list[list[float]]) -> float:
    """Over pairs of different experts."""
    count = len(matrix)
    return (sum(map(sum, matrix)) - sum(matrix[i][i] for i in range(count))) / (count * (count - 1))
