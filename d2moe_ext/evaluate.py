"""What a compressed model is worth: its perplexity on a text, and how fast it runs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from d2moe_ext.experts import D2MoEExperts

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Perplexity:
    """A measured perplexity.

    Attributes:
        perplexity: ``exp`` of the mean negative log-likelihood of the scored tokens.
        tokens: how many tokens were scored.
        dynamic: whether dynamic pruning was on, which couples the tokens of a window.
        batch_size: how many windows shared a forward.
    """

    perplexity: float
    tokens: int
    dynamic: bool
    batch_size: int


@dataclass(frozen=True)
class Speed:
    """Tokens per second, the median of the repeats: a prompt read at once, and tokens generated one by one."""

    prefill: float
    generate: float


@dataclass(frozen=True)
class _Window:
    """Tokens ``begin .. end`` are read and the last ``scored`` of their successors are predicted."""

    begin: int
    end: int
    scored: int


def compressed_experts(model: nn.Module) -> Iterator[D2MoEExperts]:
    """The compressed experts modules of ``model``, in forward order."""
    return (module for module in model.modules() if isinstance(module, D2MoEExperts))


def prunes_dynamically(model: nn.Module) -> bool:
    """Whether any layer of ``model`` multiplies fewer columns than it keeps (design: dynamic pruning)."""
    return any(experts.prunes_dynamically for experts in compressed_experts(model))


def set_dynamic(model: nn.Module, dynamic: bool) -> None:
    """Turn dynamic pruning on or off in every compressed layer; off multiplies all kept columns."""
    for experts in compressed_experts(model):
        experts.dynamic = dynamic


def _windows(num_tokens: int, window: int, stride: int) -> list[_Window]:
    """Windows that predict every token but the first exactly once, each read with up to ``window`` tokens before it."""
    windows = []
    begin, predicted = 0, 0
    while predicted < num_tokens - 1:
        end = min(begin + window, num_tokens - 1)
        windows.append(_Window(begin, end, end - predicted))
        predicted = end
        begin += stride
    return windows


def _batches(windows: list[_Window], batch_size: int) -> Iterator[list[_Window]]:
    """Neighbours equal in length and in scored tokens; unequal ones never share a batch, so nothing is padded."""
    batch: list[_Window] = []
    for window in windows:
        same = batch and (batch[0].end - batch[0].begin, batch[0].scored) == (window.end - window.begin, window.scored)
        if batch and (not same or len(batch) == batch_size):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _check(token_ids: Tensor, window: int, stride: int, batch_size: int) -> None:
    if token_ids.dim() != 1 or token_ids.dtype != torch.int64:
        raise ValueError(
            f"perplexity: token_ids must be int64 of shape [N], got {token_ids.dtype} of shape {list(token_ids.shape)}."
        )
    if token_ids.numel() < 2:
        raise ValueError(f"perplexity: token_ids must hold at least 2 tokens, got {token_ids.numel()}.")
    if window < 1:
        raise ValueError(f"perplexity: window must be at least 1, got {window}.")
    if not 1 <= stride <= window:
        raise ValueError(f"perplexity: stride must lie between 1 and window={window}, got {stride}.")
    if batch_size < 1:
        raise ValueError(f"perplexity: batch_size must be at least 1, got {batch_size}.")


@torch.no_grad()
def perplexity(
    model: nn.Module,
    token_ids: Tensor,
    *,
    window: int,
    stride: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of a causal language model over a text, by a sliding window.

    Every token but the first is predicted exactly once, from at most ``window`` tokens before it; with
    ``stride < window`` each but those of the first window from at least ``window - stride + 1`` of them.

    Args:
        model: a causal language model of transformers; it is run in evaluation mode, on its own device.
        token_ids: int64 ``[N]``, N >= 2.
        window: the most tokens one forward reads.
        stride: how far the window moves; ``None``: by ``window``, the cheapest.
        batch_size: windows per forward; 1 is used whenever a layer prunes dynamically, because that method's
            choice of columns would otherwise depend on which windows happen to share a batch.
        progress: called with ``("evaluate", windows done, windows in all)``.

    Raises:
        ValueError: an argument out of range, or a model whose loss is not finite.
    """
    stride = window if stride is None else stride
    _check(token_ids, window, stride, batch_size)
    dynamic = prunes_dynamically(model)
    batch_size = 1 if dynamic else batch_size
    windows = _windows(token_ids.numel(), window, stride)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, done = 0.0, 0
    try:
        for batch in _batches(windows, batch_size):
            loss = _negative_log_likelihood(model, token_ids, batch, device)
            if not math.isfinite(loss):
                raise ValueError(
                    f"perplexity: the model's loss must be finite, got {loss} in the window of tokens "
                    f"{batch[0].begin} to {batch[-1].end}."
                )
            total += loss
            done += len(batch)
            if progress is not None:
                progress("evaluate", done, len(windows))
    finally:
        model.train(was_training)
    tokens = sum(entry.scored for entry in windows)
    return Perplexity(math.exp(total / tokens), tokens, dynamic, batch_size)


