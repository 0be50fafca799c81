"""Short names for kernels, whose whole names are declarations in C++ with all their template arguments."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_NAMESPACES = re.compile(r"\(anonymous namespace\)::|<unnamed>::|[A-Za-z_]\w*::(?=[A-Za-z_<(])")
_WORDS = re.compile(r"[A-Za-z_]\w*|\d+")
# Names of frameworks' launchers: what they launch stands in their template arguments alone.
_SAY_NOTHING = {"Kernel", "Kernel2", "kernel", "device_kernel"}
_LONGEST = 60


class _Name(NamedTuple):
    """A kernel's own name and the words of its template arguments."""

    own: str
    words: tuple[str, ...]


def short_names(names: Iterable[str]) -> dict[str, str]:
    """A short name for each: without namespaces, parameters and template arguments, except those arguments in which kernels of
    one name differ. No two are the same.

    Args:
        names: as the profiler gives them; all that are to be told apart.
    """
    parsed = {name: _parse(name) for name in names}
    shorts: dict[str, str] = {}
    for name, (own, words) in parsed.items():
        others = [other.words for other in parsed.values() if other.own == own]
        told = words if own in _SAY_NOTHING else _differing(words, others)
        short = _cut(f"{own}<{' '.join(told)}>" if told else own)
        twins = sum(taken == short or taken.startswith(f"{short} #") for taken in shorts.values())
        shorts[name] = f"{short} #{twins + 1}" if twins else short
    return shorts


def _differing(words: tuple[str, ...], others: list[tuple[str, ...]]) -> tuple[str, ...]:
    """The words in which they differ, place by place; all, where they have not equally many."""
    if any(len(other) != len(words) for other in others):
        return words
    return tuple(word for place, word in enumerate(words) if any(other[place] != word for other in others))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _parse(name: str) -> _Name:
    """``void a::b<c<1>, d>(e)`` is ``b`` with the words ``c``, ``1`` and ``d``; what is no declaration is its own name."""
    text = _NAMESPACES.sub("", name)
    outer, template, depth = "", "", 0
    for character in text:
        if character == "<":
            template = "" if depth == 0 else template + " "
            depth += 1
        elif character == ">":
            depth -= 1
        elif depth > 0:
            template += character
        elif character == "(" and outer.strip():
            break
        else:
            outer += character
    words = outer.replace("::", " ").split()
    if not words or name.startswith(("Memcpy", "Memset")):  # "Memcpy DtoD (Device -> Device)"
        return _Name(name, ())
    return _Name(words[-1], tuple(_WORDS.findall(template)))
