"""The models that are timed, written to a folder: plain ones, and compressed as each contender wants them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from benchmarks.layer.fill import fill_, from_plan
from benchmarks.layer.shapes import Variant, spec_of
from d2moe_ext import hf
from d2moe_ext.adapters import find_experts
from d2moe_ext.bench.contenders import HF_IMPLEMENTATIONS
from d2moe_ext.budget import plan_compression
from d2moe_ext.calibration import calibrate
from d2moe_ext.cli.common import calibration_batches, load_model, load_tokenizer, token_stream
from d2moe_ext.cli.demo_job import heldout_tokens
from d2moe_ext.config import CompressionConfig
from d2moe_ext.hf.quantizer import mark_compressed
from d2moe_ext.shapes import model_shapes
from d2moe_ext.text import python_text

SHIPPED, RANDOM = "shipped", "random"
MODELS = (SHIPPED, RANDOM)
PLAIN = "plain"
SHIPPED_DIRECTORY = Path(__file__).parents[2] / "examples" / "pydoc_moe"
# 2.1 B parameters: Qwen3-30B-A3B's layers with half of its experts, six of them, and a small vocabulary.
RANDOM_CONFIG: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "tie_word_embeddings": False,
}
# Their text decides how well the shipped model is compressed, not how fast it is.
_WINDOWS, _WINDOW = 32, 256


@dataclass(frozen=True)
class Contender:
    """One way to run a model.

    Attributes:
        name: shown in the row.
        implementation: transformers' experts implementation, or None for this package's operators.
        compressed: preset and ratio, or None for the plain weights.
    """

    name: str
    implementation: str | None = None
    compressed: Variant | None = None

    @property
    def checkpoint(self) -> str:
        """The folder of its weights."""
        return PLAIN if self.compressed is None else "{}-{}".format(*self.compressed)


CONTENDERS = (
    *(Contender(name, implementation=name) for name in HF_IMPLEMENTATIONS),
    Contender("patched plain"),
    Contender("quality 0.4", compressed=("quality", 0.4)),
    Contender("quality 0.6", compressed=("quality", 0.6)),
    Contender("throughput 0.6, dynamic", compressed=("throughput", 0.6)),
)


def write_checkpoints(
    model: str, dtype: torch.dtype, contenders: Iterable[Contender], folder: Path, overrides: Mapping[str, Any] | None = None
) -> None:
    """Save what the contenders load, each in ``folder / contender.checkpoint``.

    Args:
        model: ``"shipped"``, compressed after a short calibration; or ``"random"``, whose factors are random too.
        dtype: of all weights.
        contenders: whose checkpoints are wanted.
        folder: exists.
        overrides: entries of the random model's configuration.
    """
    wanted = {contender.checkpoint: contender.compressed for contender in contenders}
    if model == RANDOM:
        config = transformers.Qwen3MoeConfig(**{**RANDOM_CONFIG, **(overrides or {})})
        for name, variant in wanted.items():
            random_model(config, dtype, variant).save_pretrained(folder / name)
    else:
        _write_shipped(dtype, wanted, folder)


def prompt_tokens(model: str, count: int, overrides: Mapping[str, Any] | None = None) -> Tensor:
    """int64 ``[count]``: held-out text for the shipped model, random tokens for the other."""
    if model == SHIPPED:
        return heldout_tokens(load_tokenizer(str(SHIPPED_DIRECTORY)), count)
    vocabulary = {**RANDOM_CONFIG, **(overrides or {})}["vocab_size"]
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def random_model(
    config: Any, dtype: torch.dtype, variant: Variant | None = None, num_bases: int = 1
) -> transformers.PreTrainedModel:
    """A model with random weights, made in its dtype; compressed, the experts are never made.

    Args:
        config: of a family that transformers has.
        dtype: of all weights.
        variant: preset and ratio whose plan the experts follow.
        num_bases: bases a projection of that plan.
    """
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    # What is not written to takes no memory, so that the experts that are replaced cost nothing.
    with no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).eval()
    if variant is not None:
        preset, ratio = variant
        settings = CompressionConfig(ratio, preset=preset, num_bases=num_bases)
        plans = plan_compression(model_shapes(empty), settings).layers
        specs = {}
        for view, plan in zip(find_experts(model), plans, strict=True):
            specs[view.name] = spec_of(plan, view)
            view.replace(from_plan(plan, specs[view.name], dtype))
        _fill_rest(model, within=specs)
        mark_compressed(model, specs, settings.to_dict())
    else:
        _fill_rest(model, within=())
    return model.requires_grad_(False)


def _fill_rest(model: nn.Module, within: Iterable[str]) -> None:
    """Fill every parameter but those of the modules ``within``: norms with one, others so that activations keep their size."""
    filled = tuple(f"{name}." for name in within)
    for name, parameter in model.named_parameters():
        if name.startswith(filled):
            continue
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            fill_(parameter, 1.0 if "embed" in name else 1 / math.sqrt(parameter.shape[-1]))


def _write_shipped(dtype: torch.dtype, wanted: Mapping[str, Variant | None], folder: Path) -> None:
    where = str(SHIPPED_DIRECTORY)
    model = load_model(where).to(dtype)
    stats = None
    for name, variant in wanted.items():
        saved = model
        if variant is not None:
            if stats is None:
                tokens = token_stream(load_tokenizer(where), python_text("calibration"))
                batches = calibration_batches(tokens, _WINDOWS, _WINDOW, batch_size=8, seed=0)
                stats = calibrate(model, batches, merge="fisher")
            saved = copy.deepcopy(model)
            hf.compress(saved, stats, CompressionConfig(variant[1], preset=variant[0]))
        saved.save_pretrained(folder / name)
