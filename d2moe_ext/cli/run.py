"""How a command line of this project ends: an exit code, and one sentence for bad input.

Bad input ends with exit code 2 and one sentence on the standard error stream, an interrupt with 130; anything else that goes
wrong is a fault of the program and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from d2moe_ext.cli.common import one_sentence

BAD_INPUT = 2
INTERRUPTED = 130

# The base of every usage error, by whichever click typer carries: newer releases have their own copy of it.
UsageError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def run_app(app: typer.Typer, program: str, name: str, arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Args:
        app: its commands.
        program: how it is called, for its help.
        name: what its sentences begin with.
        arguments: None takes those of the process.
    """
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name=program, standalone_mode=False)
    except UsageError as error:
        return _refuse(name, error.format_message())  # type: ignore[attr-defined]  # typed as Exception for either click
    except (ValueError, OSError) as error:
        return _refuse(name, str(error))
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    # Some releases of typer raise at an interrupt, others return its code.
    if code == INTERRUPTED:
        print("Interrupted.", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _refuse(name: str, message: str) -> int:
    print(f"{name}: {one_sentence(message)}", file=sys.stderr)
    return BAD_INPUT
