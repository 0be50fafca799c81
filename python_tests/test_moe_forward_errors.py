# ruff: noqa: E501  (a table of refusals, one a line)
"""Every refusal of ``moe_forward`` and its halves: one sentence with operator, argument, rule and value."""

from __future__ import annotations

import re

import pytest
import torch
from moe_forward_cases import make_layer

from d2moe_ext import ops, reference

LAYER = make_layer(
    1, tokens=7, top_k=2, experts=4, hidden=12, inter=10, bias=True, kept=(0.5, 0.5), keep=(0.5, 0.5), ranks="uniform"
)
A = LAYER.arguments
PIVOTS = make_layer(1, experts=4, hidden=12, inter=10, deltas="joint", ranks="uniform", gauge_fixed=True).arguments
INT8 = make_layer(1, experts=4, hidden=12, inter=10, deltas="joint", ranks="uniform", int8=True).arguments
INT8_PIVOTS = make_layer(1, experts=4, deltas="joint", ranks="uniform", gauge_fixed=True, int8=True).arguments
INTERLEAVED = make_layer(1, interleaved=True, deltas="separate").arguments
UNGATED = make_layer(1, gated=False).arguments


def changed(name: str, index: int, value: torch.Tensor) -> dict:
    return {name: [value if i == index else item for i, item in enumerate(A[name])]}


def with_value(tensor: torch.Tensor, position: tuple[int, ...], value: int) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[position] = value
    return tensor


def refuse(function: object, arguments: dict, message: str) -> None:
    with pytest.raises(RuntimeError, match="^" + re.escape(message) + "($|\n)"):
        function(**arguments)


