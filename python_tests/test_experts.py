"""The module that replaces a layer's experts: its spec, its forward, its buffers, and the uncompressed form."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from test_adapters import DuckExperts, _block
from tiny_models import (
    EXPERTS,
    FAMILIES,
    HIDDEN,
    INTER,
    TOP_K,
    assert_close,
    compress_exactly,
    dense_experts,
    logits,
    tiny_model,
    token_ids,
)
from torch.nn import functional

from d2moe_ext.adapters import find_experts
from d2moe_ext.experts import D2MoEExperts, DeltaSpec, ExpertsSpec, GroupSpec, UncompressedExperts

HOW = {
    "mean": {},
    "three_bases": {"num_bases": 3},
    "pruned": {"num_bases": 2, "pruned": 7},
    "joint": {"joint_gate_up": True, "pruned": 3},
}


def routed(num_tokens=11, seed=0, dtype=torch.float32, hidden=HIDDEN, experts=EXPERTS):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, hidden, generator=g, dtype=dtype)
    ids = torch.stack([torch.randperm(experts, generator=g)[:TOP_K] for _ in range(num_tokens)])
    return x, ids, torch.rand(num_tokens, TOP_K, generator=g, dtype=dtype)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "list_moe"])
def test_full_rank_deltas_give_the_plain_layer(family, how):
    required = {"joint_gate_up": True} if family == "gpt_oss" else {}
    view = find_experts(tiny_model(family).double())[0]
    experts = compress_exactly(view, **{**HOW[how], **required})
    arguments = routed(dtype=torch.float64)
    assert_close(experts(*arguments), dense_experts(view)(*arguments))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replaced_model_gives_the_original_logits(family):
    model = tiny_model(family)
    expected = logits(model)
    for view in find_experts(model):
        view.replace(compress_exactly(view, num_bases=2, pruned=5))
    assert_close(logits(model), expected)


def reconstructed(experts: D2MoEExperts, projection: str, expert: int) -> torch.Tensor:
    """An expert's dense weight, from the pieces: written apart from the forward."""
    group = "down" if projection == "down" else "gate_up"
    out, inputs = experts.spec.shape_of(group)
    base = int(getattr(experts, f"{group}_expert_to_base")[expert])
    weight = torch.zeros(out, inputs, dtype=torch.float64)
    columns = getattr(experts, f"{group}_columns", torch.arange(inputs).expand(EXPERTS, -1))[base].long()
    weight[:, columns] = getattr(experts, f"{group}_base")[base].double()
    rank, u, v = (int(getattr(experts, f"{projection}_delta_{p}")[expert]) for p in ("rank", "u_start", "v_start"))
    delta = getattr(experts, f"{projection}_delta_u")[u : u + rank].T @ getattr(experts, f"{projection}_delta_v")[v : v + rank]
    rows = {"gate": slice(0, INTER), "up": slice(INTER, 2 * INTER)}.get(projection, slice(None))
    return weight[rows] + delta.double()


RANKS = [3, 0, 5, 1, 2, 4]


def random_experts(dynamic: int = 0) -> D2MoEExperts:
    """Random low-rank experts of unequal ranks, one of them 0, in float64."""
    layout = find_experts(tiny_model("mixtral"))[0].layout
    ranks = torch.tensor(RANKS, dtype=torch.int32)
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), ranks.cumsum(0, dtype=torch.int32)[:-1]])
    spec = ExpertsSpec(
        layout,
        GroupSpec(2, HIDDEN - 4, HIDDEN - 4 - dynamic),
        GroupSpec(3, INTER - 5, INTER - 5 - dynamic),
        {name: DeltaSpec(15, 15) for name in ("gate", "up", "down")},
    )
    experts = D2MoEExperts(spec, None, dtype=torch.float64)
    g = torch.Generator().manual_seed(3)
    for parameter in experts.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    for group, (_, inputs) in (("gate_up", spec.shape_of("gate_up")), ("down", spec.shape_of("down"))):
        columns = getattr(experts, f"{group}_columns")
        for base in range(columns.shape[0]):
            columns[base] = torch.randperm(inputs, generator=g)[: columns.shape[1]].sort().values
        bases = torch.arange(EXPERTS) % columns.shape[0]
        getattr(experts, f"{group}_expert_to_base").copy_(bases)
    for name in spec.deltas:
        getattr(experts, f"{name}_delta_rank").copy_(ranks)
        getattr(experts, f"{name}_delta_u_start").copy_(starts)
        getattr(experts, f"{name}_delta_v_start").copy_(starts)
    experts.refresh_column_norms()
    return experts


