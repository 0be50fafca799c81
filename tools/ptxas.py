"""Reads what ``ptxas -v`` says of each kernel: registers, shared memory, spills."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'")
_SPILLS = re.compile(r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (?P<registers>\d+) registers")
_SHARED = re.compile(r"(?P<shared>\d+)(?: bytes|\+\d+ bytes)? smem")


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture; sizes in bytes."""

    name: str
    arch: str
    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def spills(self) -> int:
        """Bytes that go to memory and back for want of registers."""
        return self.spill_stores + self.spill_loads


def read_kernels(log: str) -> Iterator[Kernel]:
    """The kernels of a build's output, in its order.

    Raises:
        ValueError: a kernel was begun and its sizes are not there: the log is cut off, or ptxas prints something new.
    """
    entry: re.Match[str] | None = None
    spills: re.Match[str] | None = None
    for line in log.splitlines():
        found = _ENTRY.search(line)
        if found:
            if entry is not None:
                raise ValueError(f"ptxas must say the registers of {entry['name']}, got the next kernel instead.")
            entry, spills = found, None
        elif entry is not None:
            spills = _SPILLS.search(line) or spills
            registers = _REGISTERS.search(line)
            if registers:
                if spills is None:
                    raise ValueError(f"ptxas must say the spills of {entry['name']}, got {line.strip()!r} before them.")
                shared = _SHARED.search(line)
                yield Kernel(
                    entry["name"],
                    entry["arch"],
                    int(registers["registers"]),
                    int(shared["shared"]) if shared else 0,
                    int(spills["stack"]),
                    int(spills["stores"]),
                    int(spills["loads"]),
                )
                entry = None
    if entry is not None:
        raise ValueError(f"ptxas must say the registers of {entry['name']}, got the end of its output.")
