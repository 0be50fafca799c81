"""Random MoE layers as the arguments of ``moe_forward``, and what they compute, token by token from dense weights.

``dense_forward`` shares nothing with the reference or the kernels: it rebuilds ``W[e] = base + U V`` in float64 and
loops over tokens. Beside each value it carries a bound on the error that a forward in a given dtype may make:

    product p = A x (+ bias)     |error| <= c u |A| |x| + |A| error(x),   u = eps / 2 + (terms) eps of float32
    h = act(gate) up             |error| <= |act'| error(gate) |up| + |act| error(up) + both, and one rounding of h

with c = 4 roundings on the way: of V x, of U V x, of the base's product, of their sum (the halves return it); of a delta of
eight bits 6: U and V are rounded to the dtype, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

INT32 = torch.int32
ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu2": lambda x: functional.relu(x) ** 2,
}
GATE_UP = ("base", "columns", "column_norms", "expert_to_base", "keep", "bias")
DELTA = ("delta_u", "delta_v", "delta_rank", "delta_u_start", "delta_v_start", "delta_pivots", "delta_u_scale", "delta_v_scale")


@dataclass
class Layer:
    """``arguments`` are those of ``moe_forward`` by name; the rest is what the operators work out for themselves."""

    arguments: dict
    gated: bool

    def to(self, dtype: torch.dtype) -> Layer:
        """A copy with every floating tensor but the column norms in ``dtype``."""

        def convert(name: str, value: object) -> object:
            if isinstance(value, list):
                return [convert(name, item) for item in value]
            floating = isinstance(value, Tensor) and value.is_floating_point() and not name.endswith("column_norms")
            return value.to(dtype) if floating else value

        return Layer({name: convert(name, value) for name, value in self.arguments.items()}, self.gated)

    def gate_up_arguments(self) -> dict:
        names = ["hidden_states", "top_k_index", *(f"gate_up_{part}" for part in GATE_UP)]
        return {name: self.arguments[name] for name in names} | {name: self.arguments[name][:-1] for name in DELTA}

    def down_arguments(self, activated: Tensor, per_pair: bool) -> dict:
        names = ["top_k_index", "top_k_weights", *(f"down_{part}" for part in GATE_UP)]
        deltas = {name: self.arguments[name][-1:] for name in DELTA}
        return {
            "activated": activated,
            **{name: self.arguments[name] for name in names},
            **deltas,
            "per_pair": per_pair,
        }


def with_gaps(value: Tensor) -> Tensor:
    """The same values as a view, transposed from two dimensions on, between NaN or indices far out of range."""
    if value.dim() == 1:
        return with_gaps(value.unsqueeze(1)).squeeze(1)
    filler = torch.nan if value.is_floating_point() else min(10**6, torch.iinfo(value.dtype).max)
    gaps = value.new_full((*value.shape[:-2], value.shape[-1], 2 * value.shape[-2]), filler)
    gaps[..., ::2] = value.transpose(-1, -2)
    return gaps[..., ::2].transpose(-1, -2)


def make_layer(
    seed: int,
    *,
    tokens: int = 7,
    top_k: int = 2,
    experts: int = 4,
    hidden: int = 12,
    inter: int = 10,
    bases: tuple[int, int] = (1, 1),
    gated: bool = True,
    interleaved: bool = False,
    activation: str = "silu",
    deltas: str = "separate",
    ranks: str = "ragged",
    sharing: str = "none",
    bias: bool = False,
    kept: tuple[float, float] = (1.0, 1.0),
    keep: tuple[float, float] = (1.0, 1.0),
    sentinels: bool = False,
    duplicates: bool = False,
    dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.int64,
    strided: bool = False,
    gauge_fixed: bool = False,
    int8: bool = False,
) -> Layer:
    """A random layer.

    Args:
        deltas: ``"separate"`` (gate, up, down), ``"joint"`` (gate_up, down; all an ungated layer has) or ``"none"``.
        ranks: ``"ragged"`` (some 0, some full), ``"uniform"`` or ``"zero"``.
        sharing: ``"none"``, ``"v"`` (one V for all experts) or ``"uv"`` (one U, too).
        kept, keep: shares of the columns that (gate_up's, down's) bases store, and of those the share they multiply.
        strided: every tensor is a view with gaps, transposed where it has two dimensions or more.
        gauge_fixed: every V has an identity at its pivots; what fills its tensor up is NaN.
        int8: U and V are rows of eight bits, each with a scale.
    """
    generator = torch.Generator().manual_seed(seed)

    def spread(value: Tensor) -> Tensor:
        return with_gaps(value) if strided else value

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return spread((torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype))

    def factor(rows: int, width: int, scale: float) -> Tensor:
        if int8:
            return torch.randint(-127, 128, (rows, width), generator=generator, dtype=torch.int8)
        return (torch.randn(rows, width, generator=generator, dtype=torch.float64) * scale).to(dtype)

    def scales(u_rows: int, u_scale: float, v_rows: int, v_scale: float) -> dict:
        if not int8:
            return {}
        pairs = (("delta_u_scale", u_rows, u_scale), ("delta_v_scale", v_rows, v_scale))
        # 73 is the standard deviation of integers from -127 to 127.
        return {name: spread(((torch.rand(n, generator=generator) + 0.5) * s / 73).to(dtype)) for name, n, s in pairs}

    def integers(values: list[int]) -> Tensor:
        return spread(torch.tensor(values, dtype=INT32))

    def group(name: str, num_bases: int, out: int, width: int, kept_share: float, keep_share: float) -> dict:
        count = max(1, round(width * kept_share))
        keep_count = max(1, round(count * keep_share))
        columns = [torch.randperm(width, generator=generator)[:count].sort().values for _ in range(num_bases)]
        # Norms a factor of 16 apart: rounding h to 16 bits then rarely changes which columns the scores select.
        norms = [2.0 ** (4.0 * (torch.randperm(count, generator=generator) % 16)) for _ in range(num_bases)]
        expert_to_base = torch.randint(0, num_bases, (experts,), generator=generator, dtype=INT32)
        if num_bases == experts:
            expert_to_base = torch.randperm(experts, generator=generator).to(INT32)
        values = {
            "base": normal(num_bases, out, count, scale=width**-0.5),
            "columns": spread(torch.stack(columns).to(INT32)) if count < width else None,
            "column_norms": spread(torch.stack(norms).float()) if keep_count < count else None,
            "expert_to_base": spread(expert_to_base),
            "keep": keep_count,
            "bias": normal(experts, out, scale=0.5) if bias else None,
        }
        return {f"{name}_{part}": value for part, value in values.items()}

    def delta(out: int, width: int) -> dict:
        full = min(out, width)
        rank = [full // 2 if ranks == "uniform" else 0 for _ in range(experts)]
        if ranks == "ragged":
            rank = torch.randint(0, full + 1, (experts,), generator=generator).tolist()
            rank[0], rank[-1] = 0, full
        starts = [sum(rank[:e]) for e in range(experts)]
        zeros = [0] * experts
        v_rows = max(rank) if sharing in ("v", "uv") else sum(rank)
        u_rows = max(rank) if sharing == "uv" else sum(rank)
        if gauge_fixed:
            return gauge_fixed_delta(out, width, rank, starts, full)
        return {
            "delta_u": spread(factor(u_rows, out, full**-0.5)),
            "delta_v": spread(factor(v_rows, width, width**-0.5)),
            "delta_rank": integers(rank),
            "delta_u_start": integers(zeros if sharing == "uv" else starts),
            "delta_v_start": integers(starts if sharing == "none" else zeros),
            **scales(u_rows, full**-0.5, v_rows, width**-0.5),
        }

    def gauge_fixed_delta(out: int, width: int, rank: list[int], starts: list[int], full: int) -> dict:
        elements = [r * (width - r) for r in rank]
        flat = factor(1, sum(elements), width**-0.5)[0]
        v = torch.cat([flat, flat.new_full((-len(flat) % width,), 99 if int8 else torch.nan)]).view(-1, width)
        pivots = [torch.randperm(width, generator=generator)[:r].sort().values for r in rank]
        return {
            "delta_u": spread(factor(sum(rank), out, full**-0.5)),
            "delta_v": spread(v),
            "delta_rank": integers(rank),
            "delta_u_start": integers(starts),
            "delta_v_start": integers([sum(elements[:e]) for e in range(experts)]),
            "delta_pivots": spread(torch.cat(pivots).to(INT32)),
            **scales(sum(rank), full**-0.5, sum(rank), width**-0.5),
        }

    rows = 2 * inter if gated else inter
    if duplicates:
        index = torch.randint(0, experts, (tokens, top_k), generator=generator)
    else:
        order = [torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)]
        index = torch.stack(order) if tokens else torch.zeros(0, top_k, dtype=torch.int64)
    if sentinels:
        outside = torch.tensor([-1, experts, experts + 5])[torch.randint(0, 3, index.shape, generator=generator)]
        index = torch.where(torch.rand(index.shape, generator=generator) < 0.4, outside, index)
    if deltas == "none" and kept[1] < 1.0:
        deltas, ranks = "joint", "zero"  # down's input width must be known
    parts = {"none": [], "joint": [rows], "separate": [inter, inter] if gated else [rows]}[deltas]
    lists = [delta(out, hidden) for out in parts] + ([delta(hidden, inter)] if parts else [])
    arguments = {
        "hidden_states": normal(tokens, hidden),
        "top_k_index": spread(index.to(index_dtype)),
        "top_k_weights": spread(torch.rand(tokens, top_k, generator=generator).to(dtype)),
        **group("gate_up", bases[0], rows, hidden, kept[0], keep[0]),
        **group("down", bases[1], hidden, inter, kept[1], keep[1]),
        **{name: [item[name] for item in lists if name in item] for name in DELTA},
        "activation": activation,
        "interleaved": interleaved,
    }
    return Layer(arguments, gated)


@dataclass
class Dense:
    """float64 results of every stage, bounds on their errors, and how clear-cut each choice of columns was."""

    gate_up: Tensor  # [T * k, R]
    gate_up_error: Tensor
    activated: Tensor  # [T * k, I]
    activated_error: Tensor
    down: Tensor  # [T * k, H]: per pair, unweighted
    down_error: Tensor
    output: Tensor  # [T, H]
    output_error: Tensor
    gap: float  # the least ratio between the last score that was kept and the first that was not


def _dense_weights(arguments: dict, group: str, deltas: slice, width: int, masks: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Per expert: (W, |base| + |U| |V|), [out, width] in float64, without the base's masked columns."""
    base, columns = arguments[f"{group}_base"].double(), arguments[f"{group}_columns"]
    weights = []
    for expert, b in enumerate(arguments[f"{group}_expert_to_base"].tolist()):
        place = torch.arange(width) if columns is None else columns[b].long()
        weight = torch.zeros(base.shape[1], width, dtype=torch.float64)
        weight[:, place] = base[b] * masks[b]
        absolute = weight.abs()
        row = 0
        lists = [(arguments[name] or [None] * len(arguments["delta_u"]))[deltas] for name in DELTA]
        for u, v, rank, u_start, v_start, identity, u_scale, v_scale in zip(*lists, strict=True):
            r, s, q = int(rank[expert]), int(u_start[expert]), int(v_start[expert])
            ones = torch.ones(r, dtype=torch.float64)
            factor_u = u[s : s + r].double().T * (ones if u_scale is None else u_scale[s : s + r].double())
            scale_start = q if identity is None else s
            row_scale = ones if v_scale is None else v_scale[scale_start : scale_start + r].double()
            if identity is None:
                factor_v = v[q : q + r].double() * row_scale[:, None]
            else:
                factor_v = _whole_v(v, q, identity[s : s + r].tolist(), row_scale.tolist())
            weight[row : row + u.shape[1]] += factor_u @ factor_v
            absolute[row : row + u.shape[1]] += factor_u.abs() @ factor_v.abs() * (1.0 if u_scale is None else 1.5)
            row += u.shape[1]
        weights.append((weight, absolute))
    return weights


