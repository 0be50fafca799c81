"""Statistics against their formulas, computed by autograd on the whole model."""

import math

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from d2moe_ext.adapters import find_experts
from d2moe_ext.bases import assign_bases, cluster
from d2moe_ext.calibration import calibrate, sequences_of

HIDDEN, INTER, EXPERTS, VOCABULARY = 16, 24, 4, 50


def tiny_mixtral(seed=0, num_layers=2, **options) -> MixtralForCausalLM:
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTER,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        **options,
    )
    return MixtralForCausalLM(config).eval()


def token_ids(*shape, seed=1):
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def routed_calls(model, ids):
    """What each layer's experts were called with."""
    calls = {}
    handles = [
        view.module.register_forward_pre_hook(lambda m, args, name=view.name: calls.__setitem__(name, args))
        for view in find_experts(model)
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return calls


def close(actual, expected, scale=1.0):
    """float32 forward passes in another order: relative to the largest entry."""
    expected = expected.detach()
    tolerance = 2e-5 * scale * float(expected.abs().max()) + 1e-12
    assert float((actual.double() - expected.double()).abs().max()) <= tolerance


def test_forward_statistics_are_the_formulas():
    model, ids = tiny_mixtral(), token_ids(3, 20)
    stats = calibrate(model, [ids], merge="mean", left_gram=None)
    for view in find_experts(model):
        x, index, weights = (
            part.double() if part.is_floating_point() else part for part in routed_calls(model, ids)[view.name]
        )
        layer = stats.layers[view.name]
        gated_sum = torch.zeros(len(x), INTER, dtype=torch.float64)
        for expert in range(EXPERTS):
            token, slot = torch.where(index == expert)
            gate, up = (x[token] @ view.gate_up_weight(expert).double().T).chunk(2, -1)
            activated = torch.nn.functional.silu(gate) * up
            g = weights[token, slot]
            gated_sum.index_add_(0, token, g[:, None] * activated)
            assert layer.tokens[expert] == len(token)
            close(layer.gate_mass[expert], g.sum())
            close(layer.gram_gate_up[expert], x[token].T @ x[token])
            close(layer.gram_down[expert], activated.T @ activated)
        close(layer.down_energy[0], gated_sum.square().sum(0))
        close(layer.gate_up_energy[0], sum(layer.gram_gate_up[e].diagonal() for e in range(EXPERTS)))


def fisher_by_autograd(model, sequences):
    """``Σ_sequences (∂ℓ/∂W)²`` of every experts' parameter, one backward pass of the unmodified model a sequence."""
    total = {}
    for ids in sequences:
        model.zero_grad()
        logits = model(input_ids=ids[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").backward()
        for view in find_experts(model):
            for name, parameter in (("gate_up", view.module.gate_up_proj), ("down", view.module.down_proj)):
                key = view.name, name
                total[key] = total.get(key, 0) + parameter.grad.double().square()
    model.zero_grad()
    return total


@pytest.mark.parametrize(("merge", "num_bases"), [("fisher", 1), ("fisher_frequency", 1), ("fisher", 2)])
def test_fisher_sums_are_equation_4(merge, num_bases):
    model, ids = tiny_mixtral(), token_ids(3, 20)
    stats = calibrate(model, [ids], merge=merge, num_bases=num_bases)
    expected = fisher_by_autograd(model, ids)
    for view in find_experts(model):
        layer = stats.layers[view.name]
        for name, parameter in (("gate_up", view.module.gate_up_proj), ("down", view.module.down_proj)):
            scale = 1.0 if merge == "fisher_frequency" else 1 / layer.tokens.clamp_min(1).double()[:, None, None]
            fisher = expected[view.name, name] * scale
            for base in range(num_bases):
                mine = layer.expert_to_base == base
                close(layer.fisher_sum[name][base], fisher[mine].sum(0), 5)
                close(layer.fisher_weighted[name][base], (fisher * parameter.detach().double())[mine].sum(0), 5)


def test_no_statistic_depends_on_batch_size_or_padding():
    model = tiny_mixtral()
    short, long = token_ids(12, seed=2), token_ids(20, seed=3)
    alone = calibrate(model, [short[None], long[None]], merge="fisher", left_gram="full")
    rows = torch.zeros(2, 20, dtype=torch.int64)
    mask = torch.zeros(2, 20, dtype=torch.int64)
    rows[0, 8:], mask[0, 8:], rows[1], mask[1] = short, 1, long, 1
    padded = calibrate(model, [{"input_ids": rows, "attention_mask": mask}], merge="fisher", left_gram="full")
    assert padded.num_tokens == 32
    for name, layer in alone.layers.items():
        other = padded.layers[name]
        assert torch.equal(layer.tokens, other.tokens)
        close(other.gram_down, layer.gram_down)
        for group in ("gate_up", "down"):
            close(other.fisher_sum[group], layer.fisher_sum[group])
            close(other.left_gram[group], layer.left_gram[group])


def test_left_grams_are_outer_products_of_the_outputs_gradients():
    model, ids = tiny_mixtral(num_layers=1), token_ids(1, 20)
    full = calibrate(model, [ids], left_gram="full")
    diagonal = calibrate(model, [ids], left_gram="diagonal")
    (view,) = find_experts(model)
    inputs = routed_calls(model, ids)[view.name]
    deltas = {}

    def experts(x, index, weights):
        output = torch.zeros_like(x)
        for expert in range(EXPERTS):
            token, slot = torch.where(index == expert)
            gate_up = (inputs[0][token] @ view.gate_up_weight(expert).T).detach().requires_grad_()
            result = view.apply_gate(gate_up) @ view.down_weight(expert).T
            deltas[expert] = gate_up, result
            result.retain_grad()
            output = output.index_add(0, token, result * weights[token, slot, None])
        return output

    with view.intercept(experts):
        logits = model(input_ids=ids).logits[0, :-1]
    torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
    for expert, parts in deltas.items():
        for name, part in zip(("gate_up", "down"), parts, strict=True):
            expected = part.grad.double().T @ part.grad.double()
            close(full.layers[view.name].left_gram[name][expert], expected, 5)
            close(diagonal.layers[view.name].left_gram[name][expert], expected.diagonal(), 5)


def test_statistics_in_memory_mapped_files_are_the_same(tmp_path):
    model, ids = tiny_mixtral(), token_ids(2, 20)
    in_memory = calibrate(model, [ids], merge="fisher", left_gram="diagonal")
    on_disk = calibrate(model, [ids], merge="fisher", left_gram="diagonal", offload_folder=tmp_path / "statistics")
    assert sum(file.stat().st_size for file in (tmp_path / "statistics").iterdir()) > 8 * 2 * EXPERTS * (HIDDEN**2 + INTER**2)
    for name, layer in in_memory.layers.items():
        assert torch.equal(layer.gram_down, on_disk.layers[name].gram_down)
        assert torch.equal(layer.fisher_sum["gate_up"], on_disk.layers[name].fisher_sum["gate_up"])
    with pytest.raises(ValueError, match="offload_folder must be empty or new, got"):
        calibrate(model, [ids], offload_folder=tmp_path / "statistics")


def test_the_model_is_left_as_it_was():
    model, ids = tiny_mixtral().train(), token_ids(2, 12)
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    calibrate(model, [ids])
    assert model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None


def test_an_expert_no_token_reached_is_run_on_the_pooled_sample():
    model, ids = tiny_mixtral(num_layers=1), token_ids(2, 20)
    (view,) = find_experts(model)
    gate = model.model.layers[0].mlp.gate
    # A feature that is large and positive in every token, and a router row that hates it.
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 10.0
        gate.weight[0] = 0
        gate.weight[0, 0] = -50.0
    stats = calibrate(model, [ids]).layers[view.name]
    assert stats.tokens[0] == 0
    sample = stats.pooled_sample
    activated = view.apply_gate(sample @ view.gate_up_weight(0).T).double()
    close(stats.gram_down[0], activated.T @ activated)
    assert stats.gram_tokens(0) == len(sample)
    assert float(stats.gram_gate_up[0].abs().max()) == 0


def test_activations_that_are_not_finite_are_named():
    model = tiny_mixtral()
    model.model.layers[1].mlp.experts.gate_up_proj.data[2] = math.nan
    with pytest.raises(ValueError, match=r"activations must be finite, got NaN .* into down of expert 2 of model\.layers\.1"):
        calibrate(model, [token_ids(2, 20)])
    assert "forward" not in model.model.layers[1].mlp.experts.__dict__


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches must hold at least one sequence, got none"),
        ([torch.zeros(2, 3)], r"integer token ids \[B, L\], got torch.float32 \[2, 3\]"),
        ([torch.zeros(3, dtype=torch.int64)], r"integer token ids \[B, L\], got torch.int64 \[3\]"),
    ],
)
def test_bad_batches_are_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        sequences_of(batches)


def test_progress_is_reported_to_the_end():
    seen = []
    calibrate(tiny_mixtral(), [token_ids(2, 8), token_ids(1, 8)], progress=lambda *step: seen.append(step))
    assert seen == [("Gram matrices", i, 2) for i in (1, 2)] + [("Fisher information", i, 3) for i in (1, 2, 3)]


def test_experts_with_similar_weights_share_a_base():
    model = tiny_mixtral(num_layers=1)
    (view,) = find_experts(model)
    with torch.no_grad():
        for parameter in (view.module.gate_up_proj, view.module.down_proj):
            parameter[2] = parameter[0] + 1e-3 * torch.randn_like(parameter[0])
            parameter[3] = parameter[1] + 1e-3 * torch.randn_like(parameter[1])
    assert assign_bases(view, 2).tolist() == [0, 1, 0, 1]
    assert assign_bases(view, 1).tolist() == [0, 0, 0, 0]
    assert assign_bases(view, 4).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"num_bases must lie between 1 and 4, the experts of .*, got 5"):
        assign_bases(view, 5)


def test_average_linkage_by_hand():
    positions = torch.tensor([0.0, 1.0, 10.0, 11.0, 30.0])
    distances = (positions[:, None] - positions[None]).abs()
    assert cluster(distances, 3).tolist() == [0, 0, 1, 1, 2]
    assert cluster(distances, 2).tolist() == [0, 0, 0, 0, 1]
