"""``d2moe eval``: perplexity on a text, or tasks of lm-evaluation-harness."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2moe_ext.cli import common
from d2moe_ext.cli.options import DeviceOption, DtypeOption, JsonOption, ModelArgument, TrustOption

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DEFAULT_SEQLEN = 2048


def evaluate_command(
    model: ModelArgument,
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text file, for perplexity.")] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Tasks of lm-evaluation-harness, with commas, in place of --text.")
    ] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens per window; without it 2048, or what the model can take.")] = None,
    stride: Annotated[int | None, typer.Option(help="How far the window moves; without it, by its length.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Read only the text's first tokens.")] = None,
    include_path: Annotated[Path | None, typer.Option(metavar="DIR", help="A directory with more task files.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Solved examples before each; without it, as the task says.")] = None,
    limit: Annotated[int | None, typer.Option(help="Score only the first examples of each task.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per forward; 1 where dynamic pruning is on.")] = 8,
    dynamic: Annotated[
        bool, typer.Option("--dynamic/--no-dynamic", help="Dynamic pruning; without it all kept columns are used.")
    ] = True,
    patch: Annotated[
        bool | None,
        typer.Option("--patch/--no-patch", help="Use the native operators; without a word, for compressed models."),
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure MODEL's perplexity on a text or its accuracy on tasks, and say whether dynamic pruning was on."""
    if (text is None) == (tasks is None):
        raise ValueError(f"eval needs one of --text and --tasks, got {'neither' if text is None else 'both'}.")
    if text is None:
        _refuse("--text", {"--stride": stride, "--max-tokens": max_tokens})
    else:
        _refuse("--tasks", {"--include-path": include_path, "--num-fewshot": num_fewshot, "--limit": limit})
    content = None if text is None else common.read_text("--text", text)
    network = common.load_model(model, dtype, trust_remote_code, device)
    window = common.default_seqlen(network.config, _DEFAULT_SEQLEN) if seqlen is None else seqlen
    common.check_seqlen("--seqlen", window, network.config)
    tokenizer = common.load_tokenizer(model, trust_remote_code)
    start = time.perf_counter()
    if content is not None:
        tokens = common.token_stream(tokenizer, content)[:max_tokens]
        if tokens.numel() < 2:
            raise ValueError(f"--text must hold at least 2 tokens, got {tokens.numel()}.")
        settings = _prepare(network, dynamic, patch)
        record = _perplexity(network, tokens, window, stride, batch_size)
    else:
        settings = _prepare(network, dynamic, patch)
        options = {"include_path": include_path, "num_fewshot": num_fewshot, "limit": limit}
        record = _tasks(network, tokenizer, tasks or "", max_length=window, batch_size=batch_size, **options)
    record |= settings | {"seqlen": window, "seconds": round(time.perf_counter() - start, 3)}
    if as_json:
        common.print_json(record)
    else:
        from d2moe_ext.report import evaluation_table, task_table

        table = evaluation_table(record) if tasks is None else task_table(record)
        common.stdout_console().print(table)


def _refuse(wanted: str, options: dict[str, Any]) -> None:
    for option, value in options.items():
        if value is not None:
            raise ValueError(f"{option} must stand with {wanted}, got it without.")


def _prepare(network: PreTrainedModel, dynamic: bool, patch: bool | None) -> dict[str, bool]:
    """Put in the native operators and set dynamic pruning; say what is so now."""
    from d2moe_ext import hf
    from d2moe_ext.evaluate import compressed_experts, set_dynamic

    compressed = next(compressed_experts(network), None) is not None
    patched = compressed if patch is None else patch
    if patched:
        hf.patch_model(network)
    set_dynamic(network, dynamic)
    return {"compressed": compressed, "native_operators": patched}


def _perplexity(network: PreTrainedModel, tokens: Tensor, window: int, stride: int | None, batch_size: int) -> dict[str, Any]:
    from d2moe_ext.evaluate import perplexity

    with common.progress_bar() as progress:
        result = perplexity(network, tokens, window=window, stride=stride, batch_size=batch_size, progress=progress)
    return {
        "perplexity": result.perplexity,
        "tokens": result.tokens,
        "dynamic_pruning": result.dynamic,
        "stride": window if stride is None else stride,
        "batch_size": result.batch_size,
    }


def _tasks(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: str, **options: Any) -> dict[str, Any]:
    from d2moe_ext.tasks import evaluate_tasks

    wanted = [name for part in names.split(",") if (name := part.strip())]
    with _bars_on_a_terminal_only():
        result = evaluate_tasks(network, tokenizer, wanted, **options)
    return {
        "scores": [asdict(score) for score in result.scores],
        "dynamic_pruning": result.dynamic,
        "batch_size": result.batch_size,
    }


@contextlib.contextmanager
def _bars_on_a_terminal_only() -> Iterator[None]:
    """lm_eval draws its progress bars on the standard error stream whatever that is; a log or a pipe gets nothing."""
    with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
        yield
