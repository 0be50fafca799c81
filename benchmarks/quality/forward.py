"""What a compressed model's forward costs: prompts read and tokens generated, contenders in turn, float32."""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from d2moe_ext.evaluate import measure_speed
from d2moe_ext.hf import patch_model

if TYPE_CHECKING:
    from benchmarks.quality.runner import Laboratory

RATIO = 0.6
ROUNDS = 5
CONTENDERS = {
    "uncompressed": "uncompressed, transformers",
    "patched": "uncompressed, patched",
    "paper": "the paper's pipeline",
    "default": "default",
}


def forward_times(
    models: dict[str, nn.Module], measure: Callable[[nn.Module], Any], rounds: int
) -> dict[str, dict[str, float]]:
    """Medians over ``rounds`` of tokens per second, by model: ``prefill`` and ``generate``.

    Every round measures each model once, so that a machine that slows down slows all of them.
    """
    speeds: dict[str, list[Any]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            speeds[name].append(measure(model))
    return {
        name: {kind: statistics.median(getattr(speed, kind) for speed in found) for kind in ("prefill", "generate")}
        for name, found in speeds.items()
    }


def write_forward(laboratory: Laboratory, folder: Path) -> Path:
    """Time the uncompressed model, the paper's pipeline and the default; writes ``MODEL.forward.json`` into ``folder``."""
    calibration = laboratory.calibration(0, laboratory.sizes.samples, "calibration")
    models: dict[str, nn.Module] = {"uncompressed": laboratory.model, "patched": patch_model(copy.deepcopy(laboratory.model))}
    for name in ("paper", "default"):
        models[name] = copy.deepcopy(laboratory.model)
        laboratory.methods[name](models[name], calibration, RATIO)
    tokens = laboratory.judging["in"]
    times = forward_times(models, lambda model: measure_speed(model, tokens, repeats=1), ROUNDS)
    record = {"model": laboratory.blank.model, "ratio": RATIO, "rounds": ROUNDS, "times": times}
    path = folder / f"{laboratory.blank.model}.forward.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def read_forward(folder: Path) -> list[dict[str, Any]]:
    """The records in ``folder``, by model."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.forward.json"))]


def forward_table(records: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and lines: tokens per second of each contender, a pair of columns per model."""
    head = ["forward"]
    for record in records:
        head += [f"{record['model']}: prefill tok/s", "generate tok/s"]
    lines = []
    for name, label in CONTENDERS.items():
        times = [record["times"][name] for record in records]
        lines.append([label, *(f"{entry[kind]:,.0f}" for entry in times for kind in ("prefill", "generate"))])
    return head, lines
