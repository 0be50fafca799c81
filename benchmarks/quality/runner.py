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
from benchmarks.quality.machine import peak_growth
from benchmarks.quality.methods import round_stored
from benchmarks.quality.parts import PARTS, Line
from benchmarks.quality.results import UNCOMPRESSED, Key, Results, Row, Sizes, Source
from benchmarks.quality.retired import RETIRED
from benchmarks.quality.texts import Text, Use, domain_text, outside_text
from benchmarks.study import FLOAT_BYTES, Calibration, Method, byte_budget, capture_inputs, method_version, model_parameters
from d2moe_ext.adapters import find_experts
from d2moe_ext.bench.machine import describe_machine
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
        judges: ``selection``, ``test`` or both: only those texts are read. With both, a model that is compressed for the one
            is judged by the other as well.
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
        judges: Sequence[Use],
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
        self._batches = lru_cache(maxsize=2)(self._tokens)
        self._judging: dict[str, dict[str, Tensor]] = {}
        self.blanks: list[Key] = []
        weights = _digest(model)
        for judge in judges:
            judging = {"in": domain_text(sources, judge), "out": outside_text(sources, judge)}
            self._judging[judge] = {name: self._first_tokens(text) for name, text in judging.items()}
            self.blanks.append(
                Key(
                    model=model.resolve().name,
                    weights=weights,
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
            )

    def _tokens(self, source: Source) -> Tensor:
        return token_stream(self.tokenizer, self.texts[source].content)

    def _first_tokens(self, text: Text) -> Tensor:
        tokens = token_stream(self.tokenizer, text.content)
        if len(tokens) < self.sizes.tokens:
            raise ValueError(f"--tokens must be at most the {len(tokens)} of {text.name}, got {self.sizes.tokens}.")
        return tokens[: self.sizes.tokens]

    @property
    def blank(self) -> Key:
        """The uncompressed model's, judged by the first of the texts."""
        return self.blanks[0]

    @property
    def judging(self) -> dict[str, Tensor]:
        """The first judging text's tokens, in the domain and out of it."""
        return self._judging[self.blank.judge]

    def keys(self, task: Task) -> list[Key]:
        """The keys of a task's rows, one for each text that judges."""
        return [self._key(task, blank) for blank in self.blanks]

    def _key(self, task: Task, blank: Key) -> Key:
        line = task.line
        return replace(
            blank,
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
        """Measure every task whose rows are not all there yet; seed by seed, each calibration taken once.

        Returns:
            The rows measured now.
        """
        # A task's rows differ by what judges them alone: they share a compressed model.
        wanted = list(dict.fromkeys(tuple(self.keys(task)) for task in tasks))
        missing = [left for keys in wanted if (left := [k for k in keys if not self.results.has(k, retry_failed)])]
        if not missing:
            return []
        rows = [self._keep(self._uncompressed(blank)) for blank in self.blanks if not self.results.has(blank)]
        for calibration, groups in self._by_calibration(missing):
            rows += [self._keep(row) for keys in groups for row in self._measure(keys, calibration)]
        return rows

    def _by_calibration(self, missing: list[list[Key]]) -> Iterator[tuple[Calibration, list[list[Key]]]]:
        settings = sorted({(keys[0].seed, keys[0].samples, keys[0].source) for keys in missing})
        for seed, samples, source in settings:
            same = [keys for keys in missing if (keys[0].seed, keys[0].samples, keys[0].source) == (seed, samples, source)]
            yield self.calibration(seed, samples, source), same

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

    def _perplexities(self, model: torch.nn.Module, judge: str) -> tuple[float, float]:
        measured = [
            perplexity(model, self._judging[judge][name], window=self.sizes.window, batch_size=EVALUATION_BATCH).perplexity
            for name in ("in", "out")
        ]
        return measured[0], measured[1]

    def _uncompressed(self, blank: Key) -> Row:
        inside, outside = self._perplexities(self.model, blank.judge)
        size = FLOAT_BYTES * model_parameters(self.model)
        return self._row(blank, size, perplexity_in=inside, perplexity_out=outside, rise_in=0.0, rise_out=0.0, bytes=size)

    def _measure(self, keys: list[Key], calibration: Calibration) -> list[Row]:
        budget = byte_budget(self.model, keys[0].ratio)
        try:
            model, spent = self._compressed(keys[0], calibration, budget)
            return [self._row(key, budget, **spent, **self._rises(key, model)) for key in keys]
        # Whatever a method raises is a result: it stands in the document.
        except Exception as error:
            self.report(traceback.format_exc())
            return [self._row(key, budget, failure=one_sentence(str(error) or type(error).__name__)) for key in keys]

    def _compressed(
        self, key: Key, calibration: Calibration, budget: int
    ) -> tuple[torch.nn.Module, dict[str, float | int | None]]:
        model, method = copy.deepcopy(self.model), self.methods[key.method]
        start = time.perf_counter()
        size, memory = peak_growth(lambda: method(model, calibration, key.ratio))
        seconds = time.perf_counter() - start
        if size > budget:
            raise ValueError(f"{key.method} must store at most {budget} bytes at ratio {key.ratio}, got {size}.")
        return model, {"bytes": size, "seconds": round(seconds, 2), "memory": memory}

    def _rises(self, key: Key, model: torch.nn.Module) -> dict[str, float]:
        inside, outside = self._perplexities(model, key.judge)
        plain = next(self.results.rows[blank] for blank in self.blanks if blank.judge == key.judge)
        assert plain.perplexity_in is not None  # an uncompressed row is never a failed one
        assert plain.perplexity_out is not None
        return {
            "perplexity_in": inside,
            "perplexity_out": outside,
            "rise_in": math.log(inside / plain.perplexity_in),
            "rise_out": math.log(outside / plain.perplexity_out),
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
    head = f"{key.model}  {key.method}  ratio {key.ratio}  seed {key.seed}  {key.judge}"
    if row.failure is not None:
        return f"{head}  failed: {row.failure}"
    took = "" if row.seconds is None else f", {row.seconds:.1f} s"
    return f"{head}  rise {row.rise_in:.4f} in, {row.rise_out:.4f} out of domain, {row.bytes} bytes{took}"


def tasks_of(
    names: Sequence[str] | None, ratios: Sequence[float] | None, seeds: int, methods: Mapping[str, Method]
) -> list[Task]:
    """The rows that some parts (None: all) ask for; retired methods have theirs.

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
            if line.method not in methods and line.method not in RETIRED:
                raise ValueError(f"--part must name a part whose methods are all there, got {name} without {line.method!r}.")
    for ratio in ratios or ():
        if not 0 < ratio < 1:
            raise ValueError(f"--ratio must lie between 0 and 1, got {ratio}.")
    return [
        Task(line, ratio, seed)
        for seed in range(seeds)
        for name in names
        for line in PARTS[name].lines
        if line.method not in RETIRED
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
