"""patch_model and unpatch_model: native operators in a model in memory, and the model as it was."""

from __future__ import annotations

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch
from tiny_models import FAMILIES, assert_close, compressed_model, files_of, logits, tiny_model, token_ids
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from d2moe_ext import _native, patch_model, unpatch_model
from d2moe_ext.adapters import find_experts
from d2moe_ext.experts import D2MoEExperts, UncompressedExperts
from d2moe_ext.hf.patch import _check_build
from d2moe_ext.hf.quantizer import compressed_modules

MIXED = {"num_bases": 2, "pruned": 3, "dynamic": 4}


def wrapped(model):
    return [module for module in model.modules() if isinstance(module, UncompressedExperts)]


def storages(tensors):
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_model_computes_the_same_and_comes_back_exactly(family, dtype):
    model = tiny_model(family).to(dtype)
    expected = logits(model)
    modules = {view.name: view.module for view in find_experts(model)}
    parameters = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    assert patch_model(model) is model
    assert [module.backend for module in wrapped(model)] == ["native", "native"]
    assert storages(p for m in wrapped(model) for p in m.parameters(recurse=False)) == storages(
        p for module in modules.values() for p in module.parameters()
    )
    assert_close(logits(model), expected)
    assert unpatch_model(model) is model
    assert {view.name: view.module for view in find_experts(model)} == modules
    assert [name for name, p in model.named_parameters() if parameters[name][0] != id(p)] == []
    assert [name for name, p in model.named_parameters() if not torch.equal(parameters[name][1], p)] == []
    assert list(parameters) == [name for name, _ in model.named_parameters()]
    assert torch.equal(logits(model), expected)
    patch_model(model)
    assert_close(logits(model), expected)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "list_moe"])
def test_a_patched_plain_model_saves_as_the_plain_model(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "plain")
    patch_model(model)
    model.save_pretrained(tmp_path / "patched")
    assert files_of(tmp_path / "plain") == files_of(tmp_path / "patched")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compressed_model_changes_its_backend_and_back(family):
    model = compressed_model(family, **MIXED)
    expected = logits(model)
    patch_model(model)
    assert {module.backend for module in compressed_modules(model).values()} == {"native"}
    assert_close(logits(model), expected)
    unpatch_model(model)
    assert {module.backend for module in compressed_modules(model).values()} == {"torch"}
    assert torch.equal(logits(model), expected)


def test_bases_that_are_pruned_by_the_batch_are_laid_out_by_channel_and_back():
    model = compressed_model("mixtral", **MIXED)
    bases = [(p, p.detach().clone()) for n, p in model.named_parameters() if n.endswith("_base")]
    assert all(base.is_contiguous() for base, _ in bases)
    patch_model(model)
    assert all(base.stride(1) == 1 and base.stride(2) == base.shape[1] for base, _ in bases)
    assert all(torch.equal(base, before) for base, before in bases)
    unpatch_model(model)
    assert all(base.is_contiguous() and torch.equal(base, before) for base, before in bases)
    model = patch_model(compressed_model("mixtral", num_bases=2, pruned=3))
    assert all(p.is_contiguous() for n, p in model.named_parameters() if n.endswith("_base"))