ERRORS = [
    ({"hidden_states": A["hidden_states"].double()}, "hidden_states must be float32, bfloat16 or float16, got Double"),
    ({"hidden_states": torch.zeros(12)}, "hidden_states must have 2 dimensions, got shape [12]"),
    ({"top_k_index": A["top_k_index"].float()}, "top_k_index must be int64 or int32, got Float"),
    ({"top_k_index": A["top_k_index"][:3]}, "top_k_index must have shape [7, k], got [3, 2]"),
    ({"top_k_index": A["top_k_index"][:, 0]}, "top_k_index must have shape [7, k], got [7]"),
    ({"top_k_weights": A["top_k_weights"].double()}, "top_k_weights must be float32, bfloat16 or float16, got Double"),
    ({"top_k_weights": A["top_k_weights"][:, :1]}, "top_k_weights must have shape [7, 2], got [7, 1]"),
    ({"gate_up_base": A["gate_up_base"].half()}, "gate_up_base must be Float, got Half"),
    ({"gate_up_base": A["gate_up_base"][0]}, "gate_up_base must have shape [K, out, kept], got [20, 6]"),
    ({"gate_up_bias": None, "gate_up_base": A["gate_up_base"][:, :15]}, "gate_up_base must have I or 2 I rows with I = 10, got 15"),
    ({"gate_up_columns": A["gate_up_columns"].long()}, "gate_up_columns must be Int, got Long"),
    ({"gate_up_columns": A["gate_up_columns"][:, 1:]}, "gate_up_columns must have shape [1, 6], got [1, 5]"),
    ({"gate_up_columns": None}, "gate_up_base without gate_up_columns must have 12 columns, got 6"),
    ({"gate_up_columns": with_value(A["gate_up_columns"], (0, 2), 12)}, "gate_up_columns must hold values from 0 to 11, got 12"),
    ({"down_columns": with_value(A["down_columns"], (0, 2), -1)}, "down_columns must hold values from 0 to 9, got -1"),
    ({"gate_up_column_norms": None}, "gate_up_column_norms must be given where gate_up_keep is less than the 6 kept columns, got None with gate_up_keep = 3"),
    ({"gate_up_column_norms": A["gate_up_column_norms"].double()}, "gate_up_column_norms must be Float, got Double"),
    ({"down_column_norms": A["down_column_norms"][:, :2]}, "down_column_norms must have shape [1, 5], got [1, 2]"),
    ({"gate_up_keep": 7}, "gate_up_keep must be between 0 and the 6 kept columns, got 7"),
    ({"down_keep": -1}, "down_keep must be between 0 and the 5 kept columns, got -1"),
    ({"gate_up_expert_to_base": A["gate_up_expert_to_base"].long()}, "gate_up_expert_to_base must be Int, got Long"),
    ({"gate_up_expert_to_base": with_value(A["gate_up_expert_to_base"], (3,), 1)}, "gate_up_expert_to_base must hold values from 0 to 0, got 1"),
    ({"down_expert_to_base": with_value(A["down_expert_to_base"], (3,), -2)}, "down_expert_to_base must hold values from 0 to 0, got -2"),
    ({"down_expert_to_base": A["down_expert_to_base"][:3], "down_bias": None}, "down_expert_to_base must have shape [4] like gate_up_expert_to_base, got [3]"),
    ({"gate_up_bias": A["gate_up_bias"][:3]}, "gate_up_bias must have shape [4, 20], got [3, 20]"),
    ({"down_bias": A["down_bias"].half()}, "down_bias must be Float, got Half"),
    ({"down_base": A["down_base"][:, :11], "down_bias": None}, "down_base must have 12 rows like the columns of hidden_states, got 11"),
    ({"delta_v": A["delta_v"][:2]}, "delta_v must hold 3 tensors like delta_u, got 2"),
    ({"delta_rank": A["delta_rank"][:1]}, "delta_rank must hold 3 tensors like delta_u, got 1"),
    ({"delta_u_start": []}, "delta_u_start must hold 3 tensors like delta_u, got 0"),
    ({"delta_v_start": []}, "delta_v_start must hold 3 tensors like delta_u, got 0"),
    ({name: A[name][2:] for name in A if name.startswith("delta_")}, "delta_u must hold 0, 2 or 3 tensors, got 1"),
    ({name: [] for name in A if name.startswith("delta_")}, "delta_v must hold at least down's [R_v, I], which may have 0 rows, where down_columns is given, got no tensor"),
    (changed("delta_u", 1, A["delta_u"][1].bfloat16()), "delta_u[1] must be Float, got BFloat16"),
    (changed("delta_u", 1, A["delta_u"][1][:, :9]), "delta_u[1] must have shape [R_u, 10], got [20, 9]"),
    (changed("delta_v", 0, A["delta_v"][0][:, :9]), "delta_v[0] must have shape [R_v, 12], got [20, 9]"),
    (changed("delta_v", 2, A["delta_v"][2][0]), "delta_v[2] must have shape [R_v, I], got [10]"),
    (changed("delta_rank", 2, A["delta_rank"][2].long()), "delta_rank[2] must be Int, got Long"),
    (changed("delta_rank", 2, A["delta_rank"][2][:3]), "delta_rank[2] must have shape [4], got [3]"),
    (changed("delta_rank", 0, with_value(A["delta_rank"][0], (1,), -5)), "delta_rank[0] must not be negative, got -5 for expert 1"),
    (changed("delta_rank", 1, with_value(A["delta_rank"][1], (3,), 6)), "delta_u_start[1] and the rank must stay within the 20 rows of delta_u[1], got start 15 and rank 6 for expert 3"),
    (changed("delta_u_start", 1, with_value(A["delta_u_start"][1], (0,), -1)), "delta_u_start[1] and the rank must stay within the 20 rows of delta_u[1], got start -1 and rank 5 for expert 0"),
    (changed("delta_v_start", 2, with_value(A["delta_v_start"][2], (1,), 2**31 - 1)), "delta_v_start[2] and the rank must stay within the 20 rows of delta_v[2], got start 2147483647 and rank 5 for expert 1"),
    ({"activation": "swish"}, "activation must be silu, gelu, gelu_tanh or relu2, got swish"),
]  # fmt: skip


def pivots_changed(name: str, index: int, position: tuple[int, ...], value: int) -> dict:
    """Some list of the gauge-fixed layer, whose deltas have ranks 6 of 12 columns and 5 of 10."""
    return {name: [with_value(v, position, value) if i == index else v for i, v in enumerate(PIVOTS[name])]}


