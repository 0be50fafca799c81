"""``moe_forward`` with the products of every instruction set this CPU has, and the C++ check of the products themselves."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from moe_forward_cases import assert_within, dense_forward, make_layer

from d2moe_ext import _C, ops

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(params=_C.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.use_instruction_set(request.param)
    yield request.param
    _C.use_instruction_set(_C.instruction_sets()[0])


# Sizes past the tiles: vectors and what is left of them; few rows of x, many, and those that are packed.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factors", [{}, {"gauge_fixed": True}, {"int8": True}])
@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 1, "experts": 3, "hidden": 70, "inter": 75},
        {"tokens": 40, "experts": 3, "hidden": 77, "inter": 66, "kept": (0.8, 0.8)},
        {"tokens": 130, "experts": 2, "top_k": 1, "hidden": 67, "inter": 40, "bases": (2, 2)},
        # 64 columns are kept, of 16 norms four times each; the cut is between two norms.
        {"tokens": 26, "experts": 3, "hidden": 80, "inter": 80, "kept": (0.8, 0.8), "keep": (0.6875, 0.6875)},
    ],
)
def test_the_forward_equals_dense_weights(instruction_set: str, sizes: dict, factors: dict, dtype: torch.dtype) -> None:
    layer = make_layer(5, dtype=dtype, **factors, **sizes)
    dense = dense_forward(layer, dtype)
    assert dense.gap > 2
    assert_within(ops.moe_forward(**layer.arguments), dense.output, dense.output_error)
    for name in ("gate_up_base", "down_base"):  # the same values channel by channel, as patch_model lays them out
        layer.arguments[name] = layer.arguments[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert_within(ops.moe_forward(**layer.arguments), dense.output, dense.output_error)


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"use_instruction_set: name must be one of instruction_sets\(\), got 'none'"):
        _C.use_instruction_set("none")
    assert _C.instruction_sets()[-1] == "portable"


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_every_product_equals_a_plain_loop(tmp_path: Path) -> None:
    """What ``ctest`` runs; the benchmark itself needs Google Benchmark and is left out where it is not installed."""
    subprocess.run(["cmake", "-S", ROOT, "-B", tmp_path], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", tmp_path, "--target", "test_kernels"], check=True, capture_output=True)
    subprocess.run(["ctest", "--test-dir", tmp_path, "--output-on-failure"], check=True)
