"""``python -m tools.gpu_build``: the extension for the GPU at hand, built in a copy of the sources without network or git.

``make gpu-check`` and ``make gpu-bench`` run in that copy. It is kept, so that a second build compiles what has changed.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tools.gpu_record import check_gpu
from tools.limited_run import Ran, run_limited

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "gpu"
SECONDS = 300.0
_LEFT_OUT = {".git", "build", "dist", "__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis"}


def sources(root: Path) -> Iterator[Path]:
    """Every file of a checkout but what was built, installed or cached there, relative to it."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if _is_source(name)]
        for name in files:
            if not name.endswith(".so"):
                yield (Path(folder) / name).relative_to(root)


def _is_source(folder: str) -> bool:
    return folder not in _LEFT_OUT and not folder.startswith(".venv") and not folder.endswith(".egg-info")


def mirror(root: Path, copy: Path) -> None:
    """Make ``copy`` the sources of ``root``. What is the same stays as it is, times too, so that it is not compiled again;
    what was built there stays."""
    wanted = set(sources(root))
    for path in set(sources(copy)) - wanted:
        (copy / path).unlink()
    for path in sorted(wanted):
        if (copy / path).is_file() and filecmp.cmp(root / path, copy / path, shallow=False):
            continue
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / path, copy / path)


def build_environment(headers: Path | None) -> dict[str, str]:
    """What the build is told: this GPU's architecture alone, all cores, and where headers are that the toolkit lacks."""
    major, minor = torch.cuda.get_device_capability(0)
    environment = {
        "D2MOE_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}",
        "MAX_JOBS": str(os.cpu_count() or 1),
    }
    if headers is not None:
        # Compilers look there after every folder that they are given otherwise.
        environment["CPATH"] = os.pathsep.join(filter(None, [os.environ.get("CPATH", ""), str(headers.resolve())]))
    return environment


def check_headers(folder: str) -> Path | None:
    """The folder of headers; None where none is named.

    Raises:
        ValueError: it is no folder.
    """
    if folder and not Path(folder).is_dir():
        raise ValueError(f"--headers must be a folder, got {folder!r}.")
    return Path(folder) if folder else None


def build(headers: Path | None, seconds: float, copy: Path = COPY, run: Callable[..., Ran] = run_limited) -> Ran:
    """Copy the sources and compile them there.

    Args:
        headers: a folder for the compilers to look in last, or None.
        seconds: that compiling may take.
        copy: where.
        run: as :func:`tools.limited_run.run_limited`.
    """
    copy.mkdir(parents=True, exist_ok=True)
    mirror(ROOT, copy)
    return run([sys.executable, "setup.py", "build_ext", "--inplace"], copy, seconds, build_environment(headers))


def main() -> int:
    """Build; the exit code is 1 where that failed, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_build", description=__doc__.splitlines()[0])
    parser.add_argument("--headers", default="", help="a folder of headers that the toolkit lacks")
    arguments = parser.parse_args()
    try:
        check_gpu()
        headers = check_headers(arguments.headers)
    except ValueError as error:
        print(f"gpu_build: {error}", file=sys.stderr)
        return 2
    ran = build(headers, SECONDS)
    if ran.code != 0:
        print(f"gpu_build: the build must succeed, got {ran.ending(60)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