@pytest.mark.parametrize("max_shard_size", ["50GB", "60KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoints_layers_in_a_plain_model_and_back(family, max_shard_size, tmp_path):
    compressed = compressed_model(family, **MIXED)
    compressed.save_pretrained(tmp_path / "compressed", max_shard_size=max_shard_size)
    model = tiny_model(family)
    plain = logits(model)
    model.save_pretrained(tmp_path / "plain")
    patch_model(model, checkpoint=tmp_path / "compressed")
    assert not torch.allclose(logits(model), plain)
    assert_close(logits(model), logits(compressed))
    model.save_pretrained(tmp_path / "saved", max_shard_size=max_shard_size)
    assert files_of(tmp_path / "saved") == files_of(tmp_path / "compressed")
    unpatch_model(model)
    assert torch.equal(logits(model), plain)
    assert not getattr(model, "is_quantized", False)
    model.save_pretrained(tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "plain")


def test_a_checkpoint_takes_the_models_dtype_and_names(tmp_path):
    """A model loaded from files that were written with the model's own names, not the original ones."""
    compressed_model("mixtral").save_pretrained(tmp_path / "compressed")
    tiny_model("mixtral").save_pretrained(tmp_path / "plain", save_original_format=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    expected = logits(model)
    patch_model(model, tmp_path / "compressed")
    for module in compressed_modules(model).values():
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        assert not any(p.requires_grad for p in module.parameters())
    assert_close(logits(model), expected)


def test_the_loaded_layers_do_not_depend_on_the_files(tmp_path):
    compressed_model("mixtral").save_pretrained(tmp_path)
    model = patch_model(tiny_model("mixtral"), tmp_path)
    expected = logits(model)
    size = (tmp_path / "model.safetensors").stat().st_size
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.write(bytes(size))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("family", ["mixtral", "list_moe"])
def test_deepcopy_of_a_patched_model_unpatches_by_itself(family):
    model = patch_model(tiny_model(family))
    expected = logits(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for module in wrapped(model):
            module.down_base.zero_()
    assert not torch.allclose(logits(model), expected)
    assert torch.equal(logits(copied), expected)
    assert_close(logits(unpatch_model(copied)), expected)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "list_moe"])
def test_generate_with_native_operators(family):
    model = tiny_model(family)
    expected = model.generate(token_ids(), max_new_tokens=5, do_sample=False)
    assert torch.equal(patch_model(model).generate(token_ids(), max_new_tokens=5, do_sample=False), expected)


def test_the_native_backend_refuses_gradients_and_the_torch_backend_gives_them():
    model = patch_model(tiny_model("mixtral"))
    with pytest.raises(RuntimeError, match=r"torch\.no_grad\(\)|unpatch_model"):
        model(token_ids())
    unpatch_model(model)
    patch_model(model, backend="torch")
    model(token_ids()).logits.sum().backward()
    gate_up = find_experts(unpatch_model(model))[0].parameters()[0]
    assert gate_up.grad is not None
    assert float(gate_up.grad.abs().sum()) > 0


def test_refusals_are_one_sentence(tmp_path):
    compressed_model("mixtral").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^patch_model: backend must be 'native' or 'torch', got 'cuda'$"):
        patch_model(tiny_model("mixtral"), backend="cuda")
    with pytest.raises(ValueError, match=r"^unpatch_model: the model must be patched, got an unpatched MixtralForCausalLM$"):
        unpatch_model(tiny_model("mixtral"))
    with pytest.raises(ValueError, match=r"^patch_model: the model must not be patched already"):
        patch_model(patch_model(tiny_model("mixtral")))
    with pytest.raises(ValueError, match="must be plain where a checkpoint is given, got 2 compressed layers"):
        patch_model(compressed_model("mixtral"), tmp_path)
    with pytest.raises(ValueError, match="must have mixture-of-experts layers"):
        patch_model(LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=2)))
    with pytest.raises(ValueError, match=r"must be a compressed checkpoint, got a path without config\.json"):
        patch_model(tiny_model("mixtral"), tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["truncated", "plain", "other"])
def test_a_model_is_left_as_it_was_when_its_checkpoint_is_refused(damage, tmp_path):
    messages = {
        "truncated": "must be a whole safetensors file",
        "plain": "must hold a quantization_config of a compressed model, got none",
        "other": "must have the experts 'layers.0.mlp.experts' that the checkpoint describes",
    }
    source = {
        "truncated": compressed_model("mixtral"),
        "plain": tiny_model("mixtral"),
        "other": compressed_model("list_moe"),
    }
    source[damage].save_pretrained(tmp_path / "checkpoint")
    if damage == "truncated":
        file = tmp_path / "checkpoint" / "model.safetensors"
        shutil.copy(file, tmp_path / "whole")
        file.write_bytes(file.read_bytes()[:-1])
    model = tiny_model("mixtral")
    expected = logits(model)
    with pytest.raises(ValueError, match=messages[damage]):
        patch_model(model, tmp_path / "checkpoint")
    assert torch.equal(logits(model), expected)
    assert not any(isinstance(module, D2MoEExperts) for module in model.modules())
    with pytest.raises(ValueError, match="must be patched"):
        unpatch_model(model)


@pytest.mark.parametrize("cuda", [False, True])
def test_native_operators_on_a_gpu_need_a_build_with_cuda(cuda, monkeypatch):
    monkeypatch.setattr(_native, "C", SimpleNamespace(build_info=lambda: {"cuda": cuda}))
    on_gpu = SimpleNamespace(parameters=lambda: [SimpleNamespace(device=torch.device("cuda", 0))])
    _check_build(tiny_model("mixtral"))
    if cuda:
        _check_build(on_gpu)
    else:
        with pytest.raises(
            ValueError, match="the backend must be 'torch' for a model on a GPU where d2moe_ext was built without CUDA"
        ):
            _check_build(on_gpu)
