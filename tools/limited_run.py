"""Runs a program that may take no longer than it is given."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ran:
    """How a program ended.

    Attributes:
        code: its exit code, negative where a signal ended it; None where its time was up.
        output: both of its streams.
        seconds: that it took.
    """

    code: int | None
    output: str
    seconds: float

    def ending(self, lines: int = 12) -> str:
        """How it ended and the last lines that it printed."""
        how = f"stopped after {self.seconds:.0f} s" if self.code is None else f"exit code {self.code}"
        return "\n".join([how, *self.output.strip().splitlines()[-lines:]])


def run_limited(command: Sequence[str], folder: Path, seconds: float, environment: Mapping[str, str]) -> Ran:
    """Run a program; when its time is up, end it and everything that it started.

    Args:
        command: program and arguments.
        folder: where it runs.
        seconds: that it may take.
        environment: added to this process's own.
    """
    started = time.monotonic()
    # A file and no pipe: a grandchild that holds on to it cannot keep this process waiting.
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(timeout=max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Ran(code, text, time.monotonic() - started)
