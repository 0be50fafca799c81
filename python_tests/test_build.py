"""The native build: what is refused at import and with which command, and when setup.py builds for CUDA."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

import d2moe_ext
from d2moe_ext import _native

ROOT = Path(__file__).resolve().parent.parent
INFO = {"torch_version": "2.13.0", "source_hash": "0123456789abcdef"}


@pytest.fixture
def csrc(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "one.cpp").write_text("int one() { return 1; }\n")
    (tmp_path / "one.h").write_text("int one();\n")
    return tmp_path


@pytest.fixture
def setup_namespace(monkeypatch):
    """setup.py's functions, with what it handed to setuptools."""
    handed = {}
    monkeypatch.delenv("D2MOE_CUDA", raising=False)
    monkeypatch.setattr(setuptools, "setup", lambda **options: handed.update(options))
    return runpy.run_path(str(ROOT / "setup.py")) | {"handed": handed}


def test_this_build_is_accepted_and_says_what_it_is():
    info = _native.C.build_info()
    assert info["torch_version"] == torch.__version__
    assert info["source_hash"] == _native.source_hash(ROOT / "csrc")
    assert info["openmp"] is (sys.platform != "darwin")
    assert isinstance(info["cuda"], bool)


def test_a_build_for_another_torch_is_refused_with_the_command(tmp_path):
    with pytest.raises(ImportError, match=r"built for torch 2\.13\.0 and this is torch 2\.14\.0; build it again: pip ins"):
        _native.check_build(INFO, tmp_path, "2.14.0")


def test_a_build_older_than_its_sources_is_refused_with_the_command(csrc):
    current = INFO | {"source_hash": _native.source_hash(csrc)}
    _native.check_build(current, csrc, "2.13.0")
    (csrc / "one.h").write_text("int one(int);\n")
    with pytest.raises(ImportError, match="older than the sources in csrc; build it again: pip install"):
        _native.check_build(current, csrc, "2.13.0")


def test_without_sources_beside_it_a_build_is_taken_as_it_is(tmp_path):
    _native.check_build(INFO, tmp_path / "absent", "2.13.0")


def test_a_missing_build_is_refused_with_the_command(monkeypatch):
    monkeypatch.delattr(d2moe_ext, "_C")
    monkeypatch.setitem(sys.modules, "d2moe_ext._C", None)
    with pytest.raises(ImportError, match=r"_C could not be loaded \(.*\); build it: pip install --no-build-isolation"):
        _native.load()


def test_the_hash_sees_names_and_contents_of_sources_only(csrc):
    before = _native.source_hash(csrc)
    (csrc / "notes.txt").write_text("not compiled")
    assert _native.source_hash(csrc) == before
    (csrc / "one.h").rename(csrc / "two.h")
    renamed = _native.source_hash(csrc)
    assert renamed != before
    (csrc / "kernels" / "two.cu").write_text("")
    assert _native.source_hash(csrc) not in {before, renamed}


def test_setup_and_import_agree_on_the_hash(setup_namespace):
    assert setup_namespace["source_hash"]() == _native.source_hash(ROOT / "csrc")


def test_setup_builds_every_source_into_one_module(setup_namespace):
    (extension,) = setup_namespace["handed"]["ext_modules"]
    assert extension.name == "d2moe_ext._C"
    compiled = {path for path in extension.sources if path.endswith(".cpp")}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.cpp")}
    with_cuda = setup_namespace["with_cuda"]()
    assert compiled == {path for path in sources if with_cuda or not path.endswith("_cuda.cpp")}
    assert any(path.endswith(".cu") for path in extension.sources) is with_cuda
    assert ("-fopenmp" in extension.extra_compile_args["cxx"]) is (sys.platform != "darwin")
    assert not any(argument.startswith("-std") for argument in extension.extra_compile_args["cxx"])


@pytest.mark.parametrize(
    ("choice", "toolkit", "expected"),
    [(None, True, True), (None, False, False), ("0", True, False), ("0", False, False), ("1", True, True)],
)
def test_cuda_is_built_where_torch_and_toolkit_have_it_unless_told_not_to(
    setup_namespace, monkeypatch, choice, toolkit, expected
):
    if choice is not None:
        monkeypatch.setenv("D2MOE_CUDA", choice)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/toolkit" if toolkit else None)
    assert setup_namespace["with_cuda"]() is expected


