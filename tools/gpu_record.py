"""The JSON file of what was found on one GPU: what stands in it beside the findings, how it is named, and how it is written.

Imports nothing of this package, whose extension may not be built yet.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

UNKNOWN = "unknown"


def check_commit(commit: str) -> str:
    """The commit as it was given.

    Raises:
        ValueError: it is not one.
    """
    if not re.fullmatch("[0-9a-f]{7,40}", commit):
        raise ValueError(f"--commit must be 7 to 40 hexadecimal digits, got {commit!r}.")
    return commit


def check_results(folder: str) -> Path:
    """The folder of the results, which may be new.

    Raises:
        ValueError: it is not named, or is something else.
    """
    if not folder or (Path(folder).exists() and not Path(folder).is_dir()):
        raise ValueError(f"--results must name a folder, got {folder!r}.")
    return Path(folder)


def check_gpu() -> None:
    """There must be a GPU that torch can use.

    Raises:
        ValueError: there is none.
    """
    if not torch.cuda.is_available():
        raise ValueError(f"torch must find a GPU, got none with torch {torch.__version__}.")


def slug(name: str) -> str:
    """A GPU's name as part of a file's: ``NVIDIA H100 80GB HBM3`` is ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe_gpu() -> dict[str, Any]:
    """The first GPU, as torch and the driver tell of it."""
    properties = torch.cuda.get_device_properties(0)
    major, minor = torch.cuda.get_device_capability(0)
    return {
        "name": properties.name,
        "capability": f"{major}.{minor}",
        "memory_bytes": properties.total_memory,
        "driver": _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or UNKNOWN,
    }


def versions() -> dict[str, str]:
    """Of everything that a result may depend on."""
    nvcc = re.search(r"release ([\d.]+)", _said_by("nvcc", "--version"))
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or UNKNOWN,
        "transformers": importlib.metadata.version("transformers"),
        "python": platform.python_version(),
        "nvcc": nvcc[1] if nvcc else UNKNOWN,
    }


def _said_by(*command: str) -> str:
    """What a program prints; empty where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=60)
    return "" if done.returncode else done.stdout.strip()


def new_record(kind: str, commit: str) -> dict[str, Any]:
    """What stands in every file, before anything was found."""
    return {
        "kind": kind,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit,
        "gpu": describe_gpu(),
        "versions": versions(),
    }


def record_path(results: Path, record: dict[str, Any]) -> Path:
    """Where a record is kept: one file a kind and GPU."""
    return results / f"{record['kind']}-{slug(record['gpu']['name'])}.json"


def write_atomically(path: Path, record: dict[str, Any]) -> None:
    """Write strict JSON: whoever reads the file finds the old record or the new one, also when this is interrupted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(beside, path)
