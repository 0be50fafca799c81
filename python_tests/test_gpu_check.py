"""What ``make gpu-check`` writes, whatever becomes of its steps; no GPU is needed: what it runs is made up."""

from __future__ import annotations

import json
import sys
import time
from functools import partial

import pytest

from d2moe_ext import ops
from tools import gpu_build, gpu_check, gpu_record, gpu_smallest, gpu_verdicts, limited_run
from tools.limited_run import Ran, run_limited

COMMIT = "0123abc"
CASE = '<testcase classname="test_a" name="test_{0}" time="0.5">{1}</testcase>'
CLEAN = {"memcheck": "========= ERROR SUMMARY: 0 errors", "racecheck": "========= RACECHECK SUMMARY: 0 hazards displayed"}


def junit(file, **cases):
    body = "".join(CASE.format(name, inside) for name, inside in cases.items())
    file.write_text(f"<testsuites><testsuite>{body}</testsuite></testsuites>")


class FakeRun:
    """Stands in for every program that the check runs; ``changes`` maps a word of a command, or the group whose tests it runs,
    to what becomes of it."""

    def __init__(self, copy, **changes):
        self.copy, self.changes, self.calls = copy, changes, []

    def __call__(self, command, folder, seconds, environment):
        self.calls.append((list(command), seconds, environment))
        assert folder == self.copy
        assert seconds > 0
        for part, ran in self.changes.items():
            if part in command or any(word.endswith(f"tests-{part}.xml") for word in command):
                return ran() if callable(ran) else ran
        if "pytest" in command:
            return self.pytest(command)
        if "tools.gpu_smallest" in command:
            lines = [f"operator {name} ran" for name in gpu_verdicts.OPERATORS]
            return Ran(0, "\n".join([*lines, *(CLEAN[tool] for tool in CLEAN if tool in command)]), 1.0)
        return Ran(0, "compiled", 1.0)

    def pytest(self, command):
        (option,) = [word for word in command if word.startswith("--junitxml=")]
        if option.endswith("tests-others.xml"):
            return Ran(5, "no tests ran", 1.0)
        junit(self.copy / "build" / option.rpartition("/")[2], one="", two="")
        return Ran(0, "2 passed", 1.0)


@pytest.fixture
def fake_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=0: (9, 0))
    about = {"name": "Some GPU (80 GB)", "capability": "9.0", "memory_bytes": 80, "driver": "1.2"}
    monkeypatch.setattr(gpu_record, "describe_gpu", lambda: about)
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: "compute-sanitizer")
    monkeypatch.setattr(gpu_build, "mirror", lambda root, copy: None)


@pytest.fixture
def check(fake_gpu, tmp_path):
    """Runs all steps with some of the programs changed; gives the file's record and what was run."""

    def run(**changes):
        copy = tmp_path / "copy"
        tests = copy / "python_tests"
        tests.mkdir(parents=True, exist_ok=True)
        (tests / "test_gpu.py").write_text("pytest.mark.cuda")
        (tests / "test_cpu.py").write_text("nothing")
        record = gpu_record.new_record("gpu-check", COMMIT)
        path = gpu_record.record_path(tmp_path / "results", record)
        programs = FakeRun(copy, **changes)
        passed = gpu_check.Check(path, record, None, copy, programs).all_steps()
        found = json.loads(path.read_text())
        assert passed == all(step["passed"] for step in found["steps"])
        return found, programs

    return run


def steps_of(record):
    return {step["name"]: step for step in record["steps"]}


def test_all_well(check, tmp_path):
    record, programs = check()
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["gpu-check-some-gpu-80-gb.json"]
    assert (record["kind"], record["commit"], record["gpu"]["capability"]) == ("gpu-check", COMMIT, "9.0")
    assert set(record["versions"]) == {"torch", "cuda", "transformers", "python", "nvcc"}
    assert list(steps_of(record)) == [
        "build",
        *(f"tests: {group}" for group in gpu_verdicts.GROUPS),
        "smallest shapes",
        "memcheck",
        "racecheck",
    ]
    assert all(step["passed"] for step in record["steps"])
    assert record["complete"]
    assert record["operators"]["column_select"] == "ran"
    assert {test["group"] for test in record["tests"]} == {*gpu_verdicts.GROUPS} - {gpu_verdicts.OTHERS}
    assert record["tests"][0]["name"] == "test_a::test_one"
    assert (record["tests"][0]["outcome"], record["tests"][0]["seconds"]) == ("passed", 0.5)
    build, *rest = programs.calls
    assert build[2]["TORCH_CUDA_ARCH_LIST"] == "9.0"
    tests = [call for call in rest if "pytest" in call[0]]
    assert all(call[2] == {"D2MOE_REQUIRE_GPU": "1"} for call in tests)
    assert all(call[0][-1] == "python_tests/test_gpu.py" for call in tests)


