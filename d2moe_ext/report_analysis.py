"""The tables of ``d2moe analyze``, from the dictionary that ``--json`` prints. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from d2moe_ext.report import plain_table

_TOP_SHARES = ("top 10 %", "top 25 %", "top 50 %")
_Layer = dict[str, Any]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _summary(layers: Sequence[_Layer]) -> Table:
    """A row a diagnostic: its mean over the layers, and the layer that makes compression hardest."""
    table = plain_table("Diagnostics", ("", "mean", "worst", "in layer"))
    low, high = min, max
    rows: list[tuple[str, Callable[[_Layer], float], Callable[..., _Layer]]] = [
        (f"CKA between experts, {name} (independent: {layers[0]['cka_independent'][group]:.2f})", _cka(group), low)
        for group, name in (("gate_up", "gate and up"), ("down", "down"))
    ]
    # As many bases as experts explain everything.
    rows += [
        (f"output energy explained by {bases} base{'s' if bases > '1' else ''}", _explained(bases), low)
        for bases in list(layers[0]["explained_by_bases"])[:-1]
    ]
    rows += [
        ("lowest 30 % of the base's columns, share of Σ C_j²", lambda layer: _mean(list(layer["low_columns"].values())), high),
        ("least used expert, share of tokens", lambda layer: min(layer["routing"]["shares"]), low),
        ("most used expert, share of tokens", lambda layer: max(layer["routing"]["shares"]), high),
        ("experts that no token reached", lambda layer: len(layer["routing"]["unreached"]), high),
        ("routing entropy, 1 is uniform", lambda layer: layer["routing"]["entropy"], low),
    ]
    for label, value, worst in rows:
        layer = worst(layers, key=value)
        table.add_row(label, f"{_mean([value(layer) for layer in layers]):.3f}", f"{value(layer):.3f}", layer["name"])
    return table


def _cka(group: str) -> Callable[[_Layer], float]:
    return lambda layer: layer["cka"][group]


def _explained(bases: str) -> Callable[[_Layer], float]:
    return lambda layer: layer["explained_by_bases"][bases]


def _retention(layers: Sequence[_Layer]) -> Table:
    """Paper, eq. 12: where the singular values' energy lies."""
    table = plain_table("Energy in the largest singular values", ("", *_TOP_SHARES, "least in the top 25 %, in layer"))
    for part in ("experts", "base", "deltas"):
        for kind in ("plain", "whitened"):
            shares = [layer["retention"][part][kind] for layer in layers]
            means = [f"{_mean(column):.3f}" for column in zip(*shares, strict=True)]
            least = _least([share[1] for share in shares])
            table.add_row(f"{part}, {kind}", *means, f"{shares[least][1]:.3f}, {layers[least]['name']}")
    return table


def _least(values: Sequence[float]) -> int:
    return min(range(len(values)), key=values.__getitem__)


def _layers(layers: Sequence[_Layer]) -> Table:
    columns = ("CKA gate/up", "CKA down", "1 base explains", "deltas top 25 %", "least used", "most used", "unreached")
    table = plain_table("Layers", ("layer", *columns))
    table.columns[0].no_wrap, table.columns[0].overflow = True, "fold"
    for layer in layers:
        routing = layer["routing"]
        values = [layer["cka"]["gate_up"], layer["cka"]["down"], layer["explained_by_bases"]["1"]]
        values += [layer["retention"]["deltas"]["whitened"][1], min(routing["shares"]), max(routing["shares"])]
        table.add_row(layer["name"], *(f"{value:.3f}" for value in values), str(len(routing["unreached"])))
    return table


def _predictions(advice: dict[str, Any]) -> Table:
    """Ratio by number of bases; the worst layer is that of the recommended number."""
    counts = sorted({entry["num_bases"] for entry in advice["predictions"]})
    errors = {(entry["ratio"], entry["num_bases"]): entry for entry in advice["predictions"]}
    names = [f"{count} base{'s' if count > 1 else ''}" for count in counts]
    table = plain_table("Expected relative error of the experts' outputs", ("ratio", *names, "worst layer"))
    for ratio in sorted({ratio for ratio, _ in errors}):
        cells = [errors[ratio, count]["error"] for count in counts]
        if all(error is None for error in cells):
            continue
        worst = errors[ratio, advice["num_bases"]]
        place = "" if worst["error"] is None else f"{worst['worst_error']:.3f}, {worst['worst_layer']}"
        table.add_row(f"{ratio}", *("" if error is None else f"{error:.3f}" for error in cells), place)
    return table


def analysis_tables(record: dict[str, Any]) -> RenderableType:
    """What ``d2moe analyze`` prints."""
    layers, advice, calibration = record["layers"], record["advice"], record["calibration"]
    chosen = {"num_bases": "--num-bases", "ratio": "--ratio", "preset": "--preset"}
    lines = [
        f"{option} {advice[name]}. {advice['reasons'][name]}" for name, option in chosen.items() if name in advice["reasons"]
    ]
    notes = (
        f"Calibrated on {calibration['samples']} windows of {calibration['seqlen']} tokens. The errors are those of truncation "
        "with whitened deltas and uniform ranks, the mean over layers and projections; an empty cell cannot be reached. The "
        f"recommendation is a heuristic; its thresholds were chosen on {advice['calibrated_on']}, where an error of "
        f"{advice['thresholds']['largest_error']} went with a log-perplexity 0.10 to 0.15 higher."
    )
    tables = (_summary(layers), _retention(layers), _layers(layers), _predictions(advice))
    return Group(*tables, Text("Recommended\n", style="bold"), Text("\n".join(lines) + "\n"), Text(notes))