def test_a_cuda_build_takes_every_source_and_the_headers_and_cusolver_of_the_wheels(setup_namespace, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    home, real = tmp_path / "home", tmp_path / "toolkit"
    (home / "bin").mkdir(parents=True)
    (real / "lib").mkdir(parents=True)
    (home / "bin" / "nvcc").write_text(f"#!/bin/sh\necho '#$ TOP={real}' >&2\n")
    (home / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(home))
    monkeypatch.setattr(cpp_extension, "CUDAExtension", lambda name, sources, **options: (name, sources, options))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    (tmp_path / "nvidia" / "cu13" / "include").mkdir(parents=True)
    (tmp_path / "nvidia" / "cu13" / "lib").mkdir()
    (tmp_path / "nvidia" / "cu13" / "lib" / "libcusolver.so.12").write_bytes(b"")
    monkeypatch.setattr("site.getsitepackages", lambda: [str(tmp_path)])
    monkeypatch.setattr("torch.__file__", str(tmp_path / "torch" / "__init__.py"))
    _, sources, options = setup_namespace["extension"]()
    csrc = ROOT / "csrc"
    assert set(sources) == {path.relative_to(ROOT).as_posix() for end in ("*.cpp", "*.cu") for path in csrc.rglob(end)}
    headers = options["include_dirs"]
    assert headers.index(str(real / "include")) < headers.index(str(tmp_path / "nvidia" / "cu13" / "include"))
    assert options["library_dirs"] == [str(real / "lib"), str(tmp_path / "nvidia" / "cu13" / "lib")]
    assert "-l:libcusolver.so.12" in options["extra_link_args"]
    assert "-DD2MOE_WITH_CUDA" in options["extra_compile_args"]["cxx"]
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
    setup_namespace["extension"]()
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.6"


def test_cusolver_is_the_toolkits_where_it_has_one(setup_namespace, tmp_path):
    for folder, name in (("toolkit", "libcusolver.so"), ("wheel", "libcusolver.so.12")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(b"")
    folders = [str(tmp_path / folder) for folder in ("empty", "toolkit", "wheel")]
    assert setup_namespace["cusolver"](folders) == "-l:libcusolver.so"
    with pytest.raises(SystemExit, match=r"^A CUDA build needs cuSOLVER, of a CUDA toolkit or of torch's wheels, got none"):
        setup_namespace["cusolver"](folders[:1])


def test_cusolver_is_loaded_from_the_wheels_where_torch_has_not(monkeypatch, tmp_path):
    library = tmp_path / "nvidia" / "cu13" / "lib" / "libcusolver.so.12"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"")
    loaded = []

    def import_module(name):
        if not loaded:
            raise ImportError("libcusolver.so.12: cannot open shared object file: No such file or directory")
        return name

    monkeypatch.setattr("torch.__file__", str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr("ctypes.CDLL", loaded.append)
    monkeypatch.setattr("importlib.import_module", import_module)
    assert _native.import_extension() == "d2moe_ext._C"
    assert loaded == [str(library)]


def test_a_cpu_build_of_torch_never_builds_cuda_of_itself(setup_namespace, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/toolkit")
    assert setup_namespace["with_cuda"]() is False


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            "1",
            "D2MOE_CUDA=1 needs a CUDA build of torch and a CUDA toolkit, got torch.version.cuda=None",
        ),
        ("yes", "D2MOE_CUDA must be 0, 1 or unset, got 'yes'."),
    ],
)
def test_an_impossible_choice_ends_with_one_sentence(setup_namespace, monkeypatch, choice, message):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("D2MOE_CUDA", choice)
    with pytest.raises(SystemExit) as raised:
        setup_namespace["with_cuda"]()
    assert str(raised.value).startswith(message)


def test_kernels_include_no_torch_header():
    """They are what CMakeLists.txt compiles alone."""
    for path in (ROOT / "csrc" / "kernels").rglob("*.*"):
        includes = [line for line in path.read_text().splitlines() if line.startswith("#include")]
        assert not [line for line in includes if re.search("<(torch|ATen|c10)/", line)], path.name


def test_make_builds_before_it_tests():
    """What `make test` would run in a fresh clone: environment, requirements, build, tests, in this order."""
    printed = subprocess.run(
        ["make", "--dry-run", "--always-make", "test"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    steps = ["-m venv", "-r requirements.txt", "--no-build-isolation", "-m pytest"]
    places = [printed.index(step) for step in steps]
    assert places == sorted(places)
    assert "--cov-fail-under=90" in printed
