"""``moe_forward`` against dense weights token by token, and against the float64 reference."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from moe_forward_cases import ACTIVATIONS, Layer, assert_within, dense_forward, make_layer

from d2moe_ext import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    experts = draw(st.integers(1, 5))
    gated = draw(st.booleans())
    deltas = draw(st.sampled_from(["separate", "joint", "none"]))
    shares = st.sampled_from([1.0, 0.6])
    bases = st.sampled_from([1, min(2, experts), experts])
    gauge_fixed = draw(st.booleans())
    return make_layer(
        draw(st.integers(0, 2**31)),
        tokens=draw(st.sampled_from([0, 1, 2, 5, 19])),
        top_k=draw(st.integers(1, experts)),
        experts=experts,
        hidden=draw(st.sampled_from([1, 5, 16])),
        inter=draw(st.sampled_from([1, 6, 24])),
        bases=(draw(bases), draw(bases)),
        gated=gated,
        interleaved=gated and deltas != "separate" and draw(st.booleans()),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        deltas=deltas,
        ranks=draw(st.sampled_from(["ragged", "uniform", "zero"])),
        sharing="none" if gauge_fixed else draw(st.sampled_from(["none", "v", "uv"])),
        bias=draw(st.booleans()),
        kept=(draw(shares), draw(shares)),
        keep=(draw(shares), draw(shares)),
        sentinels=draw(st.booleans()),
        duplicates=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        index_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        strided=draw(st.booleans()),
        gauge_fixed=gauge_fixed,
        int8=draw(st.booleans()),
    )


@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(layers())
def test_any_layer_equals_dense_weights_token_by_token(layer: Layer) -> None:
    dtype = layer.arguments["hidden_states"].dtype
    dense = dense_forward(layer, dtype)
    assume(dense.gap > 2)  # near-ties between columns are the scores' own test
    output = ops.moe_forward(**layer.arguments)
    assert output.dtype == dtype
    assert_within(output, dense.output, dense.output_error)
    exact = reference.moe_forward(**layer.to(torch.float64).arguments)
    torch.testing.assert_close(exact, dense.output, rtol=1e-9, atol=1e-9)