PIVOT_ERRORS = [
    ({"delta_pivots": PIVOTS["delta_pivots"][:1]}, "delta_pivots must hold 2 tensors like delta_u, got 1"),
    ({"delta_pivots": [p.long() for p in PIVOTS["delta_pivots"]]}, "delta_pivots[0] must be Int, got Long"),
    ({"delta_pivots": [p[1:] for p in PIVOTS["delta_pivots"]]}, "delta_pivots[0] must have shape [24], got [23]"),
    (pivots_changed("delta_rank", 0, (3,), 13), "delta_u_start[0] and the rank must stay within the 24 rows of delta_u[0], got start 18 and rank 13 for expert 3"),
    (pivots_changed("delta_rank", 0, (0,), 13), "delta_rank[0] must be at most the 12 columns of delta_v[0] where there are pivots, got 13 for expert 0"),
    (pivots_changed("delta_v_start", 1, (3,), 76), "delta_v_start[1] and the rank must stay within the 100 elements of delta_v[1], got start 76 and rank 5 for expert 3"),
    (pivots_changed("delta_v_start", 1, (0,), -1), "delta_v_start[1] and the rank must stay within the 100 elements of delta_v[1], got start -1 and rank 5 for expert 0"),
    (pivots_changed("delta_pivots", 0, (5,), 12), "delta_pivots[0] must ascend from 0 to 11 within an expert, got 12 for expert 0"),
    (pivots_changed("delta_pivots", 0, (0,), -1), "delta_pivots[0] must ascend from 0 to 11 within an expert, got -1 for expert 0"),
    (pivots_changed("delta_pivots", 1, (1,), int(PIVOTS["delta_pivots"][1][0])), f"delta_pivots[1] must ascend from 0 to 9 within an expert, got {int(PIVOTS['delta_pivots'][1][0])} for expert 0"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), PIVOT_ERRORS, ids=range(len(PIVOT_ERRORS)))
def test_moe_forward_refuses_wrong_pivots(change: dict, sentence: str) -> None:
    ops.moe_forward(**PIVOTS)
    refuse(ops.moe_forward, PIVOTS | change, f"moe_forward: {sentence}")


# Joint deltas of ranks 6 and 5: 24 and 20 rows of U, as many of V where there are no pivots.
INT8_ERRORS = [
    (INT8, {"delta_u_scale": INT8["delta_u_scale"][:1]}, "delta_u_scale must hold 2 tensors like delta_u, got 1"),
    (INT8, {"delta_v_scale": []}, "delta_v_scale must hold 2 tensors like delta_u, got 0"),
    (INT8, {"delta_u_scale": []}, "delta_u_scale must hold 2 tensors like delta_u, got 0"),
    (INT8, {"delta_u_scale": [], "delta_v_scale": []}, "delta_u[0] must be Float, got Char"),
    (INT8, {"delta_u": [u.float() for u in INT8["delta_u"]]}, "delta_u[0] must be Char, got Float"),
    (INT8, {"delta_v": [v.int() for v in INT8["delta_v"]]}, "delta_v[0] must be Char, got Int"),
    (INT8, {"delta_u_scale": [s.half() for s in INT8["delta_u_scale"]]}, "delta_u_scale[0] must be Float, got Half"),
    (INT8, {"delta_v_scale": [s.double() for s in INT8["delta_v_scale"]]}, "delta_v_scale[0] must be Float, got Double"),
    (INT8, {"delta_u_scale": [s[1:] for s in INT8["delta_u_scale"]]}, "delta_u_scale[0] must have shape [24], got [23]"),
    (INT8, {"delta_v": [v[:20] for v in INT8["delta_v"]]}, "delta_v_scale[0] must have shape [20], got [24]"),
    (
        INT8,
        {"delta_v_scale": [s[:, None] for s in INT8["delta_v_scale"]]},
        "delta_v_scale[0] must have shape [24], got [24, 1]",
    ),
    (
        INT8_PIVOTS,
        {"delta_v_scale": [s[:12] for s in INT8["delta_v_scale"]]},
        "delta_v_scale[0] must have shape [24], got [12]",
    ),
]