def test_all_steps_stay_within_the_whole(check):
    _, programs = check()
    tests = [seconds for command, seconds, _ in programs.calls if "pytest" in command]
    assert max(tests) <= gpu_check.SECONDS - gpu_check.LATER_SECONDS
    # As if every step took all it was given.
    slowest_tests = gpu_check.SECONDS - gpu_check.BUILD_SECONDS - gpu_check.LATER_SECONDS
    assert slowest_tests > 0
    assert gpu_check.SMALLEST_SECONDS < gpu_check.LATER_SECONDS
    assert gpu_check.SECONDS < 480


def test_a_build_that_fails(check):
    record, programs = check(**{"setup.py": Ran(1, "error: no such header", 2.0)})
    assert len(programs.calls) == 1
    steps = steps_of(record)
    assert not steps["build"]["passed"]
    assert "exit code 1\nerror: no such header" in steps["build"]["detail"]
    assert {step["detail"] for name, step in steps.items() if name != "build"} == {gpu_check.NOT_BUILT}
    assert not any(step["passed"] for step in record["steps"])


def test_a_test_that_fails(check, tmp_path):
    def fail():
        file = tmp_path / "copy" / "build" / "tests-gram_update.xml"
        junit(file, good="", bad='<failure message="off by 2"/>', none='<skipped message="too old"/>')
        return Ran(1, "1 failed", 3.0)

    record, _ = check(gram_update=fail)
    step = steps_of(record)["tests: gram_update"]
    assert not step["passed"]
    assert step["detail"].startswith("1 passed, 1 failed, 1 skipped; exit code 1")
    outcomes = {test["name"]: (test["outcome"], test["message"]) for test in record["tests"] if test["group"] == "gram_update"}
    assert outcomes == {
        "test_a::test_good": ("passed", ""),
        "test_a::test_bad": ("failed", "off by 2"),
        "test_a::test_none": ("skipped", "too old"),
    }
    assert steps_of(record)["tests: whitened_svd"]["passed"]


def test_tests_that_do_not_end_leave_the_others_theirs(check):
    record, _ = check(column_select=Ran(None, "....", 40.0))
    steps = steps_of(record)
    assert steps["tests: column_select"]["detail"] == "stopped after 40 s\n...."
    assert not steps["tests: column_select"]["passed"]
    assert steps["tests: gram_update"]["passed"]


def test_an_operator_with_a_kernel_must_have_tests(check):
    record, _ = check(gram_update=Ran(5, "no tests ran", 1.0))
    step = steps_of(record)["tests: gram_update"]
    assert (step["passed"], step["detail"]) == (False, "no test")
    assert steps_of(record)["tests: others"]["passed"]


def test_an_operator_that_lost_its_kernel(check):
    lines = "operator column_select no CUDA kernel\noperator gram_update_ ran"
    record, _ = check(**{"tools.gpu_smallest": Ran(0, lines, 1.0)})
    step = steps_of(record)["smallest shapes"]
    assert not step["passed"]
    assert "column_select: no CUDA kernel; whitened_svd: nothing" in step["detail"]
    assert record["operators"] == {"column_select": "no CUDA kernel", "gram_update_": "ran"}


def test_the_sanitizer_finds_something(check):
    said = "========= Invalid __global__ read of size 4 bytes\n=========     at kernel\n========= ERROR SUMMARY: 1 error"
    record, programs = check(memcheck=Ran(99, said, 5.0))
    step = steps_of(record)["memcheck"]
    assert not step["passed"]
    assert step["detail"].startswith("ERROR SUMMARY: 1 error\nInvalid __global__ read of size 4 bytes")
    assert steps_of(record)["racecheck"]["passed"]
    (watched,) = [call for call in programs.calls if "racecheck" in call[0]]
    assert watched[0][:5] == ["compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "99"]
    assert watched[2] == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def test_a_run_that_was_not_watched_proves_nothing(check):
    record, _ = check(memcheck=Ran(0, "operator column_select ran", 5.0))
    step = steps_of(record)["memcheck"]
    assert not step["passed"]
    assert step["detail"].startswith("no summary; exit code 0")


def test_no_sanitizer(check, monkeypatch):
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: None)
    record, _ = check()
    assert [steps_of(record)[tool]["detail"] for tool in gpu_check.TOOLS] == ["not found: compute-sanitizer"] * 2
    assert not steps_of(record)["memcheck"]["passed"]


def test_what_was_found_stays_where_a_step_dies(check, tmp_path):
    def die():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check(racecheck=die)
    record = json.loads((tmp_path / "results" / "gpu-check-some-gpu-80-gb.json").read_text())
    assert steps_of(record)["memcheck"]["passed"]
    assert "racecheck" not in steps_of(record)
    assert not record["complete"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--results must name a folder, got ''."),
        (["--results", "r"], "--commit must be 7 to 40 hexadecimal digits, got ''."),
        (["--results", "r", "--commit", "main"], "--commit must be 7 to 40 hexadecimal digits, got 'main'."),
        (["--results", "r", "--commit", COMMIT, "--headers", "none"], "--headers must be a folder, got 'none'."),
        (["--results", "r", "--commit", COMMIT], "torch must find a GPU, got none with torch "),
    ],
)
def test_bad_input(options, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_check.main(options) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"gpu_check: {message}")
    assert printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_main(fake_gpu, monkeypatch, tmp_path, capsys):
    copy = tmp_path / "copy"
    (copy / "python_tests").mkdir(parents=True)
    programs = FakeRun(copy)
    monkeypatch.setattr(gpu_check, "Check", partial(gpu_check.Check, copy=copy, run=programs))
    arguments = ["--results", str(tmp_path / "new"), "--commit", COMMIT]
    assert gpu_check.main(arguments) == 0
    assert "ok racecheck" in capsys.readouterr().out
    programs.changes["memcheck"] = Ran(1, "", 1.0)
    assert gpu_check.main(arguments) == 1


