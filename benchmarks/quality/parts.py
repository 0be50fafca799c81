"""The parts of the study: which methods stand in one table, what of the paper it follows, and at which ratios it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.quality.methods import BASELINES
from benchmarks.quality.remarks import ahead_of_default, lowest, steps
from benchmarks.quality.results import Source

if TYPE_CHECKING:
    from benchmarks.quality.summary import Summary

ALL_RATIOS = (0.4, 0.5, 0.6, 0.7, 0.75)
TWO_RATIOS = (0.4, 0.6)


@dataclass(frozen=True)
class Line:
    """One line of a table.

    Attributes:
        method: its name in the registry.
        label: what the table calls it; empty: the method's name.
        samples: calibration windows, None for the study's own number.
        source: what it is calibrated on.
    """

    method: str
    label: str = ""
    samples: int | None = None
    source: Source = "calibration"

    @property
    def name(self) -> str:
        return self.label or self.method


@dataclass(frozen=True)
class Part:
    """A table of the document.

    Attributes:
        title: its heading.
        source: what of the paper it follows, or why it is there.
        lines: its methods.
        ratios: what it runs at unless the command says otherwise.
        text: makes the sentences below its tables from the results, the lines and the ratios that were run.
    """

    title: str
    source: str
    lines: tuple[Line, ...]
    ratios: tuple[float, ...]
    text: Callable[[Summary, Sequence[Line], Sequence[float]], list[str]] = lowest


def _lines(*methods: str) -> tuple[Line, ...]:
    return tuple(Line(method) for method in methods)


PARTS: dict[str, Part] = {
    "default": Part(
        "The default against the paper's pipeline",
        "The paper's pipeline is D2-MoE as published: 10 % of the base's columns pruned, Fisher merge, whitened SVD, separate "
        "gate and up, the same rank everywhere, deltas taken before pruning.",
        _lines("paper", "default"),
        ALL_RATIOS,
    ),
    "merge": Part(
        "How the experts are merged",
        "Follows the paper's Table 5.",
        (Line("paper", "Fisher"), *_lines("paper, n·Fisher", "paper, frequency", "paper, mean")),
        TWO_RATIOS,
    ),
    "decomposition": Part(
        "How the deltas are decomposed",
        "Follows the paper's Table 6.",
        (Line("paper", "whitened"), *_lines("paper, activation-aware", "paper, plain")),
        TWO_RATIOS,
    ),
    "samples": Part(
        "How much calibration text",
        "Follows the paper's Table 8.",
        tuple(Line("paper", f"{samples} windows", samples=samples) for samples in (16, 32, 64, 128)),
        (0.6,),
    ),
    "source": Part(
        "Which calibration text",
        "Follows the paper's Table 9.",
        (Line("paper", "the model's own domain"), Line("paper", "out of the domain", source="out")),
        TWO_RATIOS,
    ),
    "beyond": Part(
        "Beyond the paper",
        "Each line adds to the one above it.",
        _lines(
            "paper",
            "fold",
            "fold, joint",
            "fold, joint, two-sided",
            "fold, joint, two-sided, global",
            "fold, joint, two-sided, global, 2 bases",
        ),
        ALL_RATIOS,
        steps,
    ),
    "rivals": Part(
        "Other ways to make a model smaller",
        "Each written anew from its paper, on the same calibration text and at the same stored bytes.",
        _lines("paper", "default", *BASELINES),
        ALL_RATIOS,
        ahead_of_default,
    ),
}
