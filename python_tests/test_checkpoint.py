"""Reading a compressed checkpoint's files: what is in them, and one clear sentence for each way they can be wrong."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import compressed_model

from d2moe_ext.checkpoint import (
    FORMAT_VERSION,
    CompressedLayers,
    check_tensors,
    read_compressed_layers,
    read_tensors,
    tensor_infos,
    weight_files,
)
from d2moe_ext.hf.quantizer import compressed_modules


@pytest.fixture(scope="module")
def model():
    return compressed_model("qwen3_moe", num_bases=2, pruned=3, dynamic=2)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def checkpoint(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoint")


def edit_config(directory, function):
    config = json.loads((directory / "config.json").read_text())
    function(config)
    (directory / "config.json").write_text(json.dumps(config))


def test_config_describes_the_layers(model, saved):
    described = read_compressed_layers(saved)
    assert described.layers == {name: module.spec for name, module in compressed_modules(model).items()}
    assert described.compression == {"ratio": 0.4, "merge": "mean"}
    assert CompressedLayers.from_dict(described.to_dict()) == described


def test_every_tensor_is_read_once_and_whole(model, saved, tmp_path):
    state = model.state_dict()
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="60KB")
    assert len(weight_files(saved)) == 1
    assert len(weight_files(sharded)) > 2
    for directory in (saved, sharded):
        infos = tensor_infos(weight_files(directory))
        assert {name: (info.shape, info.dtype) for name, info in infos.items()} == {
            name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()
        }
        read = list(read_tensors(infos))
        assert len(read) == len(state)
        assert all(torch.equal(tensor, state[name]) for name, tensor in read)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("quantization_config"), "must hold a quantization_config of a compressed model, got none"),
        (lambda c: c["quantization_config"].update(quant_method="gptq"), "quant_method must be 'd2moe', got 'gptq'"),
        (
            lambda c: c["quantization_config"].update(format_version=FORMAT_VERSION + 1),
            f"format_version must be at most {FORMAT_VERSION}, which this d2moe_ext reads, got {FORMAT_VERSION + 1}",
        ),
        (lambda c: c["quantization_config"].update(format_version="1"), "format_version must be at most .* got '1'"),
        (lambda c: c["quantization_config"].update(layers={}), "layers must map paths to specs .* got dict and dict"),
        (lambda c: c["quantization_config"].pop("layers"), "layers must map paths to specs .* got NoneType and dict"),
        (
            lambda c: c["quantization_config"]["layers"]["model.layers.1.mlp.experts"]["down"].update(kept=99),
            r"layers\['model.layers.1.mlp.experts'\] is no layer: .* got keep 19, kept 99",
        ),
    ],
)
def test_config_refusals(checkpoint, edit, message):
    edit_config(checkpoint, edit)
    with pytest.raises(ValueError, match=message) as error:
        read_compressed_layers(checkpoint)
    assert str(checkpoint / "config.json") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_the_first_format_is_read_as_what_it_is(checkpoint):
    """Format 1 knew no gauge-fixed factors and did not mention them."""
    expected = read_compressed_layers(checkpoint)

    def as_written_then(config):
        config["quantization_config"]["format_version"] = 1
        for layer in config["quantization_config"]["layers"].values():
            assert layer.pop("gauge_fixed") is False

    edit_config(checkpoint, as_written_then)
    read = read_compressed_layers(checkpoint)
    assert (read.layers, read.format_version) == (expected.layers, 1)
    assert read.to_dict()["format_version"] == FORMAT_VERSION


def test_a_config_that_is_missing_or_no_json(checkpoint):
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json must be JSON, got Expecting"):
        read_compressed_layers(checkpoint)
    (checkpoint / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json must hold a JSON object, got list"):
        read_compressed_layers(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(ValueError, match=r"must be a compressed checkpoint, got a path without config\.json"):
        read_compressed_layers(checkpoint)
    with pytest.raises(ValueError, match="must be a compressed checkpoint"):
        read_compressed_layers(checkpoint / "nowhere")


def test_weight_files_that_are_missing(model, checkpoint, tmp_path):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"must hold model\.safetensors, got a directory without it"):
        weight_files(checkpoint)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    second = weight_files(tmp_path / "sharded")[1]
    second.unlink()
    with pytest.raises(ValueError, match=f"must hold {second.name}, got a directory without it"):
        weight_files(tmp_path / "sharded")
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(ValueError, match="must hold a weight_map, got int"):
        weight_files(tmp_path / "sharded")


@pytest.mark.parametrize("length", [0, 5, 4096, -1])
def test_a_truncated_file(checkpoint, length):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"model\.safetensors must be a whole safetensors file, got one that cannot"):
        tensor_infos([file])


def test_tensors_that_are_missing_unexpected_or_unlike(tmp_path):
    expected = {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.int32), "q": torch.zeros(5, dtype=torch.int8)}

    def check(**tensors):
        save_file(tensors, tmp_path / "file.safetensors")
        check_tensors(expected, tensor_infos([tmp_path / "file.safetensors"]), "the checkpoint")

    good = {name: tensor.clone() for name, tensor in expected.items()}
    check(**good)
    check(**{**good, "a": good["a"].half()})  # the loader casts
    with pytest.raises(ValueError, match=r"^the checkpoint must hold the tensor b, got a checkpoint without it$"):
        check(a=good["a"])
    # Integers are never cast: eight bits mean nothing without their scale.
    for other in (torch.float32, torch.bfloat16, torch.int32):
        with pytest.raises(ValueError, match=rf"q must have torch\.int8, got {other}$"):
            check(**{**good, "q": good["q"].to(other)})
    with pytest.raises(ValueError, match=r"a must have a floating dtype, got torch\.int8$"):
        check(**{**good, "a": good["a"].to(torch.int8)})
    with pytest.raises(ValueError, match=r"b must have torch\.int32, got torch\.int8$"):
        check(**{**good, "b": good["b"].to(torch.int8)})
    with pytest.raises(ValueError, match=r"must hold only tensors that its config.json describes, got c$"):
        check(**good, c=torch.zeros(1))
    with pytest.raises(ValueError, match=r"a must have shape \[2, 3\], got \[3, 2\]$"):
        check(**{**good, "a": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match=r"b must have torch.int32, got I64$"):
        check(**{**good, "b": torch.zeros(4, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"a must have a floating dtype, got torch.int32$"):
        check(**{**good, "a": torch.zeros(2, 3, dtype=torch.int32)})
