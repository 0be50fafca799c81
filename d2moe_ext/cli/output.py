"""A directory that appears complete or not at all."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


def check_output(out: Path, overwrite: bool, *sources: str) -> None:
    """Raise ValueError unless ``out`` may be written: it is new or empty, or ``overwrite`` and no source lies in it."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"OUT must be a directory, got {str(out)!r}, which is a file.")
    for source in sources:
        if Path(source).resolve().is_relative_to(out.resolve()):
            raise ValueError(f"OUT must not hold the model that is read, got {str(out)!r}.")
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise ValueError(f"OUT must be a new or empty directory unless --overwrite is given, got {str(out)!r}.")


@contextmanager
def complete_directory(out: Path) -> Iterator[Path]:
    """Yield an empty directory beside ``out`` that takes its place when the block ends well, and is deleted otherwise.

    Beside it, because only a rename within one file system is a single step. A termination signal counts as an
    interrupt, so that it is cleaned up after too.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.partial-"))
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())  # mkdtemp's directories are for their owner alone
        _take_place(partial, out)
    finally:
        signal.signal(signal.SIGTERM, previous)
        shutil.rmtree(partial, ignore_errors=True)


def _take_place(partial: Path, out: Path) -> None:
    if not out.exists():
        partial.rename(out)
        return
    replaced = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.replaced-"))
    out.rename(replaced)
    partial.rename(out)
    shutil.rmtree(replaced)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
