"""What the check of the CUDA build reads in a compiler's output, and what it complains of."""

from __future__ import annotations

import pytest

from tools import cuda_build_check
from tools.ptxas import Kernel, read_kernels

LOG = """
[1/2] nvcc -O3 -c a.cu
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z3onev' for 'sm_80'
ptxas info    : Function properties for _Z3onev
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes stack, 1184 bytes smem, 400 bytes cmem[0]
ptxas info    : Compile time = 3.014 ms
ptxas info    : Compiling entry function '_Z3twov' for 'sm_90'
ptxas info    : Function properties for _Z3twov
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
"""
ONE = Kernel("_Z3onev", "sm_80", 40, 1184, 16, 8, 12)
TWO = Kernel("_Z3twov", "sm_90", 12, 0, 0, 0, 0)
OPERATORS = {"column_select": True, "moe_forward": True}


def test_kernels_of_a_log():
    assert list(read_kernels(LOG)) == [ONE, TWO]
    assert ONE.spills == 20
    assert list(read_kernels("nothing of ptxas")) == []


@pytest.mark.parametrize("gone", ["ptxas info    : Used 40", "    16 bytes stack", "ptxas info    : Used 12"])
def test_a_log_that_lacks_something_is_refused(gone):
    lines = [line for line in LOG.splitlines() if not line.startswith(gone)]
    with pytest.raises(ValueError, match="ptxas must say the (registers|spills) of _Z3"):
        list(read_kernels("\n".join(lines)))


def test_all_well():
    assert cuda_build_check.complaints(OPERATORS, [TWO]) == []


def test_a_spill_needs_a_reason(monkeypatch):
    assert cuda_build_check.complaints(OPERATORS, [ONE, TWO]) == ["_Z3onev (sm_80) must not spill registers, got 20 bytes."]
    monkeypatch.setattr(cuda_build_check, "SPILLS", {"3one": "for this test"})
    assert cuda_build_check.complaints(OPERATORS, [ONE, TWO]) == []


def test_an_operator_without_a_kernel():
    found = cuda_build_check.complaints(OPERATORS | {"column_select": False}, [TWO])
    assert found == ["column_select must have a CUDA kernel, got none."]


def test_nothing_found_is_wrong():
    found = cuda_build_check.complaints({}, [])
    assert "the extension must define operators, got none." in found
    assert "ptxas must report kernels, got none." in found


def test_a_build_that_fails_ends_with_one_sentence(monkeypatch, tmp_path):
    (tmp_path / "setup.py").write_text("raise SystemExit('no compiler')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="the build must succeed, got exit code 1"):
        cuda_build_check.build()


def test_the_build_is_asked_to_report_its_kernels(monkeypatch, tmp_path, capfd):
    (tmp_path / "setup.py").write_text("import os; print(os.environ['NVCC_APPEND_FLAGS'], os.environ['D2MOE_CUDA'])")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert cuda_build_check.build() == "-Xptxas -v 1\n"


def test_main(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cuda_build_check, "build", lambda: LOG)
    monkeypatch.setattr(cuda_build_check, "cuda_operators", lambda: OPERATORS)
    monkeypatch.setattr("sys.argv", ["cuda_build_check", "--log", str(tmp_path / "folder" / "log")])
    assert cuda_build_check.main() == 1
    printed = capsys.readouterr()
    assert "sm_80         1        40    1184     16     20  one" in printed.out
    assert "built and loaded, not run here: column_select, moe_forward." in printed.out
    assert "must not spill registers, got 20 bytes" in printed.err
    assert (tmp_path / "folder" / "log").read_text() == LOG
    monkeypatch.setattr(
        cuda_build_check,
        "build",
        lambda: LOG.replace("8 bytes spill", "0 bytes spill").replace("12 bytes spill", "0 bytes spill"),
    )
    assert cuda_build_check.main() == 0