def _negative_log_likelihood(model: nn.Module, token_ids: Tensor, batch: list[_Window], device: torch.device) -> float:
    """The summed loss of a batch of equal windows."""
    inputs = torch.stack([token_ids[entry.begin : entry.end] for entry in batch]).to(device)
    targets = torch.stack([token_ids[entry.end - entry.scored + 1 : entry.end + 1] for entry in batch]).to(device)
    logits = model(input_ids=inputs, use_cache=False).logits
    # Row by row: a float32 copy of a batch's logits [batch, length, vocabulary] would be the largest tensor here.
    losses = [
        nn.functional.cross_entropy(row[-len(target) :].float(), target, reduction="none").double().sum()
        for row, target in zip(logits, targets, strict=True)
    ]
    return float(torch.stack(losses).sum())


def _median_seconds(run: Callable[[], object], repeats: int) -> float:
    run()  # the first run pays for allocations, and for compilation where there is any
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure_speed(
    model: nn.Module,
    token_ids: Tensor,
    *,
    prefill_tokens: int = 512,
    prompt_tokens: int = 32,
    new_tokens: int = 64,
    repeats: int = 3,
) -> Speed:
    """Tokens per second of one sequence: reading ``prefill_tokens`` at once, and generating ``new_tokens`` greedily.

    Args:
        model: a causal language model of transformers.
        token_ids: int64 ``[N]`` with N >= ``max(prefill_tokens, prompt_tokens)``; its first tokens are the prompt.
        prefill_tokens: length of the prompt whose single forward is timed.
        prompt_tokens: length of the prompt that generation starts from; its forward is part of the time.
        new_tokens: how many tokens each timed generation adds.
        repeats: timed runs, after one that is not; the median counts.

    Raises:
        ValueError: fewer tokens than a prompt needs.
    """
    needed = max(prefill_tokens, prompt_tokens)
    if token_ids.numel() < needed:
        raise ValueError(f"measure_speed: token_ids must hold at least {needed} tokens, got {token_ids.numel()}.")
    device = next(model.parameters()).device
    passage = token_ids[None, :prefill_tokens].to(device)
    prompt = token_ids[None, :prompt_tokens].to(device)

    def prefill() -> object:
        with torch.no_grad():
            return _finished(model(input_ids=passage, use_cache=False).logits)

    def generate() -> object:
        return _finished(generate_tokens(model, prompt, new_tokens))

    return Speed(
        prefill=prefill_tokens / _median_seconds(prefill, repeats),
        generate=new_tokens / _median_seconds(generate, repeats),
    )


def _finished(result: Tensor) -> Tensor:
    """``result`` once the device has computed it: a GPU's kernels are only queued when a forward returns."""
    if result.is_cuda:
        torch.cuda.synchronize(result.device)
    return result


def generate_tokens(model: Any, prompt: Tensor, new_tokens: int, seed: int | None = None) -> Tensor:
    """``prompt`` int64 ``[1, N]`` and exactly ``new_tokens`` behind it.

    Greedily chosen, or drawn at temperature 0.6 with ``seed``, without touching torch's own random state.
    """
    sampling: dict[str, Any] = {"do_sample": False} if seed is None else {"do_sample": True, "temperature": 0.6}
    with torch.random.fork_rng(devices=[] if seed is None or not prompt.is_cuda else [prompt.device]):
        if seed is not None:
            torch.manual_seed(seed)
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            **sampling,
        )
