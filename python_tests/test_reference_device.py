"""The operators in plain torch make every tensor on their inputs' device, so that they run on any GPU.

Tensors whose device nobody gives go to the meta device here, and mixing them with others raises: as on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from moe_forward_cases import make_layer

from d2moe_ext import reference


@pytest.mark.parametrize(
    "sizes",
    [
        {"bases": (2, 1), "kept": (0.7, 0.7), "keep": (0.6, 0.6), "sentinels": True},
        {"gauge_fixed": True, "bias": True, "interleaved": True, "deltas": "joint"},
        {"int8": True, "gated": False},
    ],
)
def test_forward(sizes):
    layer = make_layer(1, **sizes)
    with torch.device("meta"):
        output = reference.moe_forward(**layer.arguments)
        per_pair = reference.moe_down_forward(**layer.down_arguments(layer.arguments["hidden_states"].new_zeros(14, 10), True))
    assert output.isfinite().all()
    assert per_pair.device.type == "cpu"


def test_the_others():
    generator = torch.Generator().manual_seed(0)
    x, square = torch.randn(9, 6, generator=generator), torch.eye(6)
    sums = [torch.zeros(9, 6), torch.zeros(9, 6)]
    with torch.device("meta"):
        reference.gram_update_(square, x)
        reference.fisher_merge_(*sums, x, x, 0.5)
        selected = reference.column_select(x, x[0].abs(), 3)
        factors = reference.whitened_svd(x[None], 2, square[None], x[None, :, 0] ** 2)
    assert all(value.device.type == "cpu" for value in (*selected, *factors))