def test_forward_is_the_formula_of_the_reconstructed_experts():
    experts = random_experts()
    experts.check_indices()
    x, ids, weights = routed(dtype=torch.float64)
    expected = torch.zeros_like(x)
    for e in range(EXPERTS):
        gate, up = (functional.linear(x, reconstructed(experts, p, e)) for p in ("gate", "up"))
        y = functional.linear(functional.silu(gate) * up, reconstructed(experts, "down", e))
        expected += ((ids == e) * weights).sum(dim=1, keepdim=True) * y
    assert_close(experts(x, ids, weights), expected)
    # Ids that are no expert contribute nothing.
    nobody = experts(x, torch.full_like(ids, EXPERTS), weights)
    assert torch.equal(nobody, torch.zeros_like(x))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "list_moe"])
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_gate_up_rows_are_the_plain_experts_before_their_gate(family, backend):
    view = find_experts(tiny_model(family))[0]
    experts = compress_exactly(view, num_bases=2, pruned=3)
    experts.backend = backend
    x, ids = torch.randn(5, HIDDEN), torch.tensor([[0, 3], [5, 1], [2, 4], [1, 0], [3, 5]])
    with torch.no_grad():
        expected = [
            functional.linear(x[pair // 2], view.gate_up_weight(e), view.gate_up_bias(e))
            for pair, e in enumerate(ids.flatten().tolist())
        ]
        assert_close(experts.gate_up_rows(x, ids), torch.stack(expected))


def test_gradients_of_inputs_and_router_weights():
    experts = random_experts()
    x, ids, weights = routed(num_tokens=2, dtype=torch.float64)
    x.requires_grad_(), weights.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: experts(x, ids, w), (x, weights), fast_mode=True)


def test_dynamic_pruning_can_be_switched_off():
    pruning, whole = random_experts(dynamic=6), random_experts()
    arguments = routed(dtype=torch.float64)
    assert pruning.prunes_dynamically
    assert not whole.prunes_dynamically
    assert not torch.allclose(pruning(*arguments), whole(*arguments))
    pruning.dynamic = False
    assert not pruning.prunes_dynamically
    assert torch.equal(pruning(*arguments), whole(*arguments))


def test_column_norms_stay_exact_through_casts_copies_and_loads():
    experts = random_experts(dynamic=6)

    def check(module):
        for group in ("gate_up", "down"):
            norms = getattr(module, f"{group}_column_norms")
            assert norms.dtype == torch.float32
            torch.testing.assert_close(norms, getattr(module, f"{group}_base").float().norm(dim=1), rtol=1e-6, atol=0)

    assert not any("norms" in name for name in experts.state_dict())
    experts.float()
    check(experts)
    check(copy.deepcopy(experts).to(torch.bfloat16))
    other = random_experts(dynamic=6).float()
    other.load_state_dict({name: t * 2 if t.is_floating_point() else t for name, t in experts.state_dict().items()})
    check(other)
    emptied = copy.deepcopy(experts).to("meta").to_empty(device="cpu")
    emptied.load_state_dict(experts.state_dict())
    check(emptied)
    torch.testing.assert_close(emptied(*routed()), experts(*routed()), rtol=0, atol=0)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "list_moe"])
