"""The main job on every family: calibrate, compress, save, load, patch, generate."""

import pytest
import torch
from tiny_models import FAMILIES, tiny_model
from transformers import AutoModelForCausalLM

import d2moe_ext
from d2moe_ext.adapters import find_experts
from d2moe_ext.calibration import calibrate
from d2moe_ext.compress import compress_experts
from d2moe_ext.config import CompressionConfig


def batches(model, count=6, length=24):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, model.config.vocab_size, (count, length), generator=generator)]


@pytest.mark.parametrize("family", FAMILIES)
def test_calibrate_compress_save_load_patch_generate(family, tmp_path):
    model = tiny_model(family)
    (ids,) = batches(model)
    stats = d2moe_ext.calibrate(model, [ids])
    report = d2moe_ext.compress(model, stats, CompressionConfig(ratio=0.15, base_sparsity=0.3))
    assert [layer.shapes.name for layer in report.plan.layers] == list(stats.layers)
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    held = sum(p.numel() for p in {id(p): p for p in loaded.parameters()}.values())
    indices = sum(layer.index_elements for layer in report.plan.layers)
    assert held == report.plan.stored_parameters - indices
    with torch.no_grad():
        expected = model(input_ids=ids[:1]).logits
        # The same weights bit for bit; products may differ in the last bits where they are placed at another alignment.
        state = model.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
        torch.testing.assert_close(loaded(input_ids=ids[:1]).logits, expected, rtol=1e-5, atol=1e-6)
        native = d2moe_ext.patch_model(loaded)(input_ids=ids[:1]).logits
    assert float((native - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    prompt = ids[:1, :4]
    assert (
        d2moe_ext.patch_model(model).generate(prompt, max_new_tokens=4).tolist()
        == loaded.generate(prompt, max_new_tokens=4).tolist()
    )


@pytest.mark.parametrize("gauge_fixed", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "list_moe"])
def test_the_same_with_factors_of_eight_bits(family, gauge_fixed, tmp_path):
    model = tiny_model(family).bfloat16()
    (ids,) = batches(model)
    config = CompressionConfig(ratio=0.3, base_sparsity=0.3, factor_dtype="int8", gauge_fixed=gauge_fixed)
    report = d2moe_ext.compress(model, d2moe_ext.calibrate(model, [ids]), config)
    model.save_pretrained(tmp_path / "out")
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size == pytest.approx(report.plan.bytes_after, rel=0.02)  # most of so small a file is names
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
    plain = d2moe_ext.patch_model(tiny_model(family).bfloat16(), tmp_path / "out")
    prompt = ids[:1, :4]
    with torch.no_grad():
        expected = model(input_ids=ids[:1]).logits.float()
        for other in (loaded, d2moe_ext.patch_model(loaded), plain):
            assert float((other(input_ids=ids[:1]).logits - expected).norm()) <= 0.05 * float(expected.norm())
    assert loaded.generate(prompt, max_new_tokens=4).tolist() == plain.generate(prompt, max_new_tokens=4).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_statistics_come_from_the_model_as_it_runs(family):
    """The stand-ins of both passes compute what the experts do: the logits do not move while statistics are taken."""
    model = tiny_model(family)
    (ids,) = batches(model)
    with torch.no_grad():
        before = model(input_ids=ids).logits
    seen = []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(output.logits.detach()))
    stats = calibrate(model, [ids], merge="fisher", left_gram="diagonal")
    handle.remove()
    passes = [seen[0], torch.cat(seen[1:])]
    for logits in passes:
        assert float((logits - before).abs().max()) <= 1e-4 * float(before.abs().max())
    for view in find_experts(model):
        layer = stats.layers[view.name]
        assert int(layer.tokens.sum()) > 0
        assert all(bool(total.isfinite().all()) and float(total.sum()) > 0 for total in layer.fisher_sum.values())


@pytest.mark.parametrize("family", ["gpt_oss", "list_moe", "qwen3_moe"])
@pytest.mark.parametrize("ranks", ["uniform", "global"])
def test_two_sided_compression_of_other_layouts(family, ranks):
    """Interleaved rows with biases, a list of experts, and the plain layout."""
    model = tiny_model(family)
    (ids,) = batches(model)
    stats = calibrate(model, [ids], left_gram="full")
    with torch.no_grad():
        before = model(input_ids=ids).logits
        compress_experts(model, stats, CompressionConfig(0.15, ranks=ranks, base_sparsity=0.0))
        after = model(input_ids=ids).logits
    assert 0 < float((after - before).norm()) < float(before.norm())


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mixtral", {"num_bases": 2}),
        ("olmoe", {"decomposition": "whitened", "ranks": "uniform"}),
        ("list_moe", {"factor_dtype": "int8", "gauge_fixed": True}),
        ("qwen3_moe", {"sequential": True}),
    ],
)
def test_every_tensor_is_made_on_the_models_device(family, options):
    """Where none is given tensors go to the meta device here, and mixing them with the model's raises: as on a GPU."""
    model = tiny_model(family)
    (ids,) = batches(model)
    config = CompressionConfig(ratio=0.2, base_sparsity=0.3, **options)
    with torch.device("meta"), torch.no_grad():
        stats = calibrate(model, [ids], merge=config.merge, num_bases=config.num_bases)
        compress_experts(model, stats, config, batches=[ids])
        logits = d2moe_ext.patch_model(model)(input_ids=ids[:1]).logits
    assert logits.isfinite().all()
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