def _whole_v(v: Tensor, start: int, pivots: list[int], scales: list[float]) -> Tensor:
    """``[r, in]`` float64: row by row 1 at the row's own pivot, 0 at the others', scaled in between what is stored."""
    rows, stored = torch.zeros(len(pivots), v.shape[1], dtype=torch.float64), v.flatten().tolist()
    for i, pivot in enumerate(pivots):
        for column in range(v.shape[1]):
            if column not in pivots:
                rows[i, column] = stored[start] * scales[i]
                start += 1
        rows[i, pivot] = 1.0
    return rows


def _masks(arguments: dict, group: str, inputs: list[list[Tensor]], width: int) -> tuple[list[Tensor], float]:
    """Which kept columns each base multiplies for its inputs, and the gap between the scores at the cut."""
    columns, norms, keep = (arguments[f"{group}_{part}"] for part in ("columns", "column_norms", "keep"))
    num_bases, _, kept = arguments[f"{group}_base"].shape
    masks, gap = [], float("inf")
    for b in range(num_bases):
        mask = torch.ones(kept, dtype=torch.float64)
        if keep < kept and inputs[b]:
            place = torch.arange(width) if columns is None else columns[b].long()
            scores = norms[b].double() * torch.stack(inputs[b])[:, place].norm(dim=0)
            order = sorted(range(kept), key=lambda j: (-scores[j].item(), j))
            mask[order[keep:]] = 0
            gap = min(gap, (scores[order[keep - 1]] / scores[order[keep]]).item())
        masks.append(mask)
    return masks, gap