def test_deepcopy_and_pickle_are_independent_and_equal(family):
    view = find_experts(tiny_model(family))[0]
    experts = compress_exactly(view)
    arguments = routed()
    expected = experts(*arguments)
    copied, pickled = copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))
    with torch.no_grad():
        experts.down_base.zero_()
    assert not torch.allclose(experts(*arguments), expected)
    assert torch.equal(copied(*arguments), expected)
    assert torch.equal(pickled(*arguments), expected)


def test_norm_after_each_expert_and_no_gate():
    view = find_experts(_block(DuckExperts((EXPERTS, INTER, HIDDEN))))[0]
    with torch.no_grad():
        view.module.post_expert_norm.weight.uniform_(0.5, 2.0)
        view.module.post_expert_norm.bias.uniform_(0.5, 2.0)
    x, ids, weights = routed()
    expected = dense_experts(view)(x, ids, weights).detach()
    experts = compress_exactly(view, num_bases=2, pruned=3)
    assert set(experts.spec.deltas) == {"up", "down"}
    assert "post_expert_norm.weight" in experts.state_dict()
    with torch.no_grad():
        assert_close(experts(x, ids, weights), expected)
        assert_close(UncompressedExperts(view)(x, ids, weights), expected)
        # The norm's offset must not turn an id that is no expert into an output.
        assert torch.equal(experts(x, torch.full_like(ids, -1), weights), torch.zeros_like(x))


@pytest.mark.parametrize(
    ("name", "position", "value", "message"),
    [
        ("gate_up_columns", (1, 2), HIDDEN, "gate_up_columns must be in 0..31, got 32"),
        ("down_columns", (0, 0), -1, "down_columns must be in 0..23, got -1"),
        ("gate_up_expert_to_base", (5,), 2, "gate_up_expert_to_base must be in 0..1, got 2"),
        ("down_expert_to_base", (0,), -3, "down_expert_to_base must be in 0..2, got -3"),
        ("up_delta_rank", (1,), -1, "up_delta_rank must be in 0..15, got -1"),
        ("down_delta_u_start", (5,), 12, r"down_delta_u_start \+ rank must be in 0..15, got 16"),
        ("gate_delta_v_start", (0,), 2**31 - 1, "gate_delta_v_start must be in 0..15, got 2147483647"),
        ("gate_delta_v_start", (0,), -1, "gate_delta_v_start must be in 0..15, got -1"),
    ],
)
def test_check_indices_names_the_list_and_the_value(name, position, value, message):
    experts = random_experts()
    getattr(experts, name)[position] = value
    with pytest.raises(ValueError, match=f"^layer 7: {message}$"):
        experts.check_indices("layer 7")


@pytest.mark.parametrize("family", FAMILIES)
def test_uncompressed_experts_are_the_plain_ones_and_share_their_storage(family):
    model = tiny_model(family)
    expected = logits(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for view in find_experts(model):
        pointers = {p.untyped_storage().data_ptr() for p in view.parameters()}
        original = list(view.parameters())
        experts = D2MoEExperts.uncompressed(view)
        held = {t.untyped_storage().data_ptr() for t in experts.parameters(recurse=False)}
        assert held == {p.untyped_storage().data_ptr() for p in original}
        assert family == "list_moe" or held == pointers
        assert experts.gate_up_base.shape == (EXPERTS, 2 * INTER, HIDDEN)
        assert not experts.prunes_dynamically
        view.replace(experts)
    assert_close(logits(model), expected)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "list_moe"])
def test_uncompressed_experts_follow_casts_and_loads(family):
    model, other = tiny_model(family), tiny_model(family, seed=1)
    for view in find_experts(model):
        view.replace(D2MoEExperts.uncompressed(view))
    expected = logits(other)
    model.load_state_dict(other.state_dict())
    assert_close(logits(model), expected)
    model.double()
    for module in model.modules():
        if isinstance(module, UncompressedExperts):
            storages = {p.untyped_storage().data_ptr() for p in module.original.parameters()}
            assert {t.untyped_storage().data_ptr() for t in module.parameters(recurse=False)} == storages
    assert_close(logits(model), expected.double(), torch.float32)
    assert_close(logits(copy.deepcopy(model)), expected.double(), torch.float32)


