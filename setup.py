"""Builds ``d2moe_ext._C``. ``D2MOE_CUDA=0`` leaves the CUDA sources out, ``D2MOE_CUDA=1`` insists on them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"


def source_hash() -> str:
    """What ``d2moe_ext`` compares at import to tell a stale build; keep in step with ``d2moe_ext/_native.py``."""
    digest = hashlib.sha256()
    for path in sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}):
        digest.update(path.relative_to(CSRC).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def write_build_info() -> Path:
    """A header with the source hash, for one file alone: as a compiler flag it would rebuild every other one too."""
    folder = ROOT / "build" / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    header = folder / "d2moe_build_info.h"
    text = f'#define D2MOE_SOURCE_HASH "{source_hash()}"\n#define D2MOE_TORCH_VERSION "{torch.__version__}"\n'
    if not header.is_file() or header.read_text() != text:
        header.write_text(text)
    return folder


def with_cuda() -> bool:
    possible = torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None
    choice = os.environ.get("D2MOE_CUDA", "")
    if choice not in {"", "0", "1"}:
        raise SystemExit(f"D2MOE_CUDA must be 0, 1 or unset, got {choice!r}.")
    if choice == "1" and not possible:
        raise SystemExit(
            "D2MOE_CUDA=1 needs a CUDA build of torch and a CUDA toolkit, "
            f"got torch.version.cuda={torch.version.cuda} and CUDA_HOME={cpp_extension.CUDA_HOME}."
        )
    return possible and choice != "0"


def toolkit() -> Path:
    """The CUDA toolkit. CUDA_HOME is not its folder where the nvcc on the path is a script that calls the real one: that one is
    asked."""
    home = Path(cpp_extension.CUDA_HOME)
    nvcc = home / "bin" / "nvcc"
    if (home / "include" / "cuda_runtime_api.h").is_file() or not nvcc.is_file():
        return home
    command = [str(nvcc), "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    said = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False).stderr
    found = [line.partition("TOP=")[2] for line in said.splitlines() if "TOP=" in line]
    return Path(found[0]).resolve() if found else home


def wheel_folders(name: str) -> list[str]:
    """``include`` or ``lib`` of the NVIDIA wheels that torch brings: cuBLAS and cuSOLVER, which a toolkit may lack."""
    import site

    packages = {*site.getsitepackages(), site.getusersitepackages(), str(Path(torch.__file__).resolve().parent.parent)}
    found = [path for folder in sorted(packages) for path in sorted((Path(folder) / "nvidia").glob(f"cu*/{name}"))]
    return [str(path) for path in found if path.is_dir()]


def cusolver(folders: list[str]) -> str:
    """The linker's flag for cuSOLVER. torch's libraries bring cuBLAS to the linker but not this one, and in a wheel it
    has no name without a version."""
    found = [path.name for folder in folders for path in sorted(Path(folder).glob("libcusolver.so*"))]
    if not found:
        raise SystemExit(f"A CUDA build needs cuSOLVER, of a CUDA toolkit or of torch's wheels, got none in {folders}.")
    return f"-l:{found[0]}"


def extension():
    cuda = with_cuda()
    # X_cuda.cpp registers X for GPUs, X_cuda.cu has its kernels: not X.cu, whose object would be named like that of X.cpp.
    sources = sorted(path for path in CSRC.rglob("*.cpp") if cuda or not path.stem.endswith("_cuda"))
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    compile_args = {"cxx": ["-O3", "-Wall", "-Wno-unknown-pragmas", *openmp]}
    include_dirs, library_dirs, libraries = [str(CSRC), str(write_build_info())], [], []
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        sources += sorted(CSRC.rglob("*.cu"))
        compile_args["nvcc"] = ["-O3"]
        compile_args["cxx"].append("-DD2MOE_WITH_CUDA")
        # Before the wheels' headers, some of which include what only a toolkit has.
        include_dirs += [str(toolkit() / "include"), *wheel_folders("include")]
        library_dirs += [str(toolkit() / name) for name in ("lib64", "lib") if (toolkit() / name).is_dir()]
        library_dirs += wheel_folders("lib")
        libraries.append(cusolver(library_dirs))
    kind = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    return kind(
        "d2moe_ext._C",
        [path.relative_to(ROOT).as_posix() for path in sources],
        include_dirs=include_dirs,
        library_dirs=library_dirs,
        extra_compile_args=compile_args,
        extra_link_args=[*openmp, *libraries],
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": cpp_extension.BuildExtension})
