"""Ideas on top of the default: what they store, and that each keeps what its formula promises."""

from __future__ import annotations

import copy
import math

import baseline_cases
import pytest
import torch

from benchmarks.quality.beyond import BEYOND
from benchmarks.quality.methods import all_methods, round_stored, stored_bytes
from benchmarks.quality.package_methods import package_method
from benchmarks.quality.retired import RETIRED
from benchmarks.study import Calibration, byte_budget, capture_inputs
from d2moe_ext.adapters import find_experts
from d2moe_ext.calibration import calibrate
from d2moe_ext.experts import D2MoEExperts

RATIO = 0.5
FIXED = {"base_sparsity": 0.2, "alternations": 1}


@pytest.fixture(scope="module")
def case():
    model, _ = baseline_cases.prepared("mixtral")
    ids = torch.randint(3, 64, (4, 64), generator=torch.Generator().manual_seed(0))
    batches = list(ids.split(2))
    stats = calibrate(model, batches, merge="fisher", left_gram="full")
    return model, Calibration(batches, stats, capture_inputs(model, batches, find_experts(model)))


def compressed(model):
    return [module for module in model.modules() if isinstance(module, D2MoEExperts)]


@pytest.mark.parametrize("gauge_fixed", [False, True])
def test_the_bytes_of_eight_bit_factors_are_those_of_the_tensors_and_nearly_the_budget(case, gauge_fixed):
    """Counted once more from what a layer says of itself; a scale is a bfloat16, and rows of V are filled up."""
    model = copy.deepcopy(case[0])
    budget = byte_budget(model, RATIO)
    count = package_method(factor_dtype="int8", gauge_fixed=gauge_fixed, **FIXED)(model, case[1], RATIO)
    others = sum(p.numel() for p in model.parameters()) - sum(p.numel() for e in compressed(model) for p in e.parameters())
    total = 2 * others
    for experts in compressed(model):
        total += 2 * (experts.gate_up_base.numel() + experts.down_base.numel())
        total += 4 * sum(t.numel() for t in experts.state_dict().values() if t.dtype == torch.int32)
        for name in experts.spec.deltas:
            ranks = getattr(experts, f"{name}_delta_rank").tolist()
            out, inputs = experts.spec.shape_of(name)
            elements = sum(rank * (inputs - rank * gauge_fixed) for rank in ranks)
            total += sum(ranks) * out + math.ceil(elements / inputs) * inputs + 2 * 2 * sum(ranks)
    assert count == total
    # What pivots may take at most is set aside.
    assert (0.93 if gauge_fixed else 0.97) * budget < count <= budget


def test_rounding_leaves_eight_bits_alone(case):
    model = copy.deepcopy(case[0])
    package_method(factor_dtype="int8", **FIXED)(model, case[1], RATIO)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    round_stored(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])  # scales of eight bits are bfloat16's already
        assert (tensor.dtype == torch.int8) == name.endswith(("_delta_u", "_delta_v"))


@pytest.mark.parametrize(
    "options", [{"sequential": True}, {"joint_gate_up": False}, {"num_bases": 2}, {"sequential": True, "factor_dtype": "int8"}]
)
def test_a_method_stays_within_the_budget(case, options):
    model = copy.deepcopy(case[0])
    count = package_method(**options, **FIXED)(model, case[1], RATIO)
    assert count == stored_bytes(model) <= byte_budget(case[0], RATIO)


def test_every_idea_has_a_name_of_its_own():
    assert len(set(map(id, BEYOND.values()))) == len(BEYOND) > 10
    assert BEYOND.items() <= all_methods().items()
    assert not RETIRED.keys() & all_methods().keys()
