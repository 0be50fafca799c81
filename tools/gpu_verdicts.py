"""Which test speaks for which operator, and what pytest and ``compute-sanitizer`` said."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from tools.limited_run import Ran

# In the order of their tests: those that take longest come last, and have what time the others left.
OPERATORS = (
    "fisher_merge_",
    "column_select",
    "whitened_svd",
    "gram_update_",
    "moe_forward",
    "moe_gate_up_forward",
    "moe_down_forward",
)
# A group's tests run in a process of their own: after a fault in one, a process's GPU answers nothing any more.
FORWARD, OTHERS = "moe", "others"
GROUPS: dict[str, tuple[str, ...]] = {
    OTHERS: (),
    **{name.rstrip("_"): (name,) for name in OPERATORS if not name.startswith(FORWARD)},
    FORWARD: tuple(name for name in OPERATORS if name.startswith(FORWARD)),
}
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
# As tools.gpu_smallest prints it.
NO_KERNEL = "no CUDA kernel"
SANITIZER_ERROR = 99
_MESSAGE = 500


def selection(group: str) -> str:
    """What ``pytest -k`` takes to choose a group's tests, by their names."""
    return " and ".join(f"not {name}" for name in GROUPS if name != OTHERS) if group == OTHERS else group


def read_tests(file: Path, group: str) -> list[dict[str, Any]]:
    """The verdicts that pytest wrote as JUnit XML; none where it did not come to write."""
    if not file.is_file():
        return []
    return [_verdict(case, group) for case in ElementTree.parse(file).getroot().iter("testcase")]


def _verdict(case: ElementTree.Element, group: str) -> dict[str, Any]:
    outcome, message = PASSED, ""
    for tag, meaning in (("skipped", SKIPPED), ("error", FAILED), ("failure", FAILED)):
        found = case.find(tag)
        if found is not None:
            outcome, message = meaning, found.get("message") or found.text or ""
    name = f"{case.get('classname')}::{case.get('name')}"
    about = {"group": group, "name": name, "outcome": outcome, "seconds": float(case.get("time") or 0)}
    return about | {"message": message[:_MESSAGE]}


def judge_tests(tests: list[dict[str, Any]], ran: Ran, may_be_none: bool) -> tuple[bool, str]:
    """Whether a group's tests passed, and how many did what.

    Args:
        tests: the group's verdicts.
        ran: pytest's run.
        may_be_none: there may be no test of the group.
    """
    none_selected = 5  # pytest's exit code
    if not tests and ran.code == none_selected:
        return may_be_none, "no test"
    counts = {what: sum(test["outcome"] == what for test in tests) for what in (PASSED, FAILED, SKIPPED)}
    detail = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    if ran.code != 0:
        detail = "; ".join(filter(None, [detail, ran.ending()]))
    return ran.code == 0 and counts[PASSED] > 0 and counts[FAILED] == 0, detail


def read_operators(output: str) -> dict[str, str]:
    """What ``tools.gpu_smallest`` printed of every operator."""
    return dict(re.findall(r"^operator (\w+) (.+)$", output, re.MULTILINE))


def judge_sanitizer(ran: Ran) -> tuple[bool, str]:
    """Whether ``compute-sanitizer`` found nothing, and its summary. A run without one was not watched."""
    lines = [line.strip("= ") for line in ran.output.splitlines() if "SUMMARY" in line]
    if ran.code == 0 and lines:
        return True, "; ".join(lines)
    if ran.code == SANITIZER_ERROR:
        found = [line.strip("= ") for line in ran.output.splitlines() if line.startswith("=========")]
        return False, "\n".join([*lines, *found[:20]])
    return False, ran.ending() if lines else f"no summary; {ran.ending()}"
