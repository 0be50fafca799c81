"""The command ``d2moe``.

Bad input ends with exit code 2 and one sentence on the standard error stream, an interrupt with 130; anything else
that goes wrong is a fault of this program and keeps its traceback. Nothing here imports torch before a command runs,
so that ``--help`` and misspelled options answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from d2moe_ext.cli import analyze, bench, compress, demo, evaluate, inspect, plan
from d2moe_ext.cli.common import one_sentence

BAD_INPUT = 2
INTERRUPTED = 130

# The base of every usage error, by whichever click typer carries: newer releases have their own copy of it.
UsageError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    name="d2moe",
    help="Compress Mixture-of-Experts language models: one shared base per layer, one low-rank delta per expert.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("analyze")(analyze.analyze_command)
app.command("compress")(compress.compress_command)
app.command("eval")(evaluate.evaluate_command)
app.command("plan")(plan.plan_command)
app.command("inspect")(inspect.inspect_command)
app.command("bench")(bench.bench_command)
app.command("demo")(demo.demo_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="d2moe", standalone_mode=False)
    except UsageError as error:
        return _refuse(error.format_message())  # type: ignore[attr-defined]  # typed as Exception for either click
    except (ValueError, OSError) as error:
        return _refuse(str(error))
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    # Some releases of typer raise at an interrupt, others return its code.
    if code == INTERRUPTED:
        print("Interrupted.", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _refuse(message: str) -> int:
    print(f"d2moe: {one_sentence(message)}", file=sys.stderr)
    return BAD_INPUT
