"""``d2moe eval --tasks``: scores against log-likelihoods computed by hand, batch sizes, and how it refuses."""

import json
import sys

import cli_helpers
import pytest
import torch
from cli_helpers import assert_refused, run, run_json

from benchmarks.tasks import make_continuation
from d2moe_ext.cli import common

EXAMPLES = 24


@pytest.fixture(scope="module")
def task(tiny_text, tmp_path_factory):
    """A directory with the task ``endings``, made from the text that the tiny tokenizer was trained on."""
    out = tmp_path_factory.mktemp("task")
    sizes = ("--context-words", "6", "--ending-words", "3", "--examples", str(EXAMPLES))
    make_continuation.main(["--text", str(tiny_text), "--out", str(out), "--name", "endings", *sizes])
    return out


@pytest.fixture(autouse=True)
def nothing_outside(tmp_path, monkeypatch):
    """No network, and no cache in the user's home."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


def read(task):
    return [json.loads(line) for line in (task / "endings.jsonl").read_text().splitlines()]


@torch.no_grad()
def by_hand(directory, made):
    """Accuracy, and accuracy by log-likelihood per character, one sequence at a time."""
    model, tokenizer = common.load_model(str(directory)), common.load_tokenizer(str(directory))
    right, right_normalised = 0, 0
    for example in made:
        scores = []
        prefix = len(tokenizer.encode(example["context"], add_special_tokens=False))
        for ending in example["endings"]:
            ids = torch.tensor([tokenizer.encode(example["context"] + ending, add_special_tokens=False)])
            chances = model(ids).logits[0, :-1].double().log_softmax(-1)
            scores.append(sum(float(chances[place - 1, ids[0, place]]) for place in range(prefix, ids.shape[1])))
        best = max(range(4), key=scores.__getitem__)
        normalised = max(range(4), key=lambda i: scores[i] / len(example["endings"][i]))
        right += best == example["label"]
        right_normalised += normalised == example["label"]
    return right / len(made), right_normalised / len(made)


def scores_of(record):
    return {score["metric"]: score for score in record["scores"]}


def test_scores_are_the_models_own_log_likelihoods(tiny_directory, task, capsys):
    record = run_json(capsys, "eval", tiny_directory, "--tasks", "endings", "--include-path", task)
    made = read(task)
    assert len(made) == EXAMPLES
    scores = scores_of(record)
    expected = by_hand(tiny_directory, made)
    assert (scores["acc"]["value"], scores["acc_norm"]["value"]) == pytest.approx(expected)
    accuracy = expected[0]
    # The standard error of a mean of zeros and ones.
    assert scores["acc"]["stderr"] == pytest.approx((accuracy * (1 - accuracy) / (EXAMPLES - 1)) ** 0.5)
    assert {(s["task"], s["examples"], s["num_fewshot"]) for s in scores.values()} == {("endings", EXAMPLES, 0)}
    assert (record["dynamic_pruning"], record["native_operators"], record["batch_size"]) == (False, False, 8)


def batch_sizes(monkeypatch):
    """The batch sizes of the forwards from now on."""
    seen, load = [], common.load_model

    def observed(*arguments, **options):
        model = load(*arguments, **options)
        model.get_input_embeddings().register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
        return model

    monkeypatch.setattr(common, "load_model", observed)
    return seen


@pytest.mark.parametrize(("dynamic", "largest"), [(True, 1), (False, 8)])
def test_dynamic_pruning_means_batch_size_1(compressed_directory, task, capsys, monkeypatch, dynamic, largest):
    seen = batch_sizes(monkeypatch)
    options = ("--include-path", task, "--limit", 6, "--dynamic" if dynamic else "--no-dynamic")
    record = run_json(capsys, "eval", compressed_directory, "--tasks", "endings", *options)
    assert max(seen) == record["batch_size"] == largest
    assert (record["dynamic_pruning"], record["compressed"], record["native_operators"]) == (dynamic, True, True)
    assert {score["examples"] for score in record["scores"]} == {6}


def test_examples_are_shown_and_the_global_generator_is_left_alone(tiny_directory, task, capsys):
    text = (task / "endings.yaml").read_text()
    (task / "shown.yaml").write_text(text.replace("task: endings", "task: shown\nfewshot_split: test"))
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    options = ("--include-path", task, "--num-fewshot", 1, "--limit", 2, "--seqlen", 128)
    record = run_json(capsys, "eval", tiny_directory, "--tasks", "shown, endings", *options)
    assert {(score["task"], score["num_fewshot"]) for score in record["scores"]} == {("shown", 1), ("endings", 1)}
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_table_is_printed(tiny_directory, task, capsys):
    options = ("--tasks", "endings", "--include-path", task, "--limit", 1)
    code, out, err = run(capsys, "eval", tiny_directory, *options)
    assert (code, err) == (0, "")
    for part in ("endings", "acc_norm", "stderr", "Dynamic pruning off, batch size 8"):
        assert part in out


def test_an_unknown_task_is_named(tiny_directory, task, capsys, monkeypatch):
    # lm_eval's own task files, thousands, take it many seconds to read: here it has none of its own.
    from lm_eval.tasks import TaskManager

    class OwnTasks(TaskManager):
        def __init__(self, include_path=None, include_defaults=True):
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", OwnTasks)
    result = run(capsys, "eval", tiny_directory, "--tasks", "endings,beginnings", "--include-path", task)
    assert_refused(result, "--tasks must name tasks that lm_eval or --include-path holds, got 'beginnings'.")


def test_without_lm_eval_the_command_that_installs_it_is_said(tiny_directory, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = run(capsys, "eval", tiny_directory, "--tasks", "piqa")
    assert_refused(result, "--tasks needs the package lm_eval", "pip install 'lm_eval[hf]'")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ((), "eval needs one of --text and --tasks, got neither."),
        (("--text", "{text}", "--tasks", "endings"), "eval needs one of --text and --tasks, got both."),
        (("--tasks", "endings", "--stride", 4), "--stride must stand with --text, got it without."),
        (("--text", "{text}", "--limit", 4), "--limit must stand with --tasks, got it without."),
        (("--tasks", " , "), "--tasks must name at least one task, got none."),
        (("--tasks", "endings", "--limit", 0), "--limit must be at least 1, got 0."),
        (("--tasks", "endings", "--num-fewshot", -1), "--num-fewshot must be at least 0, got -1."),
        (("--tasks", "endings", "--batch-size", 0), "--batch-size must be at least 1, got 0."),
        (("--tasks", "endings", "--include-path", "absent"), "--include-path must be a directory of task files, got 'absent'."),
    ],
)
def test_eval_refuses(tiny_directory, tiny_text, capsys, options, part):
    given = [str(option).format(text=tiny_text) for option in options]
    assert_refused(run(capsys, "eval", tiny_directory, *given), part)


def test_passages_keep_the_words_and_the_whitespace():
    document = "\n a b  c\nd e f\tg h\n\ni j k"
    assert make_continuation.passages(document, 3, 2) == [("a b  c", "\nd e"), ("f\tg h", "\n\ni j")]
    assert make_continuation.passages(document, 8, 4) == []


def test_a_task_is_made_from_its_text_and_seed():
    documents = [" ".join(f"{name}{number}" for number in range(size)) for name, size in (("a", 55), ("b", 45), ("c", 39))]
    true_endings = [dict(make_continuation.passages(document, 6, 4)) for document in documents]
    # Ten words each; the last document has three passages, too few for four endings.
    assert [len(endings) for endings in true_endings] == [5, 4, 3]

    def examples(count, seed):
        return make_continuation.examples(documents, 6, 4, count, seed)

    made = examples(7, 3)
    assert len({example["context"] for example in made}) == len(made) == 7
    for example in made:
        own = true_endings[0] if example["context"] in true_endings[0] else true_endings[1]
        assert example["endings"][example["label"]] == own[example["context"]]
        assert len(set(example["endings"])) == 4
        assert set(example["endings"]) <= set(own.values())
    assert made == examples(7, 3) != examples(7, 4)
    assert len(examples(100, 3)) == 9


def test_a_task_needs_four_endings(tmp_path, capsys):
    path = tmp_path / "short.txt"
    path.write_text(cli_helpers.TEXT[:700])
    with pytest.raises(SystemExit):
        make_continuation.main(["--text", str(path), "--out", str(tmp_path / "out")])
    assert "--text must hold a document of 4 passages that end differently, got none." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        make_continuation.main(["--text", str(path), "--out", str(tmp_path / "out"), "--ending-words", "0"])
    assert "--ending-words must be at least 1, got 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
