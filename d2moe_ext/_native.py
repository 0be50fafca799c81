"""Loads ``d2moe_ext._C`` and refuses a missing or stale one with the command that builds it."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
from pathlib import Path
from typing import Any

import torch

BUILD_COMMAND = "pip install --no-build-isolation --force-reinstall --no-deps ."


def source_hash(csrc: Path) -> str:
    """The hash ``setup.py`` compiles into the extension."""
    digest = hashlib.sha256()
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}):
        digest.update(path.relative_to(csrc).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def check_build(info: dict[str, Any], csrc: Path, torch_version: str) -> None:
    """Raise ImportError if ``_C`` was built for another torch, or from sources other than those beside it."""
    if info["torch_version"] != torch_version:
        raise ImportError(
            f"d2moe_ext._C was built for torch {info['torch_version']} and this is torch {torch_version}; "
            f"build it again: {BUILD_COMMAND}"
        )
    if csrc.is_dir() and info["source_hash"] != source_hash(csrc):
        raise ImportError(f"d2moe_ext._C is older than the sources in csrc; build it again: {BUILD_COMMAND}")


def load_cusolver(torch_folder: Path) -> None:
    """Load the cuSOLVER of the wheels beside torch, if there are any: older releases of torch do so only at their first use
    of it, and the system's loader does not look into wheels."""
    for path in sorted((torch_folder.parent / "nvidia").glob("cu*/lib/libcusolver.so.*")):
        ctypes.CDLL(str(path))
        return


def import_extension() -> Any:
    """``_C``, or the ImportError that says why not."""
    try:
        return importlib.import_module("d2moe_ext._C")
    except ImportError as error:
        if "libcusolver.so" not in str(error):
            raise
    load_cusolver(Path(torch.__file__).resolve().parent)
    return importlib.import_module("d2moe_ext._C")


def load() -> Any:
    """Import ``_C``, which registers the operators of ``torch.ops.d2moe_ext``."""
    try:
        _C = import_extension()
    except (ImportError, OSError) as error:
        raise ImportError(f"d2moe_ext._C could not be loaded ({error}); build it: {BUILD_COMMAND}") from error
    check_build(_C.build_info(), Path(__file__).resolve().parent.parent / "csrc", torch.__version__)
    return _C


C = load()
