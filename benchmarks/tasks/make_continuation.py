"""Make a multiple-choice task from held-out text, for ``d2moe eval --tasks``: which ending belongs to the passage?

    python -m benchmarks.tasks.make_continuation --text python --out continuation
    d2moe eval MODEL --tasks continuation --include-path continuation

Each example is a passage of ``--context-words`` words and four endings of ``--ending-words``: the words that follow,
and what ends three other passages of the same document. Words are what whitespace separates; the whitespace stays as it
is. Chance is 0.25. The text must be one that the model was not trained on: a file, which counts as one document, or
``python``, the held-out part of the text that comes with Python, which ``examples/pydoc_moe`` never saw. Everything
follows from ``--seed``.

Endings of any document, with all whitespace made single spaces, were tried first: `examples/pydoc_moe` then scored 0.57 and,
compressed by 0.6, 0.59 (acc_norm of 250 examples), so the task told nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

CHOICES = 4

# data_files is absolute: the harness reads relative ones from wherever it is started.
TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: context
doc_to_target: label
doc_to_choice: endings
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def passages(document: str, context_words: int, ending_words: int) -> list[tuple[str, str]]:
    """Contexts with their endings, which begin with whitespace: a document cut into passages that share no word."""
    words = [match.span() for match in re.finditer(r"\S+", document)]
    length = context_words + ending_words
    found = []
    for begin in range(0, len(words) - length + 1, length):
        middle = words[begin + context_words - 1][1]
        found.append((document[words[begin][0] : middle], document[middle : words[begin + length - 1][1]]))
    return found


def examples(documents: Sequence[str], context_words: int, ending_words: int, count: int, seed: int) -> list[dict[str, object]]:
    """At most ``count`` examples ``{"context", "endings", "label"}``, drawn from all that can be made.

    Raises:
        ValueError: no document with four passages that end differently.
    """
    generator = random.Random(seed)
    made: list[dict[str, object]] = []
    for document in documents:
        found = passages(document, context_words, ending_words)
        endings = sorted({ending for _, ending in found})
        for context, ending in found if len(endings) >= CHOICES else ():
            # One more than needed, as the true ending may be among them.
            others = [other for other in generator.sample(endings, CHOICES) if other != ending][: CHOICES - 1]
            label = generator.randrange(CHOICES)
            made.append({"context": context, "endings": [*others[:label], ending, *others[label:]], "label": label})
    if not made:
        raise ValueError(f"--text must hold a document of {CHOICES} passages that end differently, got none.")
    return generator.sample(made, min(count, len(made)))


def write_task(made: Sequence[dict[str, object]], out: Path, name: str) -> None:
    """``NAME.yaml`` and ``NAME.jsonl`` in ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    data = (out / f"{name}.jsonl").resolve()
    data.write_text("".join(json.dumps(example) + "\n" for example in made), encoding="utf-8")
    (out / f"{name}.yaml").write_text(TASK.format(name=name, data=json.dumps(str(data))), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", required=True, help="a UTF-8 text file, or the word python")
    parser.add_argument("--out", required=True, type=Path, help="the directory to write")
    parser.add_argument("--name", default="continuation", help="the task's name")
    parser.add_argument("--examples", type=int, default=400)
    parser.add_argument("--context-words", type=int, default=40)
    parser.add_argument("--ending-words", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for option in ("examples", "context_words", "ending_words"):
        if getattr(options, option) < 1:
            parser.error(f"--{option.replace('_', '-')} must be at least 1, got {getattr(options, option)}.")
    try:
        documents = _documents(options.text)
        made = examples(documents, options.context_words, options.ending_words, options.examples, options.seed)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    write_task(made, options.out, options.name)
    print(f"{len(made)} examples: {options.out / options.name}.yaml")


def _documents(text: str) -> list[str]:
    if text != "python":
        return [Path(text).read_text(encoding="utf-8")]
    from d2moe_ext.text import python_documents

    return python_documents("heldout")


if __name__ == "__main__":
    main()
