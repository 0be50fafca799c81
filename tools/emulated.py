"""CUDA operators on a CPU: their own sources over ``tools/emulated_cuda``, in place of the CPU's own.

A GPU's threads become fibers of one thread (see ``tools/emulated_cuda/cuda_runtime.h``), so that what kernels compute can be
tested where there is no GPU. Not what no source says: memory order and timing. cuBLAS and cuSOLVER are stand-ins after their
manuals, which show whether they are called as those say, not what they answer.
"""

from __future__ import annotations

from pathlib import Path

from torch.utils import cpp_extension

from d2moe_ext import _native

ROOT = Path(__file__).resolve().parent.parent
EMULATED = ROOT / "tools" / "emulated_cuda"
NAME = "d2moe_emulated_cuda"


def sources() -> list[Path]:
    """Kernels and operators of the GPU, those they share with the CPU, and the emulator."""
    csrc = ROOT / "csrc"
    return sorted([*csrc.rglob("*_cuda.cu"), *csrc.rglob("*_cuda.cpp"), *EMULATED.glob("*.cpp")])


def load(folder: Path) -> None:
    """Compile what changed into ``folder`` and replace the CPU's operators, until the program ends.

    Raises:
        RuntimeError: the compiler's own words.
    """
    # A compiler takes .cu for CUDA: the emulation's are copies by another name, written only when they change.
    copies = []
    for path in sources():
        copy = folder / f"{path.stem}_{path.suffix[1:]}.cpp"
        text = f'#include "{path}"\n'
        if not copy.is_file() or copy.read_text() != text:
            folder.mkdir(parents=True, exist_ok=True)
            copy.write_text(text)
        copies.append(str(copy))
    cpp_extension.load(
        NAME,
        copies,
        extra_cflags=["-O2", "-g", "-DD2MOE_EMULATED", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"],
        # What both devices share is in the extension itself, which is loaded already.
        extra_ldflags=[_native.C.__file__],
        extra_include_paths=[str(EMULATED), str(ROOT / "csrc")],
        build_directory=str(folder),
        is_python_module=False,
    )