def spec_dict() -> dict:
    return random_experts().spec.to_dict()


def gauge_fixed_experts() -> D2MoEExperts:
    """Empty experts of ranks 3, 0, 5, 1, 2, 4 whose V's have an identity in their first columns."""
    spec = random_experts().spec
    rows = {name: -(-sum(r * (spec.shape_of(name)[1] - r) for r in RANKS) // spec.shape_of(name)[1]) for name in spec.deltas}
    deltas = {name: DeltaSpec(15, rows[name]) for name in spec.deltas}
    experts = D2MoEExperts(dataclasses.replace(spec, deltas=deltas, gauge_fixed=True), None, dtype=torch.float32)
    rank = torch.tensor(RANKS)
    for name in spec.deltas:
        elements = rank * (spec.shape_of(name)[1] - rank)
        getattr(experts, f"{name}_delta_rank").copy_(rank)
        getattr(experts, f"{name}_delta_u_start").copy_(rank.cumsum(0) - rank)
        getattr(experts, f"{name}_delta_v_start").copy_(elements.cumsum(0) - elements)
        getattr(experts, f"{name}_delta_pivots").copy_(torch.cat([torch.arange(r) for r in RANKS]))
    return experts


@pytest.mark.parametrize(
    ("name", "position", "value", "message"),
    [
        ("up_delta_rank", (1,), 16, "up_delta_rank must be in 0..15, got 16"),
        ("up_delta_rank", (5,), 8, r"up_delta_u_start \+ rank must be in 0..15, got 19"),
        ("down_delta_v_start", (5,), 233, r"down_delta_v_start \+ rank \* \(columns - rank\) must be in 0..312, got 313"),
        ("gate_delta_pivots", (3,), HIDDEN, "gate_delta_pivots must be in 0..31, got 32"),
        ("gate_delta_pivots", (4,), 0, "gate_delta_pivots must ascend within an expert, got 0 before 0 for expert 2"),
    ],
)
def test_check_indices_of_gauge_fixed_factors(name, position, value, message):
    experts = gauge_fixed_experts()
    experts.check_indices("layer 7")
    getattr(experts, name)[position] = value
    with pytest.raises(ValueError, match=f"^layer 7: {message}$"):
        experts.check_indices("layer 7")


def test_a_spec_of_the_first_format_has_whole_factors_in_the_models_dtype():
    data = spec_dict()
    del data["gauge_fixed"], data["factor_dtype"]
    assert ExpertsSpec.from_dict(data) == random_experts().spec


def test_spec_survives_json():
    for spec in (
        gauge_fixed_experts().spec,
        dataclasses.replace(gauge_fixed_experts().spec, factor_dtype="int8"),
        random_experts(dynamic=2).spec,
        compress_exactly(find_experts(tiny_model("gpt_oss"))[0]).spec,
    ):
        read = ExpertsSpec.from_dict(json.loads(json.dumps(spec.to_dict(), sort_keys=True)))
        assert read == spec
        assert read.delta_order == spec.delta_order  # the order of the tensors in sharded files


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("layout", "num_experts"), 6.0, "layout.num_experts must be int, got 6.0"),
        (("layout", "gated"), 1, "layout.gated must be bool, got 1"),
        (("layout", "activation"), 3, r"layout.activation must be str \| None, got 3"),
        (("layout", "extra"), 3, "layout must have the entries .* got .*'extra'"),
        (("gate_up", "num_bases"), 7, "gate_up.num_bases must be in 1..6, got 7"),
        (("gate_up", "kept"), 33, "gate_up must have 1 <= keep <= kept <= 32, got keep 28, kept 33"),
        (("down", "keep"), 0, "down must have 1 <= keep <= kept <= 24, got keep 0, kept 19"),
        (("down", "keep"), True, "down.keep must be int, got True"),
        (("deltas",), [], r"deltas must be a mapping, got \[\]"),
        (("deltas",), {}, "down.kept must be 24 without deltas, got 19"),
        (("deltas", "gate_up"), {"u_rows": 1, "v_rows": 1}, "deltas must be one of"),
        (("deltas", "up", "u_rows"), -1, "deltas.up must have rows >= 0, got -1 and 15"),
        (("layout", "interleaved"), True, "deltas must be one of"),
        (("unknown",), 1, "spec must have the entries"),
        (("gauge_fixed",), 1, "gauge_fixed must be bool, got 1"),
        (("factor_dtype",), "int4", r"factor_dtype must be one of \['model', 'int8'\], got 'int4'"),
        (("factor_dtype",), [], r"factor_dtype must be one of \['model', 'int8'\], got \[\]"),
    ],
)
def test_spec_refusals_are_one_sentence(path, value, message):
    data = spec_dict()
    target = data
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(ValueError, match=f"^ExpertsSpec: {message}"):
        ExpertsSpec.from_dict(data)


