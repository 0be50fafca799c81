"""Time against tokens, a panel for each shape and dtype; and the sweeps of growth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.layer.growth import exponents
from benchmarks.performance.records import Row

# The colours of Okabe and Ito, which people with colour-blind eyes can tell apart.
_STYLES = {
    "uncompressed": ("#0072B2", "s"),
    "quality 0.6": ("#D55E00", "^"),
    "throughput 0.6, dynamic": ("#009E73", "v"),
}
_BEST_HF = ("#000000", "o")
_COLOURS = {"compressed": "#D55E00", "uncompressed": "#0072B2"}


def draw_layers(record: dict[str, Any], path: Path) -> None:
    """Best HF contender and some of ours against tokens, their floors dashed."""
    rows: list[Row] = [row for row in record["rows"] if row["group"] == 0 or row["kind"] == "native"]
    shapes, dtypes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("shape", "dtype"))
    figure = Figure(figsize=(3.6 * len(shapes), 3.4 * len(dtypes)), layout="constrained")
    panels = figure.subplots(len(dtypes), len(shapes), squeeze=False)
    for line, dtype in zip(panels, dtypes, strict=True):
        for axes, shape in zip(line, shapes, strict=True):
            _draw_panel(axes, [row for row in rows if (row["shape"], row["dtype"]) == (shape, dtype)])
            axes.set_title(f"{shape}, {dtype}")
    panels[0][0].legend(fontsize="small")
    _save(figure, path)


def _draw_panel(axes: Axes, rows: list[Row]) -> None:
    best: dict[int, Row] = {}
    for row in rows:
        if row["kind"] == "hf" and row["median_ms"] is not None:
            known = best.get(row["tokens"])
            best[row["tokens"]] = row if known is None or row["median_ms"] < known["median_ms"] else known
    _line(axes, list(best.values()), "best of transformers", *_BEST_HF)
    for name, style in _STYLES.items():
        found = {row["tokens"]: row for row in rows if row["contender"] == name and row["median_ms"] is not None}
        _line(axes, list(found.values()), name, *style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("ms; floors dashed")
    axes.grid(True, which="major", alpha=0.3)


def _line(axes: Axes, rows: list[Row], label: str, colour: str, marker: str) -> None:
    if not rows:
        return
    tokens = [row["tokens"] for row in rows]
    axes.plot(tokens, [row["median_ms"] for row in rows], label=label, color=colour, marker=marker, markersize=4)
    axes.plot(tokens, [row["floor_ms"] for row in rows], color=colour, linestyle="--", linewidth=0.8)


def draw_growth(record: dict[str, Any], path: Path) -> None:
    """A panel for each swept size: time, and the floor dashed, of the first dtype."""
    fits = exponents(record["rows"])
    fits = [fit for fit in fits if fit["dtype"] == fits[0]["dtype"]]
    swept = list(dict.fromkeys(fit["swept"] for fit in fits))
    figure = Figure(figsize=(3.6 * max(1, len(swept)), 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, max(1, len(swept)), squeeze=False)[0], swept, strict=False):
        for fit in (fit for fit in fits if fit["swept"] == name):
            values, colour = [row["value"] for row in fit["points"]], _COLOURS[fit["contender"]]
            label = f"{fit['contender']}: {fit['time']:.2f}, floor {fit['floor']:.2f}"
            axes.plot(values, [row["median_ms"] for row in fit["points"]], color=colour, marker="o", markersize=4, label=label)
            axes.plot(values, [row["floor_ms"] for row in fit["points"]], color=colour, linestyle="--", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(name)
        axes.set_ylabel("ms; floors dashed")
        axes.legend(fontsize="small", title="exponents", title_fontsize="small")
        axes.grid(True, which="major", alpha=0.3)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the drawing library's version, equal results give equal files.
    figure.savefig(path, dpi=120, metadata={"Software": None})
