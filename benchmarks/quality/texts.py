"""The texts of a study, each split so that nothing is tuned on what it is judged by.

In domain, calibration, selection and test text are given one by one. The text from out of the domain is one, cut into
thirds for the same three uses, in this order. The words ``python`` and ``headers`` stand for text that comes with Python
and with PyTorch, so that a study needs no download.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import torch

from d2moe_ext.cli.common import read_text
from d2moe_ext.text import named_documents, python_text

Use = Literal["calibration", "selection", "test"]
USES: tuple[Use, ...] = get_args(Use)
OUT = "out"


@dataclass(frozen=True)
class Text:
    """A text and the name it goes by in results: the file's own name, never a path.

    Attributes:
        label: the name and eight digits of a hash of the content, which tells other contents of the same name apart.
    """

    name: str
    content: str

    @property
    def label(self) -> str:
        return f"{self.name} ({hashlib.sha256(self.content.encode()).hexdigest()[:8]})"


def parse_texts(options: list[str]) -> dict[str, str]:
    """``["test=FILE", ...]`` as a mapping.

    Raises:
        ValueError: an option of another form, an unknown or repeated use, or no calibration text.
    """
    texts: dict[str, str] = {}
    for option in options:
        use, separator, source = option.partition("=")
        if use not in (*USES, OUT) or not separator or not source or use in texts:
            known = ", ".join((*USES, OUT))
            raise ValueError(f"--text must be USE=FILE with each USE of {known} at most once, got {option!r}.")
        texts[use] = source
    return texts


def domain_text(sources: Mapping[str, str], use: Use) -> Text:
    """The in-domain text for one use.

    Raises:
        ValueError: none was given, or it is not a text file.
    """
    if use not in sources:
        raise ValueError(f"--text must give a text for {use} as {use}=FILE, got {', '.join(sources) or 'none'}.")
    source = sources[use]
    if source == "python":
        return Text(f"python {use}", _python(use))
    return Text(Path(source).name, read_text(f"--text {use}", Path(source)))


def outside_text(sources: Mapping[str, str], use: Use) -> Text:
    """The part of the out-of-domain text for one use.

    Raises:
        ValueError: none was given, or it is not a text file.
    """
    if OUT not in sources:
        raise ValueError(f"--text must give a text from out of the domain as out=FILE, got {', '.join(sources) or 'none'}.")
    source = sources[OUT]
    if source == "python":
        return Text(f"python {use}", _python(use))
    if source == "headers":
        return Text(f"headers {use}", _third(_headers(), use))
    return Text(f"{Path(source).name}, third {USES.index(use) + 1}", _third(read_text("--text out", Path(source)), use))


def _third(content: str, use: Use) -> str:
    """A third of a text, cut behind line ends."""
    index = USES.index(use)
    ends = [0, *(content.rfind("\n", 0, len(content) * part // 3) + 1 for part in (1, 2)), len(content)]
    return content[ends[index] : ends[index + 1]]


def _python(use: Use) -> str:
    """Text that comes with Python: its calibration split, and the held-out documents halved by a hash of their names.

    The documents stand in a fixed random order: sorted, one kind would come first, and only the first tokens are read.
    """
    if use == "calibration":
        return python_text("calibration")
    half = USES.index(use) - 1
    documents = [text for name, text in _heldout().items() if _bit(name) == half]
    random.Random(0).shuffle(documents)
    return "\n\n".join(documents)


@lru_cache(maxsize=1)
def _heldout() -> dict[str, str]:
    return named_documents("heldout")


def _bit(name: str) -> int:
    """0 or 1. The hash's last byte: its first ones put the document among the held-out ones already."""
    return hashlib.sha256(name.encode()).digest()[-1] % 2


def _headers() -> str:
    """The C++ headers of PyTorch's tensor library, which every installation carries."""
    root = Path(torch.__file__).parent / "include" / "c10"
    return "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(root.rglob("*.h")))
