"""``d2moe eval``: perplexity on a text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from d2moe_ext.cli import common
from d2moe_ext.cli.options import DtypeOption, JsonOption, ModelArgument, TrustOption

_DEFAULT_SEQLEN = 2048


def evaluate_command(
    model: ModelArgument,
    text: Annotated[Path, typer.Option(help="A UTF-8 text file.")],
    seqlen: Annotated[int | None, typer.Option(help="Tokens per window; without it 2048, or what the model can take.")] = None,
    stride: Annotated[int | None, typer.Option(help="How far the window moves; without it, by its length.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Read only the text's first tokens.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows per forward; 1 where dynamic pruning is on.")] = 8,
    dynamic: Annotated[
        bool, typer.Option("--dynamic/--no-dynamic", help="Dynamic pruning; without it all kept columns are used.")
    ] = True,
    patch: Annotated[
        bool | None,
        typer.Option("--patch/--no-patch", help="Use the native operators; without a word, for compressed models."),
    ] = None,
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure MODEL's perplexity on a text, by a sliding window, and say whether dynamic pruning was on."""
    content = common.read_text("--text", text)
    network = common.load_model(model, dtype, trust_remote_code)
    window = common.default_seqlen(network.config, _DEFAULT_SEQLEN) if seqlen is None else seqlen
    common.check_seqlen("--seqlen", window, network.config)
    tokens = common.token_stream(common.load_tokenizer(model, trust_remote_code), content)[:max_tokens]
    if tokens.numel() < 2:
        raise ValueError(f"--text must hold at least 2 tokens, got {tokens.numel()}.")

    from d2moe_ext import hf
    from d2moe_ext.evaluate import compressed_experts, perplexity, set_dynamic

    compressed = next(compressed_experts(network), None) is not None
    patched = compressed if patch is None else patch
    if patched:
        hf.patch_model(network)
    set_dynamic(network, dynamic)
    start = time.perf_counter()
    with common.progress_bar() as progress:
        result = perplexity(network, tokens, window=window, stride=stride, batch_size=batch_size, progress=progress)
    record = {
        "perplexity": result.perplexity,
        "tokens": result.tokens,
        "dynamic_pruning": result.dynamic,
        "compressed": compressed,
        "native_operators": patched,
        "seqlen": window,
        "stride": window if stride is None else stride,
        "batch_size": result.batch_size,
        "seconds": round(time.perf_counter() - start, 3),
    }
    if as_json:
        common.print_json(record)
    else:
        from d2moe_ext.report import evaluation_table

        common.stdout_console().print(evaluation_table(record))
