"""The main job end to end on one model: calibrate, compress, save, load, patch, evaluate, generate."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from d2moe_ext import hf
from d2moe_ext.calibration import CalibrationStats, calibrate
from d2moe_ext.cli.common import ProgressCallback, calibration_batches, longest_sequence, token_stream, weight_bytes
from d2moe_ext.cli.output import complete_directory
from d2moe_ext.config import CompressionConfig
from d2moe_ext.evaluate import Speed, generate_tokens, measure_speed, perplexity
from d2moe_ext.text import python_documents, python_text

RATIOS = (0.4, 0.6)
# The default, the paper's pipeline, and the simplest thing both must beat at equal bytes.
METHODS: dict[str, dict[str, Any]] = {
    "quality": {},
    "performance": {"preset": "performance"},
    "mean + plain SVD": {"preset": "performance", "merge": "mean", "decomposition": "plain"},
}
SEED = 0
PROMPT = "A class that"


@dataclass(frozen=True)
class DemoSizes:
    """How much text the demo reads: its figures settle to about 1 % at these sizes, and it ends within 3 minutes."""

    window: int = 256
    calibration_windows: int = 192
    heldout_tokens: int = 24_576
    prefill_tokens: int = 512
    new_tokens: int = 64


@dataclass(frozen=True)
class DemoRow:
    """One model of the table. What only stands there to compare with has no speed and no passage."""

    label: str
    directory: str
    parameters: int
    bytes_on_disk: int
    bytes_planned: int
    perplexity: float
    prefill: float | None
    generate: float | None
    prompt: str | None
    passage: str | None


@dataclass(frozen=True)
class DemoResult:
    rows: list[DemoRow]
    tokens: int
    window: int
    calibration_tokens: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """What ``d2moe demo --json`` prints."""
        return asdict(self)


def heldout_tokens(tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> Tensor:
    """Held-out documents in a fixed random order, int64 ``[num_tokens]``: sorted, one kind would come first."""
    documents = python_documents("heldout")
    random.Random(SEED).shuffle(documents)
    # No tokenizer spends more tokens than a text has bytes, and few spend less than one on 8 of them.
    text = "\n\n".join(documents).encode()[: 8 * num_tokens].decode(errors="ignore")
    return token_stream(tokenizer, text)[:num_tokens]


def _of(label: str, progress: ProgressCallback) -> ProgressCallback:
    """``progress`` with a model's label before each stage, so that every model has bars of its own."""

    def update(stage: str, done: int, total: int) -> None:
        progress(f"{label}: {stage}", done, total)

    return update


class _Demo:
    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, heldout: Tensor, sizes: DemoSizes, progress: ProgressCallback
    ) -> None:
        self.tokenizer, self.heldout, self.sizes, self.progress = tokenizer, heldout, sizes, progress

    def row(self, label: str, model: PreTrainedModel, directory: Path, parameters: int, planned: int, full: bool) -> DemoRow:
        """Evaluate a model; ``full`` also times it and lets it write."""
        quality = perplexity(
            model,
            self.heldout,
            window=self.sizes.window,
            progress=_of(label, self.progress),
        )
        speed = self._speed(model) if full else None
        return DemoRow(
            label=label,
            directory=str(directory),
            parameters=parameters,
            bytes_on_disk=weight_bytes(directory),
            bytes_planned=planned,
            perplexity=quality.perplexity,
            prefill=speed.prefill if speed else None,
            generate=speed.generate if speed else None,
            prompt=PROMPT if full else None,
            passage=self._passage(model) if full else None,
        )

    def _speed(self, model: PreTrainedModel) -> Speed:
        prefill = min(self.sizes.prefill_tokens, longest_sequence(model.config) or self.sizes.prefill_tokens)
        return measure_speed(model, self.heldout, prefill_tokens=prefill, new_tokens=self.sizes.new_tokens)

    def _passage(self, model: PreTrainedModel) -> str:
        prompt = token_stream(self.tokenizer, PROMPT)[None].to(model.device)
        # Drawn, not greedy: a model this small repeats itself when it always takes the likeliest token.
        written = generate_tokens(model, prompt, self.sizes.new_tokens, seed=SEED)
        return str(self.tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True))


def run_demo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: Path,
    out: Path,
    progress: ProgressCallback,
    sizes: DemoSizes | None = None,
) -> DemoResult:
    """Calibrate once, then compress, save, load and evaluate copies.

    Args:
        model: the model to compress; it stays as it is.
        tokenizer: its tokenizer.
        source: the directory it came from, whose weights' bytes count as "before".
        out: where one directory per compressed model goes; those of an earlier demo are replaced.
        progress: called with ``(stage, done, total)``.
        sizes: how much text is read; ``None``: what the demo takes.
    """
    sizes = sizes or DemoSizes()
    start = time.perf_counter()
    tokens = token_stream(tokenizer, python_text("calibration"))
    batches = calibration_batches(tokens, sizes.calibration_windows, sizes.window, batch_size=8, seed=SEED)
    stats = calibrate(model, batches, merge="fisher", progress=progress)
    demo = _Demo(tokenizer, heldout_tokens(tokenizer, sizes.heldout_tokens), sizes, progress)
    rows: list[DemoRow] = []
    for label, directory, plan in _compressed_copies(model, tokenizer, stats, out, progress):
        if not rows:
            rows.append(demo.row("original", model, source, plan["total_parameters"], plan["bytes_before"], full=True))
        loaded = hf.patch_model(AutoModelForCausalLM.from_pretrained(directory))
        full = label.endswith(next(iter(METHODS)))
        rows.append(demo.row(label, loaded, directory, plan["stored_parameters"], plan["bytes_after"], full))
    return DemoResult(
        rows=rows,
        tokens=demo.heldout.numel() - 1,
        window=sizes.window,
        calibration_tokens=sizes.calibration_windows * sizes.window,
        seconds=time.perf_counter() - start,
    )


def _compressed_copies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stats: CalibrationStats,
    out: Path,
    progress: ProgressCallback,
) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """Label, directory and plan of each compressed copy, once it is saved."""
    for ratio in RATIOS:
        for method, options in METHODS.items():
            label = f"{ratio}: {method}"
            copied = copy.deepcopy(model)
            config = CompressionConfig(ratio=ratio, **options)
            report = hf.compress(copied, stats, config, progress=_of(label, progress))
            directory = out / f"ratio-{ratio}-{config.preset}-{config.merge}"
            with complete_directory(directory) as partial:
                copied.save_pretrained(partial)
                tokenizer.save_pretrained(partial)
            yield label, directory, report.plan.to_dict()
