"""The command ``d2moe``.

Nothing here imports torch before a command runs, so that ``--help`` and misspelled options answer at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import typer

from d2moe_ext.cli import analyze, bench, compress, demo, evaluate, inspect, plan
from d2moe_ext.cli.run import run_app

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
    return run_app(app, "d2moe", "d2moe", arguments)
