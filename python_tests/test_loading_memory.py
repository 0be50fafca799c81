"""Loading a compressed checkpoint never holds its weights twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from benchmarks.model.checkpoints import RANDOM_CONFIG, random_model

ROOT = Path(__file__).parents[1]
# The compressed model: 137 MB in eight layers and many bases, nearly all of it in experts.
SIZES = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 512,
    "moe_intermediate_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "head_dim": 32,
    "num_experts": 24,
    "num_experts_per_tok": 4,
}
SMALL = {**SIZES, "hidden_size": 64, "moe_intermediate_size": 48, "num_hidden_layers": 2, "num_experts": 8}

_LOAD = """
import json, sys, threading
import torch
import d2moe_ext
from d2moe_ext.cli.common import quiet_transformers
from d2moe_ext.hf.quantizer import compressed_modules
from transformers import AutoModelForCausalLM

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon:"))

def load(way, plain, compressed):
    # The files hold bfloat16. Loaded as they are, the weights would stay pages of the mapped file, which count as nobody's.
    if way == "from_pretrained":
        return d2moe_ext.patch_model(AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.float16))
    return d2moe_ext.patch_model(plain, checkpoint=compressed)

quiet_transformers()
way, directory = sys.argv[1:]
load(way, AutoModelForCausalLM.from_pretrained(f"{directory}/small-plain"), f"{directory}/small")  # imports and pools
plain = AutoModelForCausalLM.from_pretrained(f"{directory}/plain") if way == "checkpoint" else None
if plain is not None:
    for parameter in plain.parameters():
        parameter.data = parameter.data.clone()  # or the first look at a mapped page would count later
before, most, done = anonymous(), [0], threading.Event()

def watch():
    while not done.wait(0.0003):
        most[0] = max(most[0], anonymous())

thread = threading.Thread(target=watch)
thread.start()
model = load(way, plain, f"{directory}/compressed")
after = anonymous()
done.set()
thread.join()
modules = [model] if way == "from_pretrained" else compressed_modules(model).values()
weights = sum(t.numel() * t.element_size() for module in modules for t in module.state_dict().values())
print(json.dumps({"most": max(most[0], after) - before, "after": after - before, "weights": weights}))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints")
    for prefix, sizes in (("small-", SMALL), ("", SIZES)):
        config = transformers.Qwen3MoeConfig(**{**RANDOM_CONFIG, **sizes})
        random_model(config, torch.bfloat16).save_pretrained(directory / f"{prefix}plain")
        # Its bases are laid out anew by patch_model; that many are a good part of the model.
        model = random_model(config, torch.bfloat16, ("throughput", 0.4), num_bases=sizes["num_experts"] // 3)
        model.save_pretrained(directory / (prefix.rstrip("-") or "compressed"))
    return directory


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")
@pytest.mark.parametrize("way", ["from_pretrained", "checkpoint"])
def test_weights_are_never_held_twice(way, checkpoints):
    """Anonymous memory alone: pages of a mapped file are the system's to drop."""
    ended = subprocess.run(
        [sys.executable, "-c", _LOAD, way, str(checkpoints)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode == 0, ended.stderr
    memory = json.loads(ended.stdout)
    assert memory["weights"] > 100e6
    # What is measured does hold the weights, once.
    assert memory["after"] > 0.9 * memory["weights"], memory
    assert memory["most"] < 1.3 * memory["weights"], memory
