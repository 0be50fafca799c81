"""What should hold, held against the results: orders of methods, and the default's share of the paper's rise."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.quality.methods import BASELINES
from benchmarks.quality.parts import TWO_RATIOS, Line
from benchmarks.quality.summary import DOMAINS, Mean, Summary

NEAR = 0.005
_RELATIONS = {"<": operator.lt, "≤": operator.le}


@dataclass(frozen=True)
class Verdict:
    """One line of the section: a claim on one model, at one ratio, in one domain."""

    claim: str
    model: str
    ratio: float
    domain: str
    numbers: str
    verdict: str


@dataclass(frozen=True)
class Order:
    """Mean rises in an order, e.g. ``Order("Fisher < frequency ≤ mean", (a, b, c), ("<", "≤"), (0.4, 0.6))``."""

    claim: str
    methods: tuple[str, ...]
    relations: tuple[str, ...]
    ratios: tuple[float, ...] = TWO_RATIOS

    def verdicts(self, summary: Summary) -> Iterator[Verdict]:
        for model in summary.models:
            for ratio in self.ratios:
                for domain in DOMAINS:
                    rises = [summary.rise(model, Line(method), ratio, domain) for method in self.methods]
                    yield Verdict(self.claim, model, ratio, domain, *self._judge(rises))

    def _judge(self, rises: list[Mean | None]) -> tuple[str, str]:
        known = [rise for rise in rises if rise is not None]
        if len(known) < len(rises):
            return "", "not measured"
        numbers = "; ".join(map(str, known))
        pairs = list(zip(known, self.relations, known[1:], strict=False))
        wrong = [(a, b) for a, relation, b in pairs if not _RELATIONS[relation](a.value, b.value)]
        if not wrong:
            return numbers, "holds"
        gap = max(a.value - b.value for a, b in wrong)
        within = all(a.value - b.value <= max(a.spread or 0.0, b.spread or 0.0) for a, b in wrong)
        return numbers, f"does not hold, by {gap:.4f}" + (", less than the spread" if within else "")


@dataclass(frozen=True)
class Share:
    """A method's mean rise is at most ``limit`` of the paper's."""

    method: str
    ratio: float
    domain: str
    limit: float

    def verdicts(self, summary: Summary) -> Iterator[Verdict]:
        claim = f"{self.method}: at most {self.limit:.0%} of the paper's rise".replace("%", " %")
        for model in summary.models:
            paper = self._paper_ratio(summary, model)
            share = self._share(summary, model, paper)
            numbers = "" if share is None else f"{100 * share:.1f} %"
            if share is not None and paper != self.ratio:
                numbers += f" of the paper's rise at {paper}, as {self.ratio} is out of its reach"
            verdict = "not measured" if share is None else "holds" if share <= self.limit else "does not hold"
            yield Verdict(claim, model, self.ratio, self.domain, numbers, verdict)

    def _paper_ratio(self, summary: Summary, model: str) -> float:
        """The ratio whose paper row is compared with: the same one, or where that failed the nearest measured below it,
        which lets the paper's pipeline store more."""
        paper = Line("paper")
        near = [r for r in summary.ratios_of([paper]) if 0 <= self.ratio - r <= NEAR]
        known = [r for r in near if summary.rise(model, paper, r, self.domain) is not None]
        return max(known, default=self.ratio)

    def _share(self, summary: Summary, model: str, paper_ratio: float) -> float | None:
        mine = summary.rise(model, Line(self.method), self.ratio, self.domain)
        paper = summary.rise(model, Line("paper"), paper_ratio, self.domain)
        return None if mine is None or paper is None or paper.value <= 0 else mine.value / paper.value


ORDERS = (
    Order("Fisher < frequency ≤ mean", ("paper", "paper, frequency", "paper, mean"), ("<", "≤")),
    Order("whitened < activation-aware < plain", ("paper", "paper, activation-aware", "paper, plain"), ("<", "<")),
    Order("semi-dynamic ≤ static", ("paper", "base: static"), ("≤",)),
    *(Order(f"default < {rival}", ("default", rival), ("<",)) for rival in BASELINES),
)
SHARES = (
    Share("default", 0.5, "in", 0.40),
    Share("default", 0.6, "in", 0.40),
    Share("default", 0.6, "out", 0.60),
    Share("default", 0.7, "in", 0.60),
    Share("default", 0.7, "out", 0.65),
    Share("default", 0.75, "in", 0.60),
    Share("default", 0.75, "out", 0.65),
)


def all_verdicts(summary: Summary) -> list[Verdict]:
    """Every claim on every model, in a fixed order."""
    checks: tuple[Share | Order, ...] = (*SHARES, *ORDERS)
    return [verdict for check in checks for verdict in check.verdicts(summary)]
