"""The rise in log-perplexity against the ratio, as one image per model."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from benchmarks.quality.methods import BASELINES
from benchmarks.quality.parts import Line
from benchmarks.quality.summary import DOMAINS, Summary

BEST_RIVALS = 3
# The colours of Okabe and Ito, which people with colour-blind eyes can tell apart.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7")
_MARKERS = ("o", "s", "^", "v", "D")
_TITLES = {"in": "in domain", "out": "out of domain"}


def draw_rises(summary: Summary, folder: Path) -> list[Path]:
    """Draw ``rise_MODEL.png`` for every model: the paper's pipeline, the default and the best rivals, with error bars."""
    paths = []
    for model in summary.models:
        lines = [Line("paper"), Line("default"), *_best_rivals(summary, model)]
        figure = Figure(figsize=(9, 4), layout="constrained")
        for axes, domain in zip(figure.subplots(1, len(DOMAINS)), DOMAINS, strict=True):
            _draw(axes, summary, model, lines, domain)
        paths.append(folder / f"rise_{model}.png")
        # Without the drawing library's version, equal results give equal files.
        figure.savefig(paths[-1], dpi=120, metadata={"Software": None})
    return paths


def _best_rivals(summary: Summary, model: str) -> list[Line]:
    """Those with the least rise in domain at the largest ratio at which every measured rival was measured."""
    rises = {}
    for rival in map(Line, BASELINES):
        known = {r: rise.value for r in summary.ratios_of([rival]) if (rise := summary.rise(model, rival, r, "in"))}
        if known:
            rises[rival] = known
    common = set.intersection(*(set(known) for known in rises.values())) if rises else set()
    if not common:
        return []
    return sorted(rises, key=lambda rival: rises[rival][max(common)])[:BEST_RIVALS]


def _draw(axes: Axes, summary: Summary, model: str, lines: list[Line], domain: str) -> None:
    lowest = math.inf
    for line, colour, marker in zip(lines, _COLOURS, _MARKERS, strict=False):
        found = [(r, rise) for r in summary.ratios_of([line]) if (rise := summary.rise(model, line, r, domain))]
        if found:
            lowest = min(lowest, *(rise.value for _, rise in found))
            axes.errorbar(
                [ratio for ratio, _ in found],
                [rise.value for _, rise in found],
                yerr=[rise.spread or 0.0 for _, rise in found],
                label=line.name,
                color=colour,
                marker=marker,
                markersize=4,
                capsize=3,
            )
    # A method that lowers the perplexity has no place on a logarithmic axis.
    if 0 < lowest < math.inf:
        axes.set_yscale("log")
        for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatter(LogFormatter(minor_thresholds=(2, 0.5)))  # 0.05, not a power of ten
    axes.set_title(f"{model}, {_TITLES[domain]}")
    axes.set_xlabel("parameters removed, share of the whole model")
    axes.set_ylabel("rise in log-perplexity")
    axes.grid(True, which="both", alpha=0.3)
    if axes.has_data():
        axes.legend()
