"""Compressed models through transformers: save, from_pretrained, generate; and what a damaged checkpoint says."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, assert_close, compressed_model, files_of, logits, tiny_model, token_ids
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import is_accelerate_available

from d2moe_ext import hf
from d2moe_ext.adapters import find_experts
from d2moe_ext.checkpoint import FORMAT_VERSION
from d2moe_ext.experts import D2MoEExperts
from d2moe_ext.hf.quantizer import compressed_modules

MIXED = {"num_bases": 2, "pruned": 3, "dynamic": 4}
# transformers places modules with a device_map only where accelerate is installed.
DEVICE_MAPS = [None, *(["cpu", "auto"] if is_accelerate_available() else [])]


@pytest.fixture(autouse=True)
def _modules_cache(tmp_path_factory, monkeypatch):
    cache = str(tmp_path_factory.mktemp("modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
    monkeypatch.syspath_prepend(cache)


def load(directory, **kwargs):
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **kwargs)


@pytest.mark.parametrize("max_shard_size", ["50GB", "60KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_save_load_save_is_byte_identical(family, max_shard_size, tmp_path):
    model = compressed_model(family, **MIXED)
    model.save_pretrained(tmp_path / "first", max_shard_size=max_shard_size)
    loaded = load(tmp_path / "first")
    modules = compressed_modules(loaded)
    assert {name: module.spec for name, module in modules.items()} == {
        name: module.spec for name, module in compressed_modules(model).items()
    }
    assert not any(p.requires_grad for module in modules.values() for p in module.parameters())
    # The weights are the same bit for bit, as the files below are; products with them may differ in the last bits where
    # the loader places them at another alignment (seen on an AMD EPYC with AVX-512).
    assert_close(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "second", max_shard_size=max_shard_size)
    first, second = files_of(tmp_path / "first"), files_of(tmp_path / "second")
    assert sorted(first) == sorted(second)
    assert [name for name in first if first[name] != second[name]] == []
    shards = [name for name in first if name.endswith(".safetensors")]
    assert len(shards) == 1 if max_shard_size == "50GB" else len(shards) > 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("max_shard_size", ["50GB", "60KB"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "list_moe"])
def test_factors_of_eight_bits_are_never_cast(family, max_shard_size, dtype, tmp_path):
    model = compressed_model(family, int8=True, **MIXED)
    model.save_pretrained(tmp_path / "first", max_shard_size=max_shard_size)
    state = model.state_dict()
    factors = {name for name, tensor in state.items() if tensor.dtype == torch.int8}
    assert len(factors) == 2 * sum(len(module.spec.deltas) for module in compressed_modules(model).values())
    loaded = load(tmp_path / "first", dtype=dtype)
    assert all(module.spec.factor_dtype == "int8" for module in compressed_modules(loaded).values())
    for name, tensor in loaded.state_dict().items():
        if name in factors:
            assert tensor.dtype == torch.int8
            assert torch.equal(tensor, state[name])
        elif name.endswith("_scale"):
            assert tensor.dtype == dtype
            # Scales have eight significant bits.
            assert torch.equal(tensor.float(), state[name]) or dtype == torch.float16
    assert_close(logits(loaded).float(), logits(model), dtype)
    for other in (torch.float64, torch.float32):
        assert {t.dtype for name, t in loaded.to(other).state_dict().items() if name in factors} == {torch.int8}
    again = load(tmp_path / "first")
    again.save_pretrained(tmp_path / "second", max_shard_size=max_shard_size)
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_checkpoint_compressed_in_memory_saves_and_loads(family, tmp_path):
    """The usual way: from_pretrained, which remembers how it converted the plain weights, then compress."""
    tiny_model(family).save_pretrained(tmp_path / "plain")
    model = load(tmp_path / "plain")
    expected = logits(model)
    assert_close(expected, logits(tiny_model(family)))
    compressed = compressed_model(family)
    for view, experts in zip(find_experts(model), compressed_modules(compressed).values(), strict=True):
        view.replace(experts)
    hf.mark_compressed(model, {n: m.spec for n, m in compressed_modules(model).items()}, {"ratio": 0.4, "merge": "mean"})
    model.save_pretrained(tmp_path / "first")
    loaded = load(tmp_path / "first")
    assert_close(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "second")
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "list_moe"])
def test_a_model_with_some_layers_left_plain(family, tmp_path):
    model = compressed_model(family, layers=[1])
    model.save_pretrained(tmp_path / "first")
    loaded = load(tmp_path / "first")
    assert len(compressed_modules(loaded)) == len(find_experts(loaded)) == 1
    # The weights are the same bit for bit, as the files below are; products with them may differ in the last bits where
    # the loader places them at another alignment (seen on an AMD EPYC with AVX-512).
    assert_close(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "second")
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_is_the_same_before_and_after(family, tmp_path):
    model = compressed_model(family, **MIXED)
    model.save_pretrained(tmp_path)
    before = model.generate(token_ids(), max_new_tokens=6, do_sample=False)
    assert before.shape[1] > token_ids().shape[1]
    assert torch.equal(load(tmp_path).generate(token_ids(), max_new_tokens=6, do_sample=False), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "list_moe"])
def test_dtype_on_load(family, dtype, tmp_path):
    model = compressed_model(family, **MIXED)
    model.save_pretrained(tmp_path)
    plain = {name: p.dtype for name, p in _plain_in(family, dtype, tmp_path / "plain").named_parameters()}
    loaded = load(tmp_path, dtype=dtype)
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == plain.get(name, dtype), name
    for module in compressed_modules(loaded).values():
        assert module.gate_up_base.dtype == dtype
        assert module.gate_up_columns.dtype == torch.int32
        assert module.gate_up_column_norms.dtype == torch.float32
    assert_close(logits(loaded).float(), logits(model), dtype)


def _plain_in(family, dtype, directory):
    tiny_model(family).save_pretrained(directory)
    return load(directory, dtype=dtype)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("device_map", DEVICE_MAPS)
def test_device_maps(device_map, int8, tmp_path):
    model = compressed_model("mixtral", int8=int8, **MIXED)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, device_map=device_map)
    assert_close(logits(loaded), logits(model))


def test_auto_config_and_report_of_the_method(tmp_path):
    model = compressed_model("olmoe")
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.quantization_config["quant_method"] == "d2moe"
    assert config.quantization_config["compression"] == {"ratio": 0.4, "merge": "mean"}
    loaded = load(tmp_path)
    assert isinstance(loaded.config.quantization_config, hf.D2MoEConfig)
    assert isinstance(loaded.hf_quantizer, hf.D2MoEQuantizer)
    assert loaded.is_quantized
    assert loaded.quantization_method == "d2moe"
    assert not loaded.hf_quantizer.is_trainable


@pytest.mark.parametrize("family", ["mixtral", "list_moe"])
def test_deepcopy_of_a_loaded_model(family, tmp_path):
    compressed_model(family, **MIXED).save_pretrained(tmp_path)
    loaded = load(tmp_path)
    expected = logits(loaded)
    copied = copy.deepcopy(loaded)
    with torch.no_grad():
        for module in compressed_modules(loaded).values():
            module.down_base.zero_()
    assert not torch.allclose(logits(loaded), expected)
    assert torch.equal(logits(copied), expected)
    copied.save_pretrained(tmp_path / "copy")
    assert files_of(tmp_path / "copy")["model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()


def test_mark_compressed_refuses_other_specs():
    model = compressed_model("mixtral")
    spec = next(iter(compressed_modules(model).values())).spec
    with pytest.raises(ValueError, match=r"specs must describe the model's compressed experts .* got \['elsewhere'\]"):
        hf.mark_compressed(model, {"elsewhere": spec}, {})


def test_no_converter_of_transformers_takes_a_compressed_tensor():
    """The names of the tensors are such that conversions of plain experts pass them by, whatever the model."""
    from transformers.conversion_mapping import _build_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    mapping = _build_checkpoint_conversion_mapping()
    assert len(mapping) > 20
    joint, separate = compressed_model("gpt_oss", pruned=1), compressed_model("mixtral", pruned=1)
    suffixes = {name for m in (joint, separate) for e in compressed_modules(m).values() for name in e.state_dict()}
    blocks = ("mlp", "block_sparse_moe", "feed_forward", "mixer", "ffn")
    names = [f"model.layers.0.{block}.experts.{suffix}" for block in blocks for suffix in sorted(suffixes)]
    for converters in mapping.values():
        for converter in (c for c in converters if isinstance(c, WeightConverter)):
            for pattern in (converter.compiled_sources, converter.reverse_transform().compiled_sources):
                assert not [name for name in names if pattern.search(name)]


def rewrite(directory, edit):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


EXPERTS_OF = {
    "mixtral": "model.layers.1.block_sparse_moe.experts",
    "qwen3_moe": "model.layers.1.mlp.experts",
    "list_moe": "layers.1.mlp.experts",
}


@pytest.mark.parametrize("family", EXPERTS_OF)
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t, p: t.pop(f"{p}.down_base"), "must hold the tensor {model}.down_base, got a checkpoint without it"),
        (
            lambda t, p: t.pop(f"{p}.up_delta_rank"),
            "must hold the tensor {model}.up_delta_rank, got a checkpoint without it",
        ),
        (
            lambda t, p: t.update({f"{p}.gate_up_bias": torch.zeros(6, 48)}),
            "must hold only tensors that its config.json describes, got {model}.gate_up_bias",
        ),
        (
            lambda t, p: t.update({f"{p}.gate_delta_u": t[f"{p}.gate_delta_u"][:-1].clone()}),
            r"{model}.gate_delta_u must have shape \[24, 24\], got \[23, 24\]",
        ),
        (
            lambda t, p: t[f"{p}.down_columns"].view(-1)[3:4].fill_(24),
            "{model}: down_columns must be in 0..23, got 24",
        ),
        (
            lambda t, p: t[f"{p}.gate_up_expert_to_base"][:1].fill_(-1),
            "{model}: gate_up_expert_to_base must be in 0..1, got -1",
        ),
    ],
)
def test_damaged_tensors_are_refused_on_load(family, edit, message, tmp_path):
    compressed_model(family, **MIXED).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: edit(tensors, EXPERTS_OF[family]))
    in_model = EXPERTS_OF[family].replace("block_sparse_moe", "mlp")
    with pytest.raises(ValueError, match=message.replace("{model}", re.escape(in_model))) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t, k: t.pop(f"{k}_v_scale"), "must hold the tensor {key}_v_scale, got a checkpoint without it"),
        (lambda t, k: t.update({f"{k}_u": t[f"{k}_u"].float()}), "{key}_u must have torch.int8, got torch.float32"),
        (
            lambda t, k: t.update({f"{k}_u_scale": t[f"{k}_u_scale"].to(torch.int8)}),
            "{key}_u_scale must have a floating dtype, got torch.int8",
        ),
    ],
)
def test_factors_of_eight_bits_must_be_such_and_have_scales(edit, message, tmp_path):
    compressed_model("mixtral", int8=True, **MIXED).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: edit(tensors, f"{EXPERTS_OF['mixtral']}.up_delta"))
    with pytest.raises(ValueError, match=re.escape(message.replace("{key}", "model.layers.1.mlp.experts.up_delta"))):
        load(tmp_path)


def test_truncated_missing_and_newer_checkpoints_are_refused_on_load(tmp_path):
    compressed_model("mixtral").save_pretrained(tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=f"{shard.name} must be a whole safetensors file, got one that cannot be read"):
        load(tmp_path)
    shard.write_bytes(whole)
    load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["format_version"] = FORMAT_VERSION + 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError,
        match=f"format_version must be at most {FORMAT_VERSION}, which this d2moe_ext reads, got {FORMAT_VERSION + 1}",
    ):
        load(tmp_path)


def test_a_config_for_another_model_is_refused_on_load(tmp_path):
    compressed_model("mixtral").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    layers = config["quantization_config"]["layers"]
    layers["model.layers.7.mlp.experts"] = layers["model.layers.1.mlp.experts"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"must have the experts 'model\.layers\.7\.mlp\.experts' .* got \['model\.layers\.0"):
        load(tmp_path)
    del layers["model.layers.7.mlp.experts"]
    config["intermediate_size"] = 26
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"must have the checkpoint's layout .*intermediate_size=24.* got .*intermediate_size=26"
    ):
        load(tmp_path)


def test_no_tensor_of_a_loaded_model_is_left_unread(tmp_path):
    """Every floating tensor is the file's: the loader fills what it does not find with noise, and only warns."""
    model = compressed_model("deepseek_v3", **MIXED)
    model.save_pretrained(tmp_path)
    loaded, info = load(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert all(tensor.device.type == "cpu" for tensor in loaded.buffers())
    assert any(isinstance(module, D2MoEExperts) for module in loaded.modules())