@pytest.mark.parametrize(("arguments", "change", "sentence"), INT8_ERRORS, ids=range(len(INT8_ERRORS)))
def test_moe_forward_refuses_wrong_factors_of_eight_bits(arguments: dict, change: dict, sentence: str) -> None:
    ops.moe_forward(**arguments)
    refuse(ops.moe_forward, arguments | change, f"moe_forward: {sentence}")


@pytest.mark.parametrize(("change", "sentence"), ERRORS, ids=range(len(ERRORS)))
def test_moe_forward_refuses(change: dict, sentence: str) -> None:
    ops.moe_forward(**A)
    refuse(ops.moe_forward, A | change, f"moe_forward: {sentence}")


def test_moe_forward_refuses_deltas_that_do_not_fit_the_gate() -> None:
    sentence = "moe_forward: delta_u must hold 2 tensors (gate_up, down) where gate_up is interleaved, got 3"
    refuse(ops.moe_forward, INTERLEAVED, sentence)
    lists = {name: [*UNGATED[name], *UNGATED[name][1:]] for name in UNGATED if name.startswith("delta_")}
    refuse(ops.moe_forward, UNGATED | lists, "moe_forward: delta_u must hold 0 or 2 tensors, got 3")


def test_the_reference_refuses_what_it_would_misread() -> None:
    no_deltas = {name: [] for name in A if name.startswith("delta_")}
    for arguments, sentence in [
        (INTERLEAVED, "delta_u must hold 2 tensors (gate_up, down) where gate_up is interleaved, got 3"),
        (A | no_deltas, "delta_v must hold at least down's [R_v, I] where down_columns is given, got none"),
        (
            A | {"down_column_norms": None},
            "column_norms must be given where keep is less than the 5 kept columns, got None with keep = 2",
        ),
        (A | {"activation": "swish"}, "activation must be one of ['gelu', 'gelu_tanh', 'relu2', 'silu'], got 'swish'"),
    ]:
        with pytest.raises(ValueError, match=f"^moe_forward: {re.escape(sentence)}$"):
            reference.moe_forward(**arguments)


def test_halves_refuse_by_their_own_names() -> None:
    gate_up = LAYER.gate_up_arguments()
    down = LAYER.down_arguments(torch.zeros(14, 10), per_pair=True)
    lists = {name: A[name] for name in A if name.startswith("delta_")}
    operator = "moe_gate_up_forward"
    refuse(ops.moe_gate_up_forward, gate_up | lists, f"{operator}: delta_u must hold 0, 1 or 2 tensors, got 3")
    refuse(
        ops.moe_gate_up_forward,
        gate_up | {"gate_up_keep": 9},
        f"{operator}: gate_up_keep must be between 0 and the 6 kept columns, got 9",
    )
    odd = gate_up | {"gate_up_base": A["gate_up_base"][:, :19], "gate_up_bias": None}
    refuse(
        ops.moe_gate_up_forward,
        odd,
        f"{operator}: gate_up_base must have an even number of rows where gate and up have a delta each, got 19",
    )
    refuse(
        ops.moe_gate_up_forward,
        gate_up | {"top_k_index": torch.zeros(3, dtype=torch.int64)},
        f"{operator}: top_k_index must have shape [7, k], got [3]",
    )
    operator = "moe_down_forward"
    refuse(ops.moe_down_forward, down | lists, f"{operator}: delta_u must hold 0 or 1 tensors, got 3")
    refuse(
        ops.moe_down_forward,
        down | {"activated": torch.zeros(13, 10)},
        f"{operator}: activated must have shape [14, I], got [13, 10]",
    )
    refuse(
        ops.moe_down_forward,
        down | {"activated": torch.zeros(14, 9)},
        f"{operator}: delta_v[0] must have shape [R_v, 9], got [20, 10]",
    )
    refuse(
        ops.moe_down_forward,
        down | {"top_k_weights": torch.zeros(7)},
        f"{operator}: top_k_weights must have shape [7, 2], got [7]",
    )
    refuse(
        ops.moe_down_forward,
        down | {"down_columns": with_value(A["down_columns"], (0, 0), 10)},
        f"{operator}: down_columns must hold values from 0 to 9, got 10",
    )
