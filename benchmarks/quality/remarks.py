"""Sentences below a part's tables, made from the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.quality.parts import Line
    from benchmarks.quality.summary import Summary

_DOMAIN_NAMES = {"in": "in domain", "out": "out of domain"}


def lowest(summary: Summary, lines: Sequence[Line], ratios: Sequence[float]) -> list[str]:
    """Which line rises least, and how far the next is above it."""
    remarks = []
    for model in summary.models:
        for domain, where in _DOMAIN_NAMES.items():
            found = []
            for ratio in ratios:
                rises = [(rise.value, line.name) for line in lines if (rise := summary.rise(model, line, ratio, domain))]
                if len(rises) > 1:
                    (best, name), (second, next_name), *_ = sorted(rises)
                    found.append(f"{name} at {ratio} ({second - best:.4f} below {next_name})")
            if found:
                remarks.append(f"- Least rise on {model}, {where}: {'; '.join(found)}.")
    return remarks


def steps(summary: Summary, lines: Sequence[Line], ratios: Sequence[float]) -> list[str]:
    """What each line changes against the one above it, seed by seed."""
    remarks = []
    for above, line in pairwise(lines):
        found, clear = [], []
        for model in summary.models:
            for domain, where in _DOMAIN_NAMES.items():
                for ratio in ratios:
                    change = summary.difference(model, line, above, ratio, domain)
                    if change is not None:
                        found.append(f"{model} {where} at {ratio}: {change.value:+.4f} ± {change.spread or 0.0:.4f}")
                        clear.append(change.value < -(change.spread or 0.0))
        if found:
            verdict = f"lower by more than the spread in {sum(clear)} of {len(clear)}"
            remarks.append(f"- **{line.name}** against {above.name}, over shared seeds: {verdict} ({'; '.join(found)}).")
    return remarks


def ahead_of_default(summary: Summary, lines: Sequence[Line], ratios: Sequence[float]) -> list[str]:
    """Where a method rises less than the default, and by how much."""
    default = next(line for line in lines if line.method == "default")
    remarks, compared = [], False
    for line in lines:
        for model in summary.models:
            for domain, where in _DOMAIN_NAMES.items():
                for ratio in ratios:
                    change = summary.difference(model, line, default, ratio, domain)
                    if line is default or change is None:
                        continue
                    compared = True
                    if change.value < 0:
                        spread = "" if change.spread is None else f" ± {change.spread:.4f}"
                        remarks.append(
                            f"- {line.name} is ahead of the default on {model}, {where}, at {ratio}, "
                            f"by {-change.value:.4f}{spread}."
                        )
    return remarks or ["- Nothing here is ahead of the default."] * compared
