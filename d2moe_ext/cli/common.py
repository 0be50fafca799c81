"""What the commands share: consoles, the progress bar, and reading models and texts with errors a user can act on."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
ProgressCallback = Callable[[str, int, int], None]

# Where the output is a file or a pipe there is no width to ask for; tables need more than rich's guess of 80.
_PIPE_WIDTH = 128


def stdout_console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)


def print_json(value: Any) -> None:
    """Print strict JSON, without the line wrapping a console would add."""
    print(json.dumps(value, indent=2, allow_nan=False))


def one_sentence(message: str) -> str:
    """The first sentence of ``message``, on one line, with its full stop."""
    flat = " ".join(message.split())
    first = re.split(r"(?<=[.!?])\s+(?=[A-Z'\"`(])", flat, maxsplit=1)[0]
    return first if first.endswith((".", "!", "?")) else f"{first}."


@contextmanager
def progress_bar() -> Iterator[ProgressCallback]:
    """A callback ``(stage, done, total)`` that draws one bar per stage with the time left.

    Drawn on the standard error stream and only on a terminal: a log or a pipe gets nothing.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield update


def quiet_transformers() -> None:
    """Keep transformers' warnings and bars off the standard error stream, which belongs to one sentence."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def check_model(name: str) -> None:
    """Raise ValueError unless ``name`` is a directory with a config.json or can be a model's name on the hub.

    Said before transformers is asked, which would look for a missing directory in the network.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"MODEL must be a directory with a config.json, got {name!r}, which has none.")
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "/", "~")) or path.exists():
        raise ValueError(f"MODEL must be a model directory or the name of a model on the hub, got {name!r}.")


@contextmanager
def _reading(what: str, name: str) -> Iterator[None]:
    """Turn the errors of transformers' loaders into one sentence that names the input."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = one_sentence(str(error)) or type(error).__name__
        raise ValueError(f"{what} {name!r} could not be loaded: {reason}") from error


def load_config(name: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """A model's configuration, from its directory, its config.json or its name."""
    from transformers import AutoConfig

    import d2moe_ext  # noqa: F401  (registers the quantization method of compressed models)

    quiet_transformers()
    if not Path(name).expanduser().is_file():
        check_model(name)
    with _reading("configuration", name):
        return AutoConfig.from_pretrained(str(Path(name).expanduser()), trust_remote_code=trust_remote_code)


def meta_model(config: PreTrainedConfig, dtype: Dtype, trust_remote_code: bool) -> PreTrainedModel:
    """The model without memory behind its weights, in the dtype its configuration names."""
    import torch
    from transformers import AutoModelForCausalLM

    wanted = config.dtype if dtype == "auto" else getattr(torch, dtype)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=wanted or torch.get_default_dtype(), trust_remote_code=trust_remote_code
        )


def check_device(device: str) -> None:
    """Raise ValueError unless ``device`` is the CPU or a GPU that is there."""
    import torch

    kind, colon, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (colon and (kind == "cpu" or not index.isdecimal())):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {device!r}.")
    count = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= count:
        raise ValueError(f"--device must be a device that this machine and this torch have, got {device!r} with {count} GPUs.")


def load_model(name: str, dtype: Dtype = "auto", trust_remote_code: bool = False, device: str = "cpu") -> PreTrainedModel:
    """A causal language model, compressed or not, in evaluation mode, on a device."""
    from transformers import AutoModelForCausalLM

    import d2moe_ext  # noqa: F401  (registers the quantization method of compressed models)

    quiet_transformers()
    check_device(device)
    check_model(name)
    with _reading("model", name):
        model = AutoModelForCausalLM.from_pretrained(
            str(Path(name).expanduser()), dtype=dtype, trust_remote_code=trust_remote_code
        )
    return model.eval().to(device)


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    quiet_transformers()
    check_model(name)
    with _reading("tokenizer of", name):
        return AutoTokenizer.from_pretrained(str(Path(name).expanduser()), trust_remote_code=trust_remote_code)


def read_text(option: str, path: Path) -> str:
    """The text of a UTF-8 file."""
    if not path.is_file():
        raise ValueError(f"{option} must be a text file, got {str(path)!r}.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} must be a UTF-8 text file, got {str(path)!r}, whose {error}.") from error


def token_stream(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """The tokens of a text, int64 ``[N]``, without special ones."""
    import torch

    return torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.int64)


def check_seqlen(option: str, seqlen: int, config: PreTrainedConfig) -> None:
    """Raise ValueError unless ``seqlen`` is a length the model has positions for."""
    longest = longest_sequence(config)
    if seqlen < 2 or (longest is not None and seqlen > longest):
        upper = "" if longest is None else f" and at most {longest}, the model's longest sequence"
        raise ValueError(f"{option} must be at least 2{upper}, got {seqlen}.")


def longest_sequence(config: PreTrainedConfig) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def default_seqlen(config: PreTrainedConfig, wanted: int) -> int:
    longest = longest_sequence(config)
    return wanted if longest is None else min(wanted, longest)


def calibration_batches(token_ids: Tensor, samples: int, seqlen: int, batch_size: int, seed: int) -> list[Tensor]:
    """``samples`` windows of ``seqlen`` tokens at random places, as int64 ``[batch, seqlen]`` batches."""
    import torch

    if samples < 1:
        raise ValueError(f"--samples must be at least 1, got {samples}.")
    if batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {batch_size}.")
    if token_ids.numel() < seqlen:
        raise ValueError(f"--calibration must hold at least --seqlen={seqlen} tokens, got {token_ids.numel()}.")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(token_ids.numel() - seqlen + 1, (samples,), generator=generator)
    windows = torch.stack([token_ids[start : start + seqlen] for start in starts.tolist()])
    return list(windows.split(batch_size))


def weight_bytes(directory: Path) -> int:
    """Bytes of the weights in a model directory."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))
