"""Rows drawn together over seeds: means, spreads and shares of the paper's rise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.quality.parts import Line
from benchmarks.quality.results import UNCOMPRESSED, Results, Row, Sizes
from benchmarks.quality.retired import RETIRED
from benchmarks.study import Method, method_version

DOMAINS = ("in", "out")
PAPER = Line("paper")


@dataclass(frozen=True)
class Mean:
    """A mean over seeds; ``spread`` is the sample standard deviation (n - 1), None of a single seed."""

    value: float
    spread: float | None

    def __str__(self) -> str:
        return f"{self.value:.4f}" if self.spread is None else f"{self.value:.4f} ± {self.spread:.4f}"


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and sample standard deviation of at least one value."""
    return Mean(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


class Summary:
    """What a folder of results holds for one judge and one set of sizes.

    Args:
        results: all rows.
        judge: ``selection`` or ``test``.
        sizes: only rows of these sizes count; a line without a number of samples of its own takes this one's.
        methods: by name: rows of another version of a method do not count. Those of retired ones do.

    Raises:
        ValueError: no uncompressed model's row, or rows of one model from different weights or texts.
    """

    def __init__(self, results: Results, judge: str, sizes: Sizes, methods: Mapping[str, Method]) -> None:
        self.judge, self.sizes = judge, sizes
        versions = {UNCOMPRESSED: 1} | RETIRED | {name: method_version(method) for name, method in methods.items()}
        self.rows = [
            row
            for row in results.judged_by(judge)
            if (row.key.tokens, row.key.window) == (sizes.tokens, sizes.window)
            and versions.get(row.key.method) == row.key.version
            and (row.key.method == UNCOMPRESSED or row.key.seqlen == sizes.seqlen)
        ]
        self.plain = {row.key.model: row for row in self.rows if row.key.method == UNCOMPRESSED}
        self.models = sorted(self.plain)
        if not self.models:
            raise ValueError(f"--write needs rows judged by the {judge} text at these sizes in --results, got none.")
        for model in self.models:
            self._check_one_setting(model)

    def _check_one_setting(self, model: str) -> None:
        settings = {(row.key.weights, row.key.text_in, row.key.text_out) for row in self.rows if row.key.model == model}
        calibrations = {(row.key.source, row.key.text_calibration) for row in self.measured_on(model)}
        if len(settings) > 1 or len(calibrations) > len({source for source, _ in calibrations}):
            raise ValueError(f"--results must hold one choice of weights and texts for each model, got several for {model}.")

    def measured_on(self, model: str) -> list[Row]:
        """The rows of compressed models."""
        return [row for row in self.rows if row.key.model == model and row.key.method != UNCOMPRESSED]

    def rows_of(self, model: str, line: Line, ratio: float) -> list[Row]:
        """A line's rows, by seed."""
        wanted = (line.method, ratio, line.samples or self.sizes.samples, line.source)
        found = [
            row for row in self.measured_on(model) if (row.key.method, row.key.ratio, row.key.samples, row.key.source) == wanted
        ]
        return sorted(found, key=lambda row: row.key.seed)

    def measured(self, model: str, line: Line, ratio: float) -> list[Row]:
        """Those that did not fail."""
        return [row for row in self.rows_of(model, line, ratio) if row.failure is None]

    def ratios_of(self, lines: Sequence[Line]) -> list[float]:
        """The ratios at which any of the lines was tried on any model."""
        every = {row.key.ratio for row in self.rows if row.key.method != UNCOMPRESSED}
        return [r for r in sorted(every) if any(self.rows_of(m, line, r) for m in self.models for line in lines)]

    def rise(self, model: str, line: Line, ratio: float, domain: str) -> Mean | None:
        """The mean rise in log-perplexity, None where nothing was measured."""
        values = [_rise(row, domain) for row in self.measured(model, line, ratio)]
        return mean_of(values) if values else None

    def share(self, model: str, line: Line, ratio: float, domain: str) -> float | None:
        """The mean rise over the mean rise of the paper's pipeline at the same ratio."""
        rise, paper = self.rise(model, line, ratio, domain), self.rise(model, PAPER, ratio, domain)
        if rise is None or paper is None or paper.value <= 0:
            return None
        return rise.value / paper.value

    def difference(self, model: str, line: Line, other: Line, ratio: float, domain: str) -> Mean | None:
        """The mean over shared seeds of how much further ``line`` rises than ``other``."""
        mine, others = (
            {row.key.seed: _rise(row, domain) for row in self.measured(model, which, ratio)} for which in (line, other)
        )
        shared = sorted(mine.keys() & others.keys())
        return mean_of([mine[seed] - others[seed] for seed in shared]) if shared else None


def _rise(row: Row, domain: str) -> float:
    rise = row.rise_in if domain == "in" else row.rise_out
    if rise is None or not math.isfinite(rise):
        raise ValueError(f"--results must hold finite rises, got {rise} for {row.key.method} on {row.key.model}.")
    return rise
