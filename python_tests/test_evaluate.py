"""Perplexity against one forward per token, and what evaluation says of dynamic pruning."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paper_config import paper_config
from test_calibration import VOCABULARY, tiny_mixtral, token_ids

from d2moe_ext.calibration import calibrate
from d2moe_ext.compress import compress_experts
from d2moe_ext.evaluate import (
    _batches,
    _windows,
    compressed_experts,
    generate_tokens,
    measure_speed,
    perplexity,
    prunes_dynamically,
    set_dynamic,
)

IDS = token_ids(41)
# Means over tens of float32 losses, each off by a few units in the last place of a logit of order 10.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model():
    return tiny_mixtral()


@pytest.fixture(scope="module")
def compressed():
    model = tiny_mixtral()
    stats = calibrate(model, [token_ids(8, 32)], merge="mean", left_gram=None)
    compress_experts(model, stats, paper_config(0.2, preset="throughput", merge="mean"))
    return model


def log_perplexity_token_by_token(model, ids, context):
    """The definition: every token from the up to ``context(t)`` tokens before it, one forward each."""
    losses = []
    with torch.no_grad():
        for t in range(1, len(ids)):
            logits = model(input_ids=ids[None, t - context(t) : t]).logits[0, -1].double()
            losses.append(-logits.log_softmax(0)[ids[t]])
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize(
    ("window", "stride", "context"),
    [
        (64, None, lambda t: t),  # the whole text in one window
        (8, None, lambda t: (t - 1) % 8 + 1),  # each window starts anew
        (8, 1, lambda t: min(t, 8)),  # every token from the 8 before it
        (8, 4, lambda t: t if t <= 8 else 4 + (t - 1) % 4 + 1),
    ],
)
def test_perplexity_is_its_definition(model, window, stride, context):
    result = perplexity(model, IDS, window=window, stride=stride, batch_size=3)
    assert result.tokens == len(IDS) - 1
    assert math.log(result.perplexity) == pytest.approx(log_perplexity_token_by_token(model, IDS, context), abs=TOLERANCE)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity():
    model = tiny_mixtral()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, IDS, window=16).perplexity == pytest.approx(VOCABULARY, rel=1e-6)


@given(num_tokens=st.integers(2, 200), window=st.integers(1, 40), data=st.data())
def test_windows_predict_every_token_once(num_tokens, window, data):
    stride = data.draw(st.integers(1, window))
    windows = _windows(num_tokens, window, stride)
    predicted = [token for entry in windows for token in range(entry.end - entry.scored + 1, entry.end + 1)]
    assert predicted == list(range(1, num_tokens))
    assert all(0 < entry.scored <= entry.end - entry.begin <= window for entry in windows)
    later = [entry for entry in windows[1:] if entry.scored == stride]
    assert all(entry.end - entry.begin == window for entry in later)
    batches = list(_batches(windows, 3))
    assert [entry for batch in batches for entry in batch] == windows
    assert all(len({(entry.end - entry.begin, entry.scored) for entry in batch}) == 1 for batch in batches)
    assert max(map(len, batches)) <= 3


def test_batches_change_nothing_without_dynamic_pruning(model):
    alone = perplexity(model, IDS, window=8, batch_size=1)
    together = perplexity(model, IDS, window=8, batch_size=5)
    assert together.perplexity == pytest.approx(alone.perplexity, rel=TOLERANCE)
    assert (alone.batch_size, together.batch_size, together.dynamic) == (1, 5, False)


def test_dynamic_pruning_is_said_and_takes_one_window_at_a_time(compressed):
    assert prunes_dynamically(compressed)
    sizes = []
    handle = compressed.register_forward_pre_hook(
        lambda module, args, options: sizes.append(len(options["input_ids"])), with_kwargs=True
    )
    result = perplexity(compressed, IDS, window=8, batch_size=4)
    handle.remove()
    assert (result.dynamic, result.batch_size, set(sizes)) == (True, 1, {1})


def test_set_dynamic_uses_every_kept_column(compressed):
    pruned = perplexity(compressed, IDS, window=8)
    set_dynamic(compressed, False)
    try:
        assert not prunes_dynamically(compressed)
        whole = perplexity(compressed, IDS, window=8, batch_size=4)
    finally:
        set_dynamic(compressed, True)
    assert (whole.dynamic, whole.batch_size) == (False, 4)
    assert abs(whole.perplexity - pruned.perplexity) > TOLERANCE * pruned.perplexity
    assert len(list(compressed_experts(compressed))) == 2


def test_progress_ends_at_the_number_of_windows(model):
    calls = []
    perplexity(model, IDS, window=8, batch_size=2, progress=lambda *call: calls.append(call))
    assert calls[-1] == ("evaluate", 5, 5)
    assert [done for _, done, _ in calls] == sorted({done for _, done, _ in calls})


def test_training_mode_is_put_back(model):
    model.train()
    perplexity(model, IDS, window=8)
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (IDS[None], {}, r"token_ids must be int64 of shape \[N\], got torch.int64 of shape \[1, 41\]"),
        (IDS.float(), {}, "token_ids must be int64"),
        (IDS[:1], {}, "token_ids must hold at least 2 tokens, got 1"),
        (IDS, {"window": 0}, "window must be at least 1, got 0"),
        (IDS, {"stride": 9}, "stride must lie between 1 and window=8, got 9"),
        (IDS, {"stride": 0}, "stride must lie between 1 and window=8, got 0"),
        (IDS, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_refused_arguments(model, ids, options, message):
    with pytest.raises(ValueError, match=f"^perplexity: {message}"):
        perplexity(model, ids, **({"window": 8} | options))


def test_a_loss_that_is_not_finite_is_refused_by_its_window():
    model = tiny_mixtral()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(ValueError, match="loss must be finite, got nan in the window of tokens 0 to 8"):
        perplexity(model, IDS, window=8, batch_size=1)


def test_generation_adds_exactly_the_tokens_asked_for(model):
    written = generate_tokens(model, IDS[None, :5], 7)
    assert written.shape == (1, 12)
    assert torch.equal(written[:, :5], IDS[None, :5])
    assert torch.equal(written, generate_tokens(model, IDS[None, :5], 7))


def test_speed_counts_tokens_per_second(model, monkeypatch):
    # Each timed run takes one second of this clock, so tokens per second are tokens.
    ticks = iter(range(1000))
    monkeypatch.setattr("d2moe_ext.evaluate.time.perf_counter", lambda: float(next(ticks)))
    speed = measure_speed(model, IDS, prefill_tokens=20, prompt_tokens=4, new_tokens=6, repeats=2)
    assert (speed.prefill, speed.generate) == (20.0, 6.0)


def test_speed_refuses_a_text_shorter_than_its_prompt(model):
    with pytest.raises(ValueError, match="measure_speed: token_ids must hold at least 512 tokens, got 41"):
        measure_speed(model, IDS)
