"""``python -m tools.gpu_check``: builds the extension for the GPU at hand, tests it there, and watches its memory accesses.

Run by ``make gpu-check RESULTS=folder COMMIT=sha [HEADERS=folder]``, with a Python that has a CUDA build of torch; needs
neither network nor git. Takes less than eight minutes, and writes what it found after every step, so that nothing is lost
where one dies.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils import cpp_extension

from tools.gpu_build import COPY, build, check_headers
from tools.gpu_record import check_commit, check_gpu, check_results, new_record, record_path, write_atomically
from tools.gpu_verdicts import (
    GROUPS,
    OPERATORS,
    SANITIZER_ERROR,
    judge_sanitizer,
    judge_tests,
    read_operators,
    read_tests,
    selection,
)
from tools.limited_run import Ran, run_limited

SECONDS = 465.0  # the whole
BUILD_SECONDS = 210.0
LATER_SECONDS = 150.0  # kept for what comes after the tests
SMALLEST_SECONDS = 40.0
TOOLS = ("memcheck", "racecheck")
NOT_BUILT = "not run: the extension was not built"
Verdict = tuple[bool, str]


class Check:
    """The steps of one check, and the file in which each leaves its verdict.

    Args:
        path: the file.
        record: what it begins with.
        headers: for the build, or None.
        copy: where the extension is built and run.
        run: as :func:`tools.limited_run.run_limited`.
    """

    def __init__(
        self,
        path: Path,
        record: dict[str, Any],
        headers: Path | None,
        copy: Path = COPY,
        run: Callable[..., Ran] = run_limited,
    ) -> None:
        self.record = record | {"operators": {}, "steps": [], "tests": [], "seconds": 0.0, "complete": False}
        self._path, self._headers, self._copy, self._run = path, headers, copy, run
        self._started = time.monotonic()
        self._built = False

    def left(self) -> float:
        """Seconds until the whole must end."""
        return SECONDS - (time.monotonic() - self._started)

    def all_steps(self) -> bool:
        """Run every step; whether all passed."""
        self._save()
        self._step("build", self._build)
        for number, group in enumerate(GROUPS):
            self._step(f"tests: {group}", partial(self._tests, group, len(GROUPS) - number))
        self._step("smallest shapes", self._smallest)
        for number, tool in enumerate(TOOLS):
            self._step(tool, partial(self._sanitizer, tool, len(TOOLS) - number))
        self.record["complete"] = True
        self._save()
        return all(step["passed"] for step in self.record["steps"])

    def _save(self) -> None:
        self.record["seconds"] = round(time.monotonic() - self._started, 1)
        write_atomically(self._path, self.record)

    def _step(self, name: str, run: Callable[[], Verdict]) -> None:
        started = time.monotonic()
        passed, detail = run() if self._built or name == "build" else (False, NOT_BUILT)
        seconds = round(time.monotonic() - started, 1)
        self.record["steps"].append({"name": name, "passed": passed, "seconds": seconds, "detail": detail})
        self._save()
        print(f"{'ok' if passed else 'FAILED'} {name} ({seconds:.0f} s): {detail}", flush=True)

    def _build(self) -> Verdict:
        ran = build(self._headers, BUILD_SECONDS, self._copy, self._run)
        self._built = ran.code == 0
        return self._built, "" if self._built else ran.ending(40)

    def _tests(self, group: str, groups_left: int) -> Verdict:
        """Tests of one group, in its share of the time that is left for tests."""
        file = self._copy / "build" / f"tests-{group}.xml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        options = ["-m", "cuda", "-k", selection(group), "-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={file}"]
        command = [sys.executable, "-m", "pytest", *options, *self._test_files()]
        seconds = (self.left() - LATER_SECONDS) / groups_left
        ran = self._run(command, self._copy, seconds, {"D2MOE_REQUIRE_GPU": "1"})
        tests = read_tests(file, group)
        self.record["tests"] += tests
        return judge_tests(tests, ran, may_be_none=not GROUPS[group])

    def _test_files(self) -> list[str]:
        """Those with tests for a GPU: importing all the others takes time in every group."""
        files = sorted((self._copy / "python_tests").glob("test_*.py"))
        return [str(file.relative_to(self._copy)) for file in files if "mark.cuda" in file.read_text(encoding="utf-8")]

    def _smallest(self) -> Verdict:
        ran = self._run(_smallest_command(), self._copy, SMALLEST_SECONDS, {})
        found = read_operators(ran.output)
        self.record["operators"] = found
        wrong = [f"{name}: {found.get(name, 'nothing')}" for name in OPERATORS if found.get(name) != "ran"]
        detail = "; ".join(f"{name}: {what}" for name, what in found.items())
        if ran.code == 0 and not wrong:
            return True, detail
        return False, "; ".join(wrong) if found else ran.ending()

    def _sanitizer(self, tool: str, tools_left: int) -> Verdict:
        program = find_sanitizer()
        if program is None:
            return False, "not found: compute-sanitizer"
        # A failing call of the CUDA interface is torch's to report, and it looks for functions that a driver may not have.
        options = ["--tool", tool, "--error-exitcode", str(SANITIZER_ERROR)]
        options += ["--report-api-errors", "no"] if tool == "memcheck" else []
        # Without torch's pool of memory, in which a neighbour's bytes are no error.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        ran = self._run([program, *options, *_smallest_command()], self._copy, self.left() / tools_left, environment)
        return judge_sanitizer(ran)


def _smallest_command() -> list[str]:
    return [sys.executable, "-m", "tools.gpu_smallest"]


def find_sanitizer() -> str | None:
    """``compute-sanitizer`` on the path or in the toolkit's folder."""
    home = cpp_extension.CUDA_HOME
    return shutil.which("compute-sanitizer") or (shutil.which("compute-sanitizer", path=f"{home}/bin") if home else None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, test, watch; the exit code is 1 where something failed, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--results", default="", help="the folder that gpu-check-GPU.json is written to")
    parser.add_argument("--commit", default="", help="what is checked; written into the file")
    parser.add_argument("--headers", default="", help="a folder of headers that the toolkit lacks, where compilers look last")
    given = parser.parse_args(arguments)
    try:
        results, commit, headers = check_results(given.results), check_commit(given.commit), check_headers(given.headers)
        check_gpu()
    except ValueError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    record = new_record("gpu-check", commit)
    path = record_path(results, record)
    passed = Check(path, record, headers).all_steps()
    print(f"written: {path}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
