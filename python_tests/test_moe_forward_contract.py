"""What ``moe_forward`` and its halves promise beside the numbers: dispatch, errors, isolation, determinism."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from moe_forward_cases import ACTIVATIONS, DELTA, Layer, make_layer

from d2moe_ext import ops, reference

FACTORS = [{}, {"gauge_fixed": True}, {"int8": True}, {"gauge_fixed": True, "int8": True}]
NO_DELTAS: list[list] = [[] for _ in DELTA]
RICH = {"deltas": "separate", "bias": True, "kept": (0.7, 0.7), "keep": (0.6, 0.6), "bases": (2, 1)}


def calls(layer: Layer) -> list[tuple[Callable, dict]]:
    """The three operators with arguments that fit together."""
    rows = layer.arguments["top_k_index"].numel()
    inter = layer.arguments["delta_v"][-1].shape[1]
    activated = torch.randn(rows, inter, generator=torch.Generator().manual_seed(0)).to(layer.arguments["hidden_states"].dtype)
    return [
        (ops.moe_forward, layer.arguments),
        (ops.moe_gate_up_forward, layer.gate_up_arguments()),
        (ops.moe_down_forward, layer.down_arguments(activated, per_pair=False)),
        (ops.moe_down_forward, layer.down_arguments(activated, per_pair=True)),
    ]


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", range(4))
def test_opcheck(call: int, dtype: torch.dtype, factors: dict) -> None:
    function, arguments = calls(make_layer(1, dtype=dtype, **factors, **RICH))[call]
    operator = getattr(torch.ops.d2moe_ext, function.__name__)
    torch.library.opcheck(operator, tuple(arguments.values()))


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("call", range(4))
def test_compiles_into_one_graph(call: int, int8: bool) -> None:
    function, arguments = calls(make_layer(1, int8=int8, **RICH))[call]
    with torch.no_grad():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(**arguments)
        assert torch.equal(compiled, function(**arguments))


def test_compiles_with_inductor_and_any_number_of_tokens() -> None:
    layers = [make_layer(1, tokens=tokens, **RICH) for tokens in (7, 5, 11)]

    def forward(arguments: dict) -> torch.Tensor:
        return ops.moe_forward(**arguments) * 2

    compiled = torch.compile(forward, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for layer in layers:
            torch.testing.assert_close(compiled(layer.arguments), forward(layer.arguments))


@pytest.mark.parametrize("call", range(4))
def test_a_gradient_is_refused_in_grad_mode_only(call: int) -> None:
    function, arguments = calls(make_layer(1, **RICH))[call]
    differentiable = [
        name for name, value in arguments.items() if isinstance(value, torch.Tensor) and value.is_floating_point()
    ]
    for name in [*differentiable, "delta_u"]:
        value = arguments[name]
        grad = [v.clone().requires_grad_() for v in value] if name == "delta_u" else value.clone().requires_grad_()
        message = rf"{function.__name__}: {name} must not require grad in grad mode.*torch.no_grad\(\) or unpatch_model"
        with pytest.raises(RuntimeError, match=message):
            function(**arguments | {name: grad})
        with torch.no_grad():
            assert torch.equal(function(**arguments | {name: grad}), function(**arguments))
        with torch.inference_mode():
            assert torch.equal(function(**arguments | {name: grad}), function(**arguments))


@pytest.mark.parametrize("name", ["delta_u_scale", "delta_v_scale"])
def test_a_gradient_of_scales_is_refused_in_grad_mode_only(name: str) -> None:
    arguments = make_layer(1, int8=True, **RICH).arguments
    grad = [scale.clone().requires_grad_() for scale in arguments[name]]
    with pytest.raises(RuntimeError, match=rf"moe_forward: {name} must not require grad in grad mode"):
        ops.moe_forward(**arguments | {name: grad})
    with torch.no_grad():
        assert torch.equal(ops.moe_forward(**arguments | {name: grad}), ops.moe_forward(**arguments))


@pytest.mark.parametrize("factors", FACTORS)
def test_the_reference_is_differentiable_in_inputs_weights_and_factors(factors: dict) -> None:
    layer = make_layer(
        2,
        tokens=3,
        experts=3,
        hidden=5,
        inter=4,
        dtype=torch.float64,
        bias=True,
        kept=(0.8, 0.8),
        duplicates=True,
        **factors,
    )
    # What fills V up is NaN: never read, and so nothing that a derivative could be tested by.
    layer.arguments["delta_v"] = [v.nan_to_num() for v in layer.arguments["delta_v"]]
    names = ["hidden_states", "top_k_weights", "gate_up_base", "down_base", "gate_up_bias", "down_bias"]
    floating = ("delta_u_scale", "delta_v_scale") if factors.get("int8") else ("delta_u", "delta_v")
    stacks = [factor for name in floating for factor in layer.arguments[name]]
    leaves = [value.clone().requires_grad_() for value in [*(layer.arguments[name] for name in names), *stacks]]

    def forward(*values: torch.Tensor) -> torch.Tensor:
        lists = {floating[0]: list(values[6:9]), floating[1]: list(values[9:12])}
        return reference.moe_forward(**layer.arguments | dict(zip(names, values[:6], strict=True)) | lists)

    assert torch.autograd.gradcheck(forward, leaves)


@pytest.mark.parametrize(
    ("bad", "activation"), [(float("inf"), "silu"), *((float("nan"), name) for name in sorted(ACTIVATIONS))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bases", [1, 4])
def test_a_non_finite_token_spoils_no_other(bases: int, dtype: torch.dtype, bad: float, activation: str) -> None:
    layer = make_layer(
        4,
        tokens=40,
        experts=4,
        hidden=40,
        inter=40,
        bases=(bases, bases),
        dtype=dtype,
        kept=(0.7, 0.7),
        activation=activation,
    )
    clean = ops.moe_forward(**layer.arguments)
    hidden_states = layer.arguments["hidden_states"].clone()
    hidden_states[11] = bad
    spoiled = ops.moe_forward(**layer.arguments | {"hidden_states": hidden_states})
    assert not spoiled[11].isfinite().any()
    others = torch.arange(40) != 11
    assert torch.equal(spoiled[others], clean[others])


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_depend_neither_on_the_run_nor_on_the_threads(dtype: torch.dtype, int8: bool) -> None:
    sizes = {"tokens": 200, "experts": 8, "top_k": 3, "hidden": 64, "inter": 96, "bases": (2, 1), "keep": (0.9, 0.9)}
    layer = make_layer(6, dtype=dtype, int8=int8, **sizes)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(ops.moe_forward(**layer.arguments))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[1], results[2])


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bases", "ranks"), [(1, "uniform"), (8, "zero")])
def test_error_is_no_worse_than_twice_torchs_own(dtype: torch.dtype, bases: int, ranks: str, factors: dict) -> None:
    sizes = {"tokens": 64, "experts": 8, "top_k": 4, "hidden": 128, "inter": 192, "bases": (bases, bases), "ranks": ranks}
    layer = make_layer(7, dtype=dtype, **factors, **sizes)
    exact = reference.moe_forward(**layer.to(torch.float64).arguments)

    def error(output: torch.Tensor) -> float:
        return (output.double() - exact).norm().item()

    assert error(ops.moe_forward(**layer.arguments)) <= 2 * error(reference.moe_forward(**layer.arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_round_to_nearest_even_for_every_value_of_the_dtype(dtype: torch.dtype) -> None:
    """A bias times a weight is the one float32 product that reaches the output alone: exactly torch's own rounding."""
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    hidden = values.numel()
    weights = torch.tensor([[1.0], [1.0 + 2**-8], [0.99], [2.0**-12 * 1.3], [3.7], [-(2.0**-9)], [1.0 + 2**-11 + 2**-23]])
    output = ops.moe_down_forward(
        torch.zeros(7, 1, dtype=dtype), torch.zeros(7, 1, dtype=torch.int64), weights,
        torch.zeros(1, hidden, 1, dtype=dtype), None, None, torch.zeros(1, dtype=torch.int32), 1, values.unsqueeze(0),
        *NO_DELTAS, False,
    )  # fmt: skip
    assert torch.equal(output, (weights * values.float()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_value_of_eight_bits_is_scaled_and_rounded_once(dtype: torch.dtype) -> None:
    """Each token is a unit vector and U is 1: the output is V itself, as torch rounds it."""
    values = torch.arange(-128, 128, dtype=torch.int8)
    scales = torch.tensor([1.3e-3, 1.0, 3.7, 0.0, 1.0 + 2**-7], dtype=dtype)
    x, one = torch.eye(256, dtype=dtype), torch.ones(1, dtype=torch.int32)
    u = torch.ones(5, 1, dtype=torch.int8)
    for row in range(5):
        start = torch.tensor([row], dtype=torch.int32)
        output = ops.moe_gate_up_forward(
            x, torch.zeros(256, 1, dtype=torch.int64), torch.zeros(1, 1, 256, dtype=dtype), None, None, 0 * one, 256, None,
            [u], [values.expand(5, -1)], [one], [start], [start], [], [torch.ones(5, dtype=dtype)], [scales],
        )  # fmt: skip
        assert torch.equal(output.flatten(), (scales[row].double() * values).to(dtype))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations_over_the_range_of_float32(activation: str) -> None:
    """One expert without a gate, all of whose matrices are 1: the output is the activation of the input itself."""
    x = torch.cat([torch.linspace(-100, 100, 40001), torch.tensor([-1e30, -1e5, -0.0, 1e-30, -1e-30, 1e5, 1e15, torch.nan])])
    one, expert = torch.ones(1, 1, 1), torch.zeros(1, dtype=torch.int32)
    index = torch.zeros(x.numel(), 1, dtype=torch.int64)
    group = (one, None, None, expert, 1, None)
    output = ops.moe_forward(x.unsqueeze(1), index, torch.ones(x.numel(), 1), *group, *group, *NO_DELTAS, activation, False)
    expected = ACTIVATIONS[activation](x.double()).float()
    # exp(a) carries the rounding of a, up to 87 here; 1 + erf and 1 + tanh cancel, in float64 too.
    torch.testing.assert_close(
        output.flatten(), expected, rtol=2e-5, atol=1e-12 if "gelu" in activation else 1e-30, equal_nan=True
    )


# More rows of x than a block holds; inputs and outputs that are several blocks, for a few rows and for many.
LARGE = [(2060, 24, 40), (20, 2100, 1010), (60, 2100, 530)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "hidden", "rows"), LARGE)
def test_products_larger_than_a_block(tokens: int, hidden: int, rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    base = (torch.randn(1, rows, hidden, generator=generator) * hidden**-0.5).to(dtype)
    exact = x.double() @ base[0].double().T
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5 * (x.double().abs() @ base[0].double().abs().T)
    for layout in (base, base.transpose(1, 2).contiguous().transpose(1, 2)):
        arguments = (x, torch.zeros(tokens, 1, dtype=torch.int64), layout, None, None, torch.zeros(1, dtype=torch.int32))
        error = (ops.moe_gate_up_forward(*arguments, hidden, None, *NO_DELTAS).double() - exact).abs()
        assert bool((error <= bound + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps).all())


@pytest.mark.parametrize("tokens", [3, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_of_eight_bits_larger_than_is_widened_at_once(dtype: torch.dtype, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, rows, rank = 1100, 1210, 150
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    u, v = (torch.randint(-127, 128, (rank, n), generator=generator, dtype=torch.int8) for n in (rows, hidden))
    u_scale, v_scale = ((torch.rand(rank, generator=generator) / (73 * n**0.5)).to(dtype) for n in (rank, hidden))
    lists = [torch.tensor([n], dtype=torch.int32) for n in (rank, 0, 0)]
    output = ops.moe_gate_up_forward(
        x, torch.zeros(tokens, 1, dtype=torch.int64), torch.zeros(1, rows, hidden, dtype=dtype), None, None, lists[1], hidden,
        None, [u], [v], *([part] for part in lists), [], [u_scale], [v_scale],
    )  # fmt: skip
    factor_u, factor_v = u.double() * u_scale.double()[:, None], v.double() * v_scale.double()[:, None]
    exact = x.double() @ factor_v.T @ factor_u
    precision = torch.finfo(dtype).eps + 1e-5  # of V x, and of the result
    bound = precision * (x.double().abs() @ factor_v.abs().T @ factor_u.abs())
    assert bool(((output.double() - exact).abs() <= bound).all())