def _activate(layer: Layer, gate_up: Tensor, error: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    arguments = layer.arguments
    act = ACTIVATIONS[arguments["activation"]]
    half = gate_up.shape[0] // 2
    if not layer.gated:
        gate, up, gate_error, up_error = gate_up, torch.ones_like(gate_up), error, torch.zeros_like(error)
    elif arguments["interleaved"]:
        gate, up, gate_error, up_error = gate_up[::2], gate_up[1::2], error[::2], error[1::2]
    else:
        gate, up, gate_error, up_error = gate_up[:half], gate_up[half:], error[:half], error[half:]
    slope = 2 * (gate.abs() + gate_error) if arguments["activation"] == "relu2" else 1.13
    act_error = slope * gate_error + 2 * unit * act(gate).abs() + unit * gate.abs() * 0.5
    value = act(gate) * up
    return value, act_error * (up.abs() + up_error) + act(gate).abs() * up_error + 2 * unit * value.abs()


def dense_forward(layer: Layer, dtype: torch.dtype) -> Dense:
    """The layer in float64, token by token, with error bounds for a forward in ``dtype``."""
    a = layer.arguments
    x, ids, g = a["hidden_states"].double(), a["top_k_index"].tolist(), a["top_k_weights"].double()
    (num_tokens, hidden), top_k = x.shape, g.shape[1]
    num_experts = a["gate_up_expert_to_base"].numel()
    rows = a["gate_up_base"].shape[1]
    inter = rows // 2 if layer.gated else rows
    unit = torch.finfo(dtype).eps / 2 + (hidden + inter) * torch.finfo(torch.float32).eps
    tiny = 64 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # 16-bit results below it lose relative precision
    pairs = [(t, s, e) for t in range(num_tokens) for s, e in enumerate(ids[t]) if 0 <= e < num_experts]

    def zeros(count: int, width: int) -> Tensor:
        return torch.zeros(count, width, dtype=torch.float64)

    count = num_tokens * top_k
    result = Dense(
        *(zeros(count, w) for w in (rows, rows, inter, inter, hidden, hidden)),
        zeros(num_tokens, hidden),
        zeros(num_tokens, hidden),
        0.0,
    )
    inputs: list[dict[int, Tensor]] = [{} for _ in range(a["gate_up_base"].shape[0])]
    for t, _, e in pairs:
        inputs[int(a["gate_up_expert_to_base"][e])][t] = x[t]
    masks, gate_up_gap = _masks(a, "gate_up", [list(rows.values()) for rows in inputs], hidden)
    weights = _dense_weights(a, "gate_up", slice(0, -1), hidden, masks)
    sums: list[dict[int, Tensor]] = [{} for _ in range(a["down_base"].shape[0])]
    for t, s, e in pairs:
        p, (weight, absolute) = t * top_k + s, weights[e]
        offset = 0.0 if a["gate_up_bias"] is None else a["gate_up_bias"][e].double()
        result.gate_up[p] = weight @ x[t] + offset
        result.gate_up_error[p] = 4 * unit * (absolute @ x[t].abs() + abs(offset)) + tiny
        h, error = _activate(layer, result.gate_up[p], result.gate_up_error[p], unit)
        result.activated[p], result.activated_error[p] = h, error + tiny
        total = sums[int(a["down_expert_to_base"][e])]
        total[t] = total.get(t, 0.0) + g[t, s] * h
    masks, down_gap = _masks(a, "down", [list(rows.values()) for rows in sums], inter)
    weights = _dense_weights(a, "down", slice(-1, None), inter, masks)
    for t, s, e in pairs:
        p, (weight, absolute) = t * top_k + s, weights[e]
        offset = 0.0 if a["down_bias"] is None else a["down_bias"][e].double()
        h, error = result.activated[p], result.activated_error[p]
        result.down[p] = weight @ h + offset
        result.down_error[p] = absolute @ (error + 4 * unit * h.abs()) + 4 * unit * abs(offset) + tiny
        result.output[t] += g[t, s] * result.down[p]
        result.output_error[t] += g[t, s] * (result.down_error[p] + 2 * unit * (absolute @ h.abs() + abs(offset))) + tiny
    result.gap = min(gate_up_gap, down_gap)
    return result


def assert_within(actual: Tensor, expected: Tensor, error: Tensor) -> None:
    """Every element within its bound, and finite."""
    assert actual.shape == expected.shape
    excess = (actual.double() - expected).abs() - error
    assert bool((excess <= 0).all()), (
        f"off by {excess.max().item():.3g} more than the bound, of {expected.abs().max().item():.3g}"
    )
