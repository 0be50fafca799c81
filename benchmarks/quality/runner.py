"""Runs methods on one model and appends what it measures."""

from __future__ import annotations

import copy
import datetime
import hashlib
import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

import d2moe_ext
from benchmarks.quality.machine import describe_machine, peak_growth
from benchmarks.quality.methods import round_stored
from benchmarks.quality.parts import PARTS, Line
from benchmarks.quality.results import UNCOMPRESSED, Key, Results, Row, Sizes, Source
from benchmarks.quality.texts import Text, Use, domain_text, outside_text
from benchmarks.study import FLOAT_BYTES, Calibration, Method, byte_budget, capture_inputs, method_version, model_parameters
from d2moe_ext.adapters import find_experts
from d2moe_ext.calibration import calibrate
from d2moe_ext.cli.common import calibration_batches, load_model, load_tokenizer, one_sentence, token_stream
from d2moe_ext.evaluate import perplexity

CALIBRATION_BATCH = 8
EVALUATION_BATCH = 8


@dataclass(frozen=True)
class Task:
    """One row to measure."""

    line: Line
    ratio: float
    seed: int


class Laboratory:
    """One model, read once, with its texts and the results it adds to.

    Args:
        model: its directory.
        sources: text files by use, as :func:`benchmarks.quality.texts.parse_texts` gives them.
        judge: ``selection`` or ``test``: only that text is read.
        sizes: how much is read.
        methods: by name.
        results: where rows are looked up and appended.
        command: recorded in every row.
        report: called with a line of text for each row.
    """

    def __init__(
        self,
        model: Path,
        sources: Mapping[str, str],
        judge: Use,
        sizes: Sizes,
        methods: Mapping[str, Method],
        results: Results,
        command: str,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.sizes, self.methods, self.results, self.command, self.report = sizes, methods, results, command, report
        self.model = load_model(str(model), "float32")
        round_stored(self.model)
        self.tokenizer = load_tokenizer(str(model))
        self.texts = {"calibration": domain_text(sources, "calibration"), "out": outside_text(sources, "calibration")}
        judging = {"in": domain_text(sources, judge), "out": outside_text(sources, judge)}
        self.judging = {name: self._first_tokens(text) for name, text in judging.items()}
        self._batches = lru_cache(maxsize=2)(self._tokens)
        self.blank = Key(
            model=model.resolve().name,
            weights=_digest(model),
            method=UNCOMPRESSED,
            version=1,
            ratio=0.0,
            seed=0,
            samples=0,
            seqlen=0,
            source="calibration",
            judge=judge,
            text_calibration="",
            text_in=judging["in"].label,
            text_out=judging["out"].label,
            tokens=sizes.tokens,
            window=sizes.window,
        )

    def _tokens(self, source: Source) -> Tensor:
        return token_stream(self.tokenizer, self.texts[source].content)

    def _first_tokens(self, text: Text) -> Tensor:
        tokens = token_stream(self.tokenizer, text.content)
        if len(tokens) < self.sizes.tokens:
            raise ValueError(f"--tokens must be at most the {len(tokens)} of {text.name}, got {self.sizes.tokens}.")
        return tokens[: self.sizes.tokens]

    def key(self, task: Task) -> Key:
        """The key of a task's row."""
        line = task.line
        return replace(
            self.blank,
            method=line.method,
            version=method_version(self.methods[line.method]),
            ratio=task.ratio,
            seed=task.seed,
            samples=line.samples or self.sizes.samples,
            seqlen=self.sizes.seqlen,
            source=line.source,
            text_calibration=self.texts[line.source].label,
        )

    def run(self, tasks: Sequence[Task], retry_failed: bool = False) -> list[Row]:
        """Measure every task whose row is not there yet; seed by seed, each calibration taken once.

        Returns:
            The rows measured now.
        """
        keys = list(dict.fromkeys(self.key(task) for task in tasks))
        missing = [key for key in keys if not self.results.has(key, retry_failed)]
        if not missing:
            return []
        rows = [] if self.results.has(self.blank) else [self._keep(self._uncompressed())]
        for calibration, keys in self._by_calibration(missing):
            rows += [self._keep(self._measure(key, calibration)) for key in keys]
        return rows

    def _by_calibration(self, keys: list[Key]) -> Iterator[tuple[Calibration, list[Key]]]:
        settings = sorted({(key.seed, key.samples, key.source) for key in keys})
        for seed, samples, source in settings:
            group = [key for key in keys if (key.seed, key.samples, key.source) == (seed, samples, source)]
            yield self.calibration(seed, samples, source), group

    def calibration(self, seed: int, samples: int, source: Source) -> Calibration:
        """What the methods may look at."""
        tokens = self._batches(source)
        batches = calibration_batches(tokens, samples, self.sizes.seqlen, CALIBRATION_BATCH, seed)
        start = time.perf_counter()
        stats = calibrate(self.model, batches, merge="fisher", left_gram="full")
        inputs = capture_inputs(self.model, batches, find_experts(self.model))
        seconds = time.perf_counter() - start
        self.report(f"calibrated: seed {seed}, {samples} windows of the {source} text, {seconds:.1f} s")
        return Calibration(batches, stats, inputs)

    def _perplexities(self, model: torch.nn.Module) -> tuple[float, float]:
        measured = [
            perplexity(model, self.judging[name], window=self.sizes.window, batch_size=EVALUATION_BATCH).perplexity
            for name in ("in", "out")
        ]
        return measured[0], measured[1]

    def _uncompressed(self) -> Row:
        inside, outside = self._perplexities(self.model)
        size = FLOAT_BYTES * model_parameters(self.model)
        return self._row(self.blank, size, perplexity_in=inside, perplexity_out=outside, rise_in=0.0, rise_out=0.0, bytes=size)

    def _measure(self, key: Key, calibration: Calibration) -> Row:
        budget = byte_budget(self.model, key.ratio)
        try:
            return self._row(key, budget, **self._outcome(key, calibration, budget))
        # Whatever a method raises is a result: it stands in the document.
        except Exception as error:
            self.report(traceback.format_exc())
            return self._row(key, budget, failure=one_sentence(str(error) or type(error).__name__))

    def _outcome(self, key: Key, calibration: Calibration, budget: int) -> dict[str, float | int | None]:
        model, method = copy.deepcopy(self.model), self.methods[key.method]
        start = time.perf_counter()
        size, memory = peak_growth(lambda: method(model, calibration, key.ratio))
        seconds = time.perf_counter() - start
        if size > budget:
            raise ValueError(f"{key.method} must store at most {budget} bytes at ratio {key.ratio}, got {size}.")
        inside, outside = self._perplexities(model)
        plain = self.results.rows[self.blank]
        assert plain.perplexity_in is not None  # an uncompressed row is never a failed one
        assert plain.perplexity_out is not None
        return {
            "perplexity_in": inside,
            "perplexity_out": outside,
            "rise_in": math.log(inside / plain.perplexity_in),
            "rise_out": math.log(outside / plain.perplexity_out),
            "bytes": size,
            "seconds": round(seconds, 2),
            "memory": memory,
        }

    def _row(self, key: Key, budget: int, **outcome: float | int | str | None) -> Row:
        unknown = dict.fromkeys(
            ("perplexity_in", "perplexity_out", "rise_in", "rise_out", "bytes", "seconds", "memory", "failure")
        )
        return Row(
            key=key,
            budget=budget,
            command=self.command,
            date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            package=d2moe_ext.__version__,
            torch=torch.__version__,
            machine=describe_machine(),
            **(unknown | outcome),
        )

    def _keep(self, row: Row) -> Row:
        self.results.append(row)
        self.report(_one_line(row))
        return row


def _digest(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in [directory / "config.json", *sorted(directory.glob("*.safetensors"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _one_line(row: Row) -> str:
    key = row.key
    head = f"{key.model}  {key.method}  ratio {key.ratio}  seed {key.seed}"
    if row.failure is not None:
        return f"{head}  failed: {row.failure}"
    took = "" if row.seconds is None else f", {row.seconds:.1f} s"
    return f"{head}  rise {row.rise_in:.4f} in, {row.rise_out:.4f} out of domain, {row.bytes} bytes{took}"


def tasks_of(
    names: Sequence[str] | None, ratios: Sequence[float] | None, seeds: int, methods: Mapping[str, Method]
) -> list[Task]:
    """The rows that some parts (None: all) ask for.

    Raises:
        ValueError: no such part, a ratio outside 0 to 1, fewer than one seed, or a part with a method that is not there.
    """
    names = list(PARTS) if names is None else names
    if seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {seeds}.")
    for name in names:
        if name not in PARTS:
            raise ValueError(f"--part must be one of {', '.join(PARTS)}, got {name!r}.")
        for line in PARTS[name].lines:
            if line.method not in methods:
                raise ValueError(f"--part must name a part whose methods are all there, got {name} without {line.method!r}.")
    for ratio in ratios or ():
        if not 0 < ratio < 1:
            raise ValueError(f"--ratio must lie between 0 and 1, got {ratio}.")
    return [
        Task(line, ratio, seed)
        for seed in range(seeds)
        for name in names
        for line in PARTS[name].lines
        for ratio in ratios or PARTS[name].ratios
    ]


def of_methods(tasks: list[Task], names: Sequence[str]) -> list[Task]:
    """The tasks of some methods.

    Raises:
        ValueError: a method that none of the tasks asks for.
    """
    for name in names:
        if all(task.line.method != name for task in tasks):
            raise ValueError(f"--method must be a method of the parts that are run, got {name!r}.")
    return [task for task in tasks if task.line.method in names]
