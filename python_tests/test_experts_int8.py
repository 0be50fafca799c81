"""The module with factors of eight bits: casts leave them alone, and both backends read them as they say."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from test_experts import gauge_fixed_experts, random_experts, routed
from tiny_models import assert_close, compress_exactly, tiny_model

from d2moe_ext.adapters import find_experts
from d2moe_ext.experts import D2MoEExperts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gauge_fixed", [False, True])
def test_factors_of_eight_bits_are_no_casts_business(dtype, gauge_fixed):
    plain = gauge_fixed_experts() if gauge_fixed else random_experts().float()
    experts = D2MoEExperts(dataclasses.replace(plain.spec, factor_dtype="int8"), None, dtype=torch.float32)
    for name, tensor in plain.state_dict().items():
        if tensor.dtype == torch.int32:
            experts.get_buffer(name).copy_(tensor)
    g = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        if parameter.dtype == torch.int8:
            parameter.copy_(torch.randint(-127, 128, parameter.shape, generator=g))
        else:
            parameter.copy_(torch.randn(parameter.shape, generator=g).bfloat16())
    rows = 15 if gauge_fixed else experts.gate_delta_v.shape[0]
    assert experts.gate_delta_v_scale.shape == (rows,)
    assert experts.gate_delta_u_scale.shape == (15,)
    experts.check_indices()
    before = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    cast = pickle.loads(pickle.dumps(copy.deepcopy(experts))).to(dtype)
    for name, tensor in cast.state_dict().items():
        integer = not before[name].is_floating_point()
        assert tensor.dtype == (before[name].dtype if integer else dtype), name
        assert torch.equal(tensor.double(), before[name].double()), name
    x, ids, weights = routed()
    expected = experts.double()(x.double(), ids, weights.double())
    assert_close(cast(x.to(dtype), ids, weights.to(dtype)).double(), expected, dtype)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "list_moe"])
def test_a_layer_of_eight_bits_computes_what_its_factors_say(family, backend):
    """Through both forms of the forward: whole, and in halves where the gate is the model's own."""
    view = find_experts(tiny_model(family))[0]
    experts, plain = compress_exactly(view, num_bases=2, int8=True), compress_exactly(view, num_bases=2)
    for factor in [f"{name}_delta_{part}" for name in plain.spec.deltas for part in "uv"]:
        assert getattr(experts, factor).dtype == torch.int8
        read = getattr(experts, f"{factor}_scale")[:, None] * getattr(experts, factor)
        assert float((read - getattr(plain, factor)).abs().max()) < 0.02
        getattr(plain, factor).copy_(read)
    experts.backend = backend
    with torch.no_grad():
        assert_close(experts(*routed()), plain(*routed()))
