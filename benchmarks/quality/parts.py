"""The parts of the study: which methods stand in one table, what of the paper it follows, and at which ratios it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.quality.methods import BASELINES, BEYOND
from benchmarks.quality.remarks import ahead_of_default, lowest, steps
from benchmarks.quality.results import Source
from benchmarks.quality.retired import RETIRED

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
        "Follows the paper's Table 5. TIES takes its task vectors from the experts' plain mean, as they have no pretrained "
        "ancestor; RegMean is solved in float64, with the off-diagonals of its Grams scaled by 0.9.",
        (
            Line("paper", "Fisher"),
            *_lines("paper, n·Fisher", "paper, frequency", "paper, mean"),
            Line("merge: TIES", "TIES"),
            Line("merge: RegMean", "RegMean"),
        ),
        TWO_RATIOS,
    ),
    "base": Part(
        "How the base is stored",
        "Follows the paper's Table 6. Static prunes for good what the paper prunes half for good and half per batch, so it "
        "stores fewer columns and its deltas get the difference; the truncated SVD has as many parameters as semi-dynamic.",
        (
            Line("paper", "semi-dynamic"),
            Line("base: static", "static"),
            Line("base: truncated SVD", "truncated SVD"),
            Line("base: unpruned", "unpruned"),
        ),
        TWO_RATIOS,
    ),
    "decomposition": Part(
        "How the deltas are stored",
        "Follows the paper's Table 6. Magnitude pruning keeps whole columns, as single elements would each need an index.",
        (
            Line("paper", "whitened SVD"),
            Line("paper, activation-aware", "activation-aware SVD"),
            Line("paper, plain", "plain SVD"),
            Line("delta: magnitude pruning", "magnitude pruning"),
        ),
        TWO_RATIOS,
    ),
    "split": Part(
        "What the base gets and what the deltas",
        "Follows the paper's Table 7: the share s of the base's columns that is pruned, half of it per batch; what the base "
        "does not store the deltas do.",
        (
            Line("base: unpruned", "s = 0.0"),
            Line("paper", "s = 0.1"),
            *(Line(f"split: s = {sparsity}", f"s = {sparsity}") for sparsity in (0.2, 0.4, 0.6, 0.8)),
        ),
        TWO_RATIOS,
    ),
    "trim": Part(
        "Trimming the deltas of little-used experts",
        "Follows the paper's Figure 4: the experts of each layer with the fewest calibration tokens lose their deltas. Here "
        "the freed bytes go to the other experts' ranks, in single steps, where the paper lets the ratio rise.",
        (Line("paper", "none"), *(Line(f"trim: {count}", f"{count} per layer") for count in (1, 2, 4, 6))),
        TWO_RATIOS,
    ),
    "factors": Part(
        "Factors shared between experts",
        "Follows the paper's Table 11, with the parameters saved spent on rank: one V for all experts of a layer from their "
        "mean Gram, one U weighed by tokens, and both with a small matrix per expert between them.",
        (
            Line("paper", "own U, own V"),
            Line("factors: shared V", "shared V"),
            Line("factors: merged U", "merged U"),
            Line("factors: shared V, merged U", "shared V, merged U"),
        ),
        TWO_RATIOS,
    ),
    "layers": Part(
        "Ranks by the layers' sensitivity",
        "Follows the paper's Figure 6: ranks in proportion to the square root of what compressing each layer alone adds to the "
        "loss on calibration text, at the same total bytes.",
        (Line("paper", "the same everywhere"), Line("layers: adaptive", "by sensitivity")),
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
    "steps": Part(
        "From the paper to the default",
        "Each line adds to the one above it; the last lets columns and ranks compete, where the lines before prune 5 % of the "
        "bases' columns for good, as the paper does.",
        _lines(
            "paper",
            "fold",
            "fold, joint",
            "fold, joint, two-sided",
            "fold, joint, two-sided, global",
            "fold, joint, two-sided, global, alternated",
            "fold, joint, two-sided, global, alternated, gauge-fixed",
            "default",
        ),
        (0.6, 0.75),
        steps,
    ),
    "beyond": Part(
        "Around the default",
        "Each line changes one thing of the default, or adds one to it. 8-bit factors change how numbers are stored and are "
        "not compared with the others.",
        _lines("default", *BEYOND),
        (0.6,),
    ),
    "retired": Part(
        "Ideas that were left out",
        "Each changes one thing of the default as it was before gauge-fixed factors, the first line. Either it did not lower "
        "the rise on both models by more than the seeds' spread, or an option that stayed does better: sequential calibration "
        "as it is, 8-bit factors without 8-bit bases. Their code is gone.",
        _lines(*RETIRED),
        (0.6,),
    ),
    "rivals": Part(
        "Other ways to make a model smaller",
        "Each written anew from its paper, on the same calibration text and at the same stored bytes.",
        _lines("paper", "default", *BASELINES),
        TWO_RATIOS,
        ahead_of_default,
    ),
}
