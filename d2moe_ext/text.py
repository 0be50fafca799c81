"""Text that every Python installation carries, in three parts that share no document.

The default calibration text of ``d2moe compress``, and all the text the shipped model ever saw:
the language reference that ``help()`` prints, the standard library's sources, and the docstrings of
its compiled modules. It is read from the interpreter at hand, so it differs a little between versions.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
import sysconfig
from pathlib import Path
from typing import Literal

Split = Literal["training", "calibration", "heldout"]

# Not prose and not ordinary code: tables, vendored wheels, and packages that distributions leave out.
_EXCLUDED = {
    "__pycache__",
    "_bundled",
    "dist-packages",
    "encodings",
    "idlelib",
    "lib2to3",
    "msilib",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
_HELDOUT_SHARE = 0.05
_CALIBRATION_SHARE = 0.05


def split_of(name: str) -> Split:
    """The part a document belongs to, from a hash of its name alone."""
    position = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    if position < _HELDOUT_SHARE:
        return "heldout"
    if position < _HELDOUT_SHARE + _CALIBRATION_SHARE:
        return "calibration"
    return "training"


def _topics() -> dict[str, str]:
    from pydoc_data.topics import topics

    return {f"topic:{name}": text for name, text in topics.items()}


def _sources() -> dict[str, str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _EXCLUDED.isdisjoint(relative.parts) and relative.parts[0].split(".")[0] in sys.stdlib_module_names:
            found[f"source:{relative.as_posix()}"] = path.read_text(encoding="utf-8", errors="replace")
    return found


def _compiled_docstrings() -> dict[str, str]:
    found = {}
    for name in sorted(sys.builtin_module_names):
        module = importlib.import_module(name)
        members = sorted(vars(module).items())
        texts = [f"{name}.{key}\n\n{text}" for key, value in members if (text := inspect.getdoc(value)) and callable(value)]
        if texts:
            found[f"docstrings:{name}"] = "\n\n".join(texts)
    return found


def named_documents(split: Split) -> dict[str, str]:
    """The documents of one split by their names, in a fixed order.

    Args:
        split: ``"training"`` (about 90 % of the documents), ``"calibration"`` or ``"heldout"`` (5 % each).
    """
    documents = {**_topics(), **_sources(), **_compiled_docstrings()}
    return {name: text for name, text in sorted(documents.items()) if text.strip() and split_of(name) == split}


def python_documents(split: Split) -> list[str]:
    """The documents of :func:`named_documents` without their names."""
    return list(named_documents(split).values())


def python_text(split: Split) -> str:
    """The documents of one split as one text, separated by blank lines."""
    return "\n\n".join(python_documents(split))