def test_a_gate_of_the_models_own_must_be_given():
    spec = random_experts().spec
    spec = dataclasses.replace(spec, layout=dataclasses.replace(spec.layout, activation=None))
    with pytest.raises(ValueError, match="gating must be given where the gate or a norm is the model's own, got None"):
        D2MoEExperts(spec, None, dtype=torch.float32)
    experts = D2MoEExperts(spec, lambda x: x[:, :INTER] + 1, dtype=torch.float32)
    x, ids, weights = routed()
    assert torch.equal(experts(x, ids, weights), torch.zeros_like(x))  # down is still zero


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_native_backend_is_the_torch_backend(family):
    view = find_experts(tiny_model(family))[0]
    for experts in (compress_exactly(view, num_bases=2, pruned=5, dynamic=4), D2MoEExperts.uncompressed(view)):
        with torch.no_grad():
            expected = experts(*routed())
            experts.backend = "native"
            assert_close(experts(*routed()), expected)


def test_native_backend_runs_a_norm_after_each_expert():
    view = find_experts(_block(DuckExperts((EXPERTS, INTER, HIDDEN))))[0]
    experts = compress_exactly(view)
    with torch.no_grad():
        expected = experts(*routed())
        experts.backend = "native"
        assert_close(experts(*routed()), expected)


def test_generation_of_a_compressed_model_is_the_plain_models():
    model = tiny_model("mixtral")
    expected = model.generate(token_ids(), max_new_tokens=5, do_sample=False)
    for view in find_experts(model):
        view.replace(compress_exactly(view))
    assert torch.equal(model.generate(token_ids(), max_new_tokens=5, do_sample=False), expected)


def off_the_line(parameter):
    """The same values, as if mapped from a file: not at a cache line's boundary."""
    element = parameter.element_size()
    spare = torch.empty(parameter.numel() + 64 // element, dtype=parameter.dtype)
    first = (16 - spare.data_ptr() % 64) // element % (64 // element)
    return spare[first : first + parameter.numel()].view(parameter.shape).copy_(parameter)


def test_the_native_backend_moves_weights_to_cache_lines():
    view = find_experts(tiny_model("mixtral"))[0]
    module = compress_exactly(view, pruned=4, dynamic=4)
    x, ids, weights = routed()
    expected = module(x, ids, weights)
    for parameter in module.parameters():
        parameter.data = off_the_line(parameter.detach())
        assert parameter.data_ptr() % 64
    module.set_backend("native")
    assert not any(parameter.data_ptr() % 64 for parameter in module.parameters())
    assert module.gate_up_base.stride(1) == 1
    assert_close(module(x, ids, weights), expected)


def test_an_uncompressed_layer_stays_where_its_weights_are():
    view = find_experts(tiny_model("mixtral"))[0]
    for parameter in view.module.parameters():
        parameter.data = off_the_line(parameter.detach())
    before = [parameter.data_ptr() for parameter in view.module.parameters()]
    D2MoEExperts.uncompressed(view).set_backend("native")
    assert [parameter.data_ptr() for parameter in view.module.parameters()] == before
