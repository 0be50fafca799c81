"""The main job on a GPU: calibrate, compress, save, load, patch, generate."""

from __future__ import annotations

import pytest
import torch
from gpu import DEVICE
from tiny_models import FAMILIES, tiny_model
from transformers import AutoModelForCausalLM

import d2moe_ext
from d2moe_ext.config import CompressionConfig

pytestmark = pytest.mark.cuda
OPTIONS = {
    "quality": {"ratio": 0.2, "base_sparsity": 0.3},
    "throughput": {"ratio": 0.2, "preset": "throughput"},
    "int8": {"ratio": 0.3, "base_sparsity": 0.3, "factor_dtype": "int8"},
    "two bases": {"ratio": 0.1, "base_sparsity": 0.3, "num_bases": 2, "sequential": True},
}


def token_ids(model):
    return torch.randint(3, model.config.vocab_size, (4, 24), generator=torch.Generator().manual_seed(5))


def assert_near(actual, expected, tolerance):
    assert actual.device.type == DEVICE
    assert float((actual - expected).norm()) <= tolerance * float(expected.norm())


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_model_is_patched(family):
    model = tiny_model(family).to(DEVICE)
    ids = token_ids(model).to(DEVICE)
    expected = model(input_ids=ids).logits
    assert_near(d2moe_ext.patch_model(model)(input_ids=ids).logits, expected, 1e-4)
    assert model.generate(ids[:1, :4], max_new_tokens=4).shape == (1, 8)


@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_calibrate_compress_save_load_patch_generate(family, how, tmp_path):
    model = tiny_model(family).to(DEVICE)
    ids = token_ids(model)
    config = CompressionConfig(**OPTIONS[how])
    stats = d2moe_ext.calibrate(model, [ids], merge=config.merge, num_bases=config.num_bases)
    d2moe_ext.compress(model, stats, config, batches=[ids] if config.sequential else None)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {DEVICE}
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").to(DEVICE)
    with torch.no_grad():
        expected = model(input_ids=ids.to(DEVICE)).logits
        assert_near(loaded(input_ids=ids.to(DEVICE)).logits, expected, 1e-5)
        assert_near(d2moe_ext.patch_model(loaded)(input_ids=ids.to(DEVICE)).logits, expected, 1e-2)
        patched = d2moe_ext.patch_model(tiny_model(family).to(DEVICE), tmp_path / "out")
        prompt = ids[:1, :4].to(DEVICE)
        assert torch.equal(patched.generate(prompt, max_new_tokens=4), loaded.generate(prompt, max_new_tokens=4))
