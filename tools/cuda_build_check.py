"""``python -m tools.cuda_build_check``: builds the CUDA operators, loads them, and looks at every kernel. Needs no GPU.

Run by ``make cuda-build-check`` with the Python of an environment that has a CUDA build of torch, in a copy of the sources.
Fails where the extension does not build or load (an undefined symbol shows only then), where an operator has no CUDA kernel,
and where a kernel spills registers and is not listed with its reason.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.ptxas import Kernel, read_kernels

ARCHITECTURES = "8.0;9.0+PTX"
# Kernels that may spill, by a part of their mangled name, each with its reason.
SPILLS: dict[str, str] = {}
_CUDA_KERNELS = """
import torch
import d2moe_ext
from d2moe_ext import _native

info = _native.C.build_info()
assert info["cuda"], "built without CUDA"
for name in torch._C._dispatch_get_all_op_names():
    space, _, operator = name.partition("::")
    if space == "d2moe_ext":
        print("operator", operator.partition(".")[0], torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"))
"""


def build() -> str:
    """Compile in place and return what the compilers printed.

    Raises:
        SystemExit: the build failed; its last lines have been printed.
    """
    environment = os.environ | {
        "D2MOE_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", ARCHITECTURES),
        "NVCC_APPEND_FLAGS": "-Xptxas -v",
    }
    # From nothing: a file that is not compiled again says nothing of its kernels.
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        print("\n".join(done.stdout.splitlines()[-60:]), file=sys.stderr)
        raise SystemExit(f"cuda_build_check: the build must succeed, got exit code {done.returncode}.")
    return done.stdout


def cuda_operators() -> dict[str, bool]:
    """Every operator that the loaded extension defines, and whether it has a CUDA kernel.

    Raises:
        SystemExit: the extension could not be loaded.
    """
    done = subprocess.run([sys.executable, "-c", _CUDA_KERNELS], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"cuda_build_check: the extension must load, got exit code {done.returncode}.")
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("operator ")]
    return {name: has == "True" for _, name, has in lines}


def complaints(operators: dict[str, bool], kernels: Sequence[Kernel]) -> list[str]:
    """What is wrong, a sentence each."""
    wrong = []
    if not operators:
        wrong.append("the extension must define operators, got none.")
    if not kernels:
        wrong.append("ptxas must report kernels, got none.")
    for name, has in operators.items():
        if not has:
            wrong.append(f"{name} must have a CUDA kernel, got none.")
    for kernel in kernels:
        if kernel.spills and not any(part in kernel.name for part in SPILLS):
            wrong.append(f"{kernel.name} ({kernel.arch}) must not spill registers, got {kernel.spills} bytes.")
    return wrong


def demangled(names: Sequence[str]) -> list[str]:
    """C++ names where ``c++filt`` is at hand."""
    try:
        done = subprocess.run(["c++filt"], input="\n".join(names), stdout=subprocess.PIPE, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return list(names)
    return [line.replace("d2moe::kernels::(anonymous namespace)::", "") for line in done.stdout.splitlines()]


def print_table(kernels: Sequence[Kernel]) -> None:
    """The largest sizes over all element types of a kernel, by architecture."""
    names = demangled([kernel.name for kernel in kernels])
    stems = [name.partition("(")[0].partition("<")[0].removeprefix("void ") for name in names]
    groups: dict[tuple[str, str], list[Kernel]] = {}
    for kernel, stem in zip(kernels, stems, strict=True):
        groups.setdefault((stem, kernel.arch), []).append(kernel)
    print(f"{'arch':6} {'variants':>8} {'registers':>9} {'shared':>7} {'stack':>6} {'spills':>6}  kernel")
    for (stem, arch), found in sorted(groups.items()):
        sizes = [max(getattr(kernel, size) for kernel in found) for size in ("registers", "shared", "stack", "spills")]
        print(f"{arch:6} {len(found):8} {sizes[0]:9} {sizes[1]:7} {sizes[2]:6} {sizes[3]:6}  {stem}")


def main() -> int:
    """Build, load, look; the exit code is 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tools.cuda_build_check", description=__doc__.splitlines()[0])
    parser.add_argument("--log", type=Path, help="also write the build's output here")
    arguments = parser.parse_args()
    log = build()
    if arguments.log is not None:
        arguments.log.parent.mkdir(parents=True, exist_ok=True)
        arguments.log.write_text(log, encoding="utf-8")
    kernels, operators = list(read_kernels(log)), cuda_operators()
    print_table(kernels)
    have = [name for name, has in operators.items() if has]
    print(f"CUDA kernels, built and loaded, not run here: {', '.join(have)}.")
    wrong = complaints(operators, kernels)
    for line in wrong:
        print(f"cuda_build_check: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
