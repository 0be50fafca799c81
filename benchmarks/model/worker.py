"""What runs in a process of its own: load one contender, and check it or time it.

Its peak of memory is that of the process, which is why no two contenders share one; and a check, which needs a second
backend, never shares one with a measurement.
"""

from __future__ import annotations

import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2moe_ext import hf
from d2moe_ext.adapters import find_experts
from d2moe_ext.bench.contenders import BATCHED_LIMIT, gathered_bytes
from d2moe_ext.bench.layer import relative_error, tolerance
from d2moe_ext.cli.common import quiet_transformers, weight_bytes
from d2moe_ext.evaluate import prunes_dynamically, set_dynamic
from d2moe_ext.experts import D2MoEExperts
from d2moe_ext.hf.quantizer import compressed_modules
from d2moe_ext.shapes import experts_per_token

# Of the logits' norm. Roundings of bfloat16 add up over the layers; a wrong operator is off by far more.
TOLERANCES = {"bfloat16": 2e-2, "float32": 1e-4}
_MEGA = 1e6
# Timed runs of one measurement after one that is not: more of the short ones.
_SECONDS, _MOST_RUNS = 2.0, 5
_CHECKED_TOKENS = 24


def run_worker() -> int:
    """Read a job as JSON from the standard input, and write what came of it to the standard output."""
    job = json.load(sys.stdin)
    quiet_transformers()
    result = check(job) if job["check"] else measure(job)
    print(json.dumps(result, allow_nan=False))
    return 0


def load(job: dict[str, Any]) -> Any:
    """The contender, ready to run."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["directory"], dtype=job["dtype"]).eval()
    implementation = job["implementation"]
    if implementation is None:
        return hf.patch_model(model)
    use_implementation(model, implementation)
    return model


def use_implementation(model: Any, implementation: str) -> None:
    """Choose how transformers runs the experts."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(implementation)
    else:
        model.config._experts_implementation = implementation


@torch.no_grad()
def check(job: dict[str, Any]) -> dict[str, Any]:
    """The relative error of a short prompt's logits against transformers' eager experts, or if the model is compressed,
    against the torch backend's.

    The native model takes each token to the experts that the other one took it to: where two experts' scores are all but
    equal, rounding decides between them, and that is no error of the operators.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["directory"], dtype=job["dtype"]).eval()
    ids = _prompt(job, 1, min(_CHECKED_TOKENS, job["sizes"]["prompt"]))
    result: dict[str, Any] = {"note": "", "errors": {}}
    for dynamic in (False, True) if prunes_dynamically(model) else (False,):
        set_dynamic(model, dynamic)
        error = _error(model, ids)
        limit = TOLERANCES[job["dtype"]]
        if dynamic:
            # Rounding also exchanges columns that weigh almost the same, as in one layer.
            limit = max(limit, tolerance(getattr(torch, job["dtype"]), dynamic=True))
        how = "dynamic" if dynamic else "all columns"
        result["errors"][how] = error if math.isfinite(error) else None
        if not error <= limit:
            off = f"{error:.1e}, more than {limit:.0e}"
            return result | {"note": f"wrong ({how}): its logits differ from the reference's by {off}"}
    return result


def _error(model: Any, ids: Tensor) -> float:
    routes: dict[str, tuple[Tensor, ...]] = {}
    if not compressed_modules(model):
        use_implementation(model, "eager")
    expected = _routed_logits(model, ids, routes)
    hf.patch_model(model)
    try:
        return relative_error(_routed_logits(model, ids, routes), expected)
    finally:
        hf.unpatch_model(model)


def _routed_logits(model: Any, ids: Tensor, routes: dict[str, tuple[Tensor, ...]]) -> Tensor:
    """Logits with each layer's tokens sent where ``routes`` says, which the first call fills."""
    ours: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, D2MoEExperts)}
    experts = ours or {view.name: view.module for view in find_experts(model)}
    hooks = [module.register_forward_pre_hook(_same_route(name, routes)) for name, module in experts.items()]
    logits = model(input_ids=ids, use_cache=False).logits.float()
    for hook in hooks:
        hook.remove()
    return logits


def _same_route(name: str, routes: dict[str, tuple[Tensor, ...]]) -> Callable[[Any, Any], Any]:
    def hook(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_states, *route = arguments
        return (hidden_states, *routes.setdefault(name, tuple(route)))

    return hook


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Load, then time a prompt's forward and generation."""
    start = time.perf_counter()
    model = load(job)
    loaded = time.perf_counter() - start
    row: dict[str, Any] = {
        "load_s": loaded,
        "load_peak_mb": peak_bytes() / _MEGA,
        "disk_mb": weight_bytes(Path(job["directory"])) / _MEGA,
    }
    sizes, notes = job["sizes"], []

    def timed(key: str, batch: int, prompt: int, new_tokens: int, amount: float) -> None:
        needed = _gathered(model, job["implementation"], batch * prompt)
        if needed > BATCHED_LIMIT:
            notes.append(f"{key} skipped: gathers {needed / 2**30:.1f} GiB of weights")
            row[key] = None
            return
        ids = _prompt(job, batch, prompt)
        if new_tokens == 0:
            seconds = median_seconds(lambda: _forward(model, ids))
        else:
            generate(model, ids, 1)
            seconds = median_seconds(lambda: generate(model, ids, new_tokens), warm=False)
        row[key] = seconds * 1e3 if key == "first_token_ms" else amount / seconds

    one, many, new = sizes["prefill_1"], sizes["prefill_16"], sizes["new_tokens"]
    timed("prefill_1", 1, one, 0, one)
    timed("prefill_16", 16, many, 0, 16 * many)
    timed("generate_1", 1, sizes["prompt"], new, new)
    timed("generate_16", 16, sizes["prompt"], new, 16 * new)
    timed("first_token_ms", 1, one, 1, 1)
    return row | {"peak_mb": peak_bytes() / _MEGA, "note": "; ".join(notes)}


@torch.no_grad()
def _forward(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def generate(model: Any, ids: Tensor, new_tokens: int) -> Tensor:
    """Exactly ``new_tokens`` chosen greedily behind each row of ``ids``."""
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=0,
    )


def median_seconds(run: Callable[[], object], warm: bool = True) -> float:
    """Of up to five runs, fewer where they are long."""
    if warm:
        run()
    seconds: list[float] = []
    while len(seconds) < _MOST_RUNS and sum(seconds) < _SECONDS:
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def peak_bytes() -> int:
    """The most memory that was resident in this process, mapped files' pages included."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _gathered(model: Any, implementation: str | None, tokens: int) -> int:
    """Bytes of weights that ``batched_mm`` copies for a forward; nobody would run it where they are too many."""
    if implementation != "batched_mm":
        return 0
    view = find_experts(model)[0]
    return gathered_bytes(view.layout, tokens * experts_per_token(model), view.down_weight(0).element_size())


def _prompt(job: dict[str, Any], batch: int, length: int) -> Tensor:
    ids = torch.tensor(job["tokens"][: batch * length])
    return ids.view(batch, length)