def test_the_copy_follows_the_sources(tmp_path):
    root, copy = tmp_path / "root", tmp_path / "root" / "build" / "gpu"
    kept = {"a.py": "1", "csrc/b.cpp": "2"}
    left_out = [".git/x", ".venv-oldest/x", "build/x", "a/__pycache__/x", "d.egg-info/x", "d2moe_ext/_C.so"]
    for name, text in [*kept.items(), *((name, "") for name in left_out)]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    copy.mkdir(parents=True)
    gpu_build.mirror(root, copy)
    assert {path.as_posix() for path in gpu_build.sources(copy)} == set(kept)
    assert sum(path.is_file() for path in copy.rglob("*")) == len(kept)
    (copy / "_C.so").write_text("built")
    before = (copy / "csrc" / "b.cpp").stat().st_mtime_ns
    (root / "a.py").unlink()
    (root / "c.py").write_text("3")
    (root / "csrc" / "b.cpp").touch()
    gpu_build.mirror(root, copy)
    assert {path.as_posix() for path in gpu_build.sources(copy)} == {"c.py", "csrc/b.cpp"}
    assert (copy / "csrc" / "b.cpp").stat().st_mtime_ns == before
    assert (copy / "_C.so").is_file()


def test_the_build_is_told_where_headers_are(fake_gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("CPATH", "others")
    assert gpu_build.build_environment(tmp_path)["CPATH"] == f"others:{tmp_path}"
    monkeypatch.delenv("CPATH")
    assert gpu_build.build_environment(tmp_path)["CPATH"] == str(tmp_path)
    assert "CPATH" not in gpu_build.build_environment(None)


def test_building_alone(fake_gpu, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu_build"])
    monkeypatch.setattr(gpu_build, "build", lambda headers, seconds: Ran(0, "", 1.0))
    assert gpu_build.main() == 0
    monkeypatch.setattr(gpu_build, "build", lambda headers, seconds: Ran(1, "no compiler", 1.0))
    assert gpu_build.main() == 1
    assert "gpu_build: the build must succeed, got exit code 1\nno compiler" in capsys.readouterr().err


def test_a_record_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.json"
    gpu_record.write_atomically(path, {"value": 1})
    with pytest.raises(ValueError, match="JSON"):
        gpu_record.write_atomically(path, {"value": float("nan")})

    def interrupted(source, target):
        assert json.loads(source.read_text()) == {"value": 2}
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            gpu_record.write_atomically(path, {"value": 2})
    assert json.loads(path.read_text()) == {"value": 1}
    gpu_record.write_atomically(path, {"value": 3})
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


def test_a_program_is_ended_with_what_it_started(tmp_path):
    sleep = "[sys.executable, '-c', 'import time; time.sleep(60)']"
    child = f"import subprocess, sys; print('begun', flush=True); subprocess.run({sleep})"
    started = time.monotonic()
    ran = run_limited([sys.executable, "-c", child], tmp_path, 1.0, {})
    assert time.monotonic() - started < 20
    assert (ran.code, ran.output) == (None, "begun\n")
    ran = run_limited([sys.executable, "-c", "import os, sys; print(os.environ['A']); sys.exit(3)"], tmp_path, 20.0, {"A": "b"})
    assert (ran.code, ran.ending()) == (3, "exit code 3\nb")
    assert isinstance(ran, limited_run.Ran)


def test_every_operator_has_a_small_call():
    assert set(gpu_smallest.CALLS) == set(gpu_verdicts.OPERATORS) == set(ops.__all__)
    assert {name for group in gpu_verdicts.GROUPS.values() for name in group} == set(ops.__all__)
    for name in ops.__all__:
        assert gpu_smallest.call(name, "cpu") == "ran"


def test_small_calls_say_what_became_of_them(monkeypatch, capsys):
    def fails(device):
        raise RuntimeError("an illegal\nmemory access")

    monkeypatch.setattr("sys.argv", ["gpu_smallest", "--device", "cpu"])
    monkeypatch.setattr(gpu_smallest, "CALLS", {"gram_update_": fails})
    assert gpu_smallest.main() == 1
    found = gpu_verdicts.read_operators(capsys.readouterr().out)
    assert found == {"gram_update_": "failed: an illegal memory access"}


def test_selections_share_out_all_tests():
    assert gpu_verdicts.selection("gram_update") == "gram_update"
    assert gpu_verdicts.selection("others") == (
        "not fisher_merge and not column_select and not whitened_svd and not gram_update and not moe"
    )
