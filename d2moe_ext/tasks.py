"""Multiple-choice and other tasks, through lm-evaluation-harness (the package ``lm_eval``, an optional extra)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from d2moe_ext.evaluate import prunes_dynamically


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task, or of a group of tasks.

    Attributes:
        task: the task's name.
        metric: as the harness names it, e.g. ``acc_norm``; its filter stands behind a comma where there is one.
        value: the metric, in its own unit; accuracies from 0 to 1.
        stderr: its standard error over the examples; None where the harness gives none.
        examples: how many were scored; None for a group.
        num_fewshot: solved examples in front of each; None for a group.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    examples: int | None
    num_fewshot: int | None


@dataclass(frozen=True)
class TaskScores:
    """What :func:`evaluate_tasks` returns; ``dynamic`` and ``batch_size`` as in :class:`d2moe_ext.evaluate.Perplexity`."""

    scores: list[TaskScore]
    dynamic: bool
    batch_size: int


def _import_harness() -> tuple[Any, Any, Any]:
    """``simple_evaluate``, ``HFLM`` and ``TaskManager`` of lm_eval."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(
            f"--tasks needs the package lm_eval, got the error {str(error)!r}; install it: pip install 'lm_eval[hf]'."
        ) from error
    # It reports every setting it takes over; what matters of them is in the result.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return simple_evaluate, HFLM, TaskManager


def _find_tasks(manager: Any, names: Sequence[str], include_path: Path | None) -> Any:
    """A task manager that knows all the names: of ``include_path`` alone if that will do, as reading lm_eval's own
    thousands of task files takes many seconds."""
    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"--include-path must be a directory of task files, got {str(include_path)!r}.")
    if include_path is not None:
        own = manager(include_path=str(include_path), include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    known = manager(include_path=None if include_path is None else str(include_path))
    for name in names:
        if name not in known.all_tasks:
            raise ValueError(f"--tasks must name tasks that lm_eval or --include-path holds, got {name!r}.")
    return known


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    *,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
) -> TaskScores:
    """Score a causal language model on tasks of lm-evaluation-harness.

    Args:
        model: a causal language model of transformers, compressed or not, patched or not, on its own device.
        tokenizer: its tokenizer.
        names: tasks or groups of tasks.
        include_path: a directory with task files (YAML) of one's own.
        num_fewshot: solved examples in front of each; None: as the task says. A task that fixes 0 keeps it.
        limit: only the first examples of each task.
        batch_size: sequences per forward; 1 is used whenever a layer prunes dynamically, because that method's choice
            of columns would otherwise depend on which sequences, and how much padding, happen to share a batch.
        max_length: the most tokens one forward reads; None: what the model's configuration says.

    Raises:
        ValueError: lm_eval is not installed, a name that is not known, or an argument out of range.
        OSError: a task's data is neither on this machine nor to be had from the network.
    """
    if not names:
        raise ValueError("--tasks must name at least one task, got none.")
    for option, value, least in (("--num-fewshot", num_fewshot, 0), ("--limit", limit, 1), ("--batch-size", batch_size, 1)):
        if value is not None and value < least:
            raise ValueError(f"{option} must be at least {least}, got {value}.")
    simple_evaluate, wrapper, manager = _import_harness()
    task_manager = _find_tasks(manager, names, include_path)
    dynamic = prunes_dynamically(model)
    batch_size = 1 if dynamic else batch_size
    # Log-likelihoods in float32: endings often differ by less than bfloat16 can tell apart.
    wrapped = wrapper(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length, softmax_dtype=torch.float32
    )
    # The harness seeds torch's global generator; the caller's own state comes back.
    with torch.random.fork_rng(devices=[]):
        results = simple_evaluate(
            model=wrapped,
            tasks=list(names),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=task_manager,
            log_samples=False,
        )
    return TaskScores(_scores(results), dynamic, batch_size)


def _scores(results: Mapping[str, Any]) -> list[TaskScore]:
    """The harness's ``{task: {"metric,filter": value, "metric_stderr,filter": value}}`` as rows."""
    rows = []
    for task, values in results["results"].items():
        examples = results["n-samples"].get(task, {}).get("effective")
        for key, value in values.items():
            metric, _, choice = key.partition(",")
            if not choice or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = values.get(f"{metric}_stderr,{choice}")
            rows.append(
                TaskScore(
                    task=task,
                    metric=metric if choice == "none" else key,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
                    examples=examples,
                    num_fewshot=results["n-shot"].get(task),
                )
            )
    return rows
