"""Who computes the same layer: transformers' experts implementations, the paper's loop over experts, and this package."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from d2moe_ext.adapters import ExpertList, ExpertsLayout, ExpertsView
from d2moe_ext.bench.costs import Cost, forward_cost
from d2moe_ext.experts import Backend, D2MoEExperts, UncompressedExperts
from d2moe_ext.reference.moe_forward import gated_activation

HF_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
# batched_mm copies the weights of every (token, expert) pair; beyond this nobody would run it.
BATCHED_LIMIT = 4 * 2**30
PLAIN = "plain"
EXPERT_LIST = "expert list"

Kind = Literal["hf", "loop", "torch", "native"]


class Routed(NamedTuple):
    """What experts are called with: ``[T, H]``, ``[T, k]`` ids and ``[T, k]`` router weights."""

    hidden_states: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor


@dataclass(frozen=True)
class Contender:
    """One way to compute a layer.

    Attributes:
        name: shown in the row.
        kind: transformers' (``hf``), the paper's loop, or this package's torch backend or native operators.
        layer: whose weights: ``"plain"``, or a compressed layer's name such as ``"throughput 0.6"``.
        dynamic: whether columns are pruned by the batch.
        run: from inputs to ``[T, H]``.
        cost: the least that it costs, from ``[T, k]`` ids.
        reference: whose output this one's must equal but for rounding; None for one that is itself a reference.
        skip: why it cannot run on these inputs, or None.
    """

    name: str
    kind: Kind
    layer: str
    dynamic: bool
    run: Callable[[Routed], Tensor]
    cost: Callable[[Tensor], Cost]
    reference: Contender | None = None
    skip: Callable[[Routed], str | None] = lambda routed: None


def make_inputs(
    layout: ExpertsLayout,
    top_k: int,
    tokens: int,
    dtype: torch.dtype,
    count: int = 3,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Routed, ...]:
    """``count`` random inputs for one layer; every expert is as likely as any other, which touches the most of them.
    They are the same ones on every device."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for _ in range(count):
        hidden_states = torch.randn(tokens, layout.hidden_size, generator=generator).to(dtype)
        index = torch.rand(tokens, layout.num_experts, generator=generator).topk(top_k).indices
        weights = torch.randn(tokens, top_k, generator=generator).softmax(dim=-1).to(dtype)
        inputs.append(Routed(*(value.to(device) for value in (hidden_states, index, weights))))
    return tuple(inputs)


def plain_contenders(view: ExpertsView, batched_limit: int = BATCHED_LIMIT, torch_too: bool = False) -> list[Contender]:
    """Transformers' implementations of an uncompressed layer, and this package's on the same weights.

    Args:
        view: the layer; its weights are shared.
        batched_limit: bytes of gathered weights above which ``batched_mm`` is skipped.
        torch_too: also this package's torch backend.
    """
    module = D2MoEExperts.uncompressed(view)

    def cost(index: Tensor) -> Cost:
        return forward_cost(module, index)

    if isinstance(view, ExpertList):
        first = Contender(EXPERT_LIST, "hf", PLAIN, False, _list_loop(view.module), cost)
        others = []
    else:
        first = Contender("eager", "hf", PLAIN, False, _implementation(view.module, "eager"), cost)
        others = [
            Contender("grouped_mm", "hf", PLAIN, False, _implementation(view.module, "grouped_mm"), cost, first),
            Contender(
                "batched_mm",
                "hf",
                PLAIN,
                False,
                _implementation(view.module, "batched_mm"),
                cost,
                first,
                _gathered_weights(module, batched_limit),
            ),
        ]
    if torch_too:
        others.append(Contender("uncompressed, torch", "torch", PLAIN, False, _runner(as_stored(module), False), cost, first))
    module.set_backend("native")
    return [first, *others, Contender("uncompressed", "native", PLAIN, False, _runner(module, False), cost, first)]


def compressed_contenders(module: D2MoEExperts, layer: str, loop: bool = False, torch_too: bool = False) -> list[Contender]:
    """This package's operators on a compressed layer, with dynamic pruning and without where the layer has it.

    Args:
        module: its backend becomes ``native``.
        layer: its name in the rows.
        loop: also the paper's loop over experts, on all stored columns.
        torch_too: also the torch backend.

    Raises:
        ValueError: ``loop``, and factors that are stored otherwise than the paper does.
    """
    stored = as_stored(module)
    module.set_backend("native")
    contenders = []
    module.dynamic = True
    for dynamic in (False, True) if module.prunes_dynamically else (False,):
        name = f"{layer}, dynamic" if dynamic else layer
        cost = _cost_of(module, dynamic)
        reference = Contender(f"{name}, torch", "torch", layer, dynamic, _runner(stored, dynamic), cost)
        if torch_too:
            contenders.append(reference)
        if loop and not dynamic:
            contenders.append(Contender(f"{layer}, loop", "loop", layer, False, expert_loop(stored), cost, reference))
        contenders.append(Contender(name, "native", layer, dynamic, _runner(module, dynamic), cost, reference))
    return contenders


def as_stored(module: D2MoEExperts, backend: Backend = "torch") -> D2MoEExperts:
    """The same layer in the layout that it has now, whatever ``module.set_backend`` does to ``module`` afterwards.

    Shares every tensor that is not laid out anew.
    """
    twin = copy.copy(module)
    parameters = {
        name: None if p is None else nn.Parameter(p.detach(), p.requires_grad) for name, p in module._parameters.items()
    }
    twin.__dict__ |= {"_parameters": parameters, "_buffers": dict(module._buffers), "backend": backend}
    return twin


def _runner(module: D2MoEExperts, dynamic: bool) -> Callable[[Routed], Tensor]:
    def run(routed: Routed) -> Tensor:
        module.dynamic = dynamic
        return module(*routed)

    return run


def _cost_of(module: D2MoEExperts, dynamic: bool) -> Callable[[Tensor], Cost]:
    def cost(index: Tensor) -> Cost:
        module.dynamic = dynamic
        return forward_cost(module, index)

    return cost


def _implementation(module: Any, name: str) -> Callable[[Routed], Tensor]:
    """transformers' experts module with one of the functions that its configuration chooses from."""

    def run(routed: Routed) -> Tensor:
        before = module.config._experts_implementation
        module.config._experts_implementation = name
        try:
            return module(*routed)
        finally:
            module.config._experts_implementation = before

    return run


def gathered_bytes(layout: ExpertsLayout, pairs: int, element_size: int) -> int:
    """What ``batched_mm`` copies of the weights for so many (token, expert) pairs."""
    return pairs * (layout.gate_up_rows + layout.intermediate_size) * layout.hidden_size * element_size


def _gathered_weights(module: UncompressedExperts, limit: int) -> Callable[[Routed], str | None]:
    def skip(routed: Routed) -> str | None:
        element_size = module.get_parameter("down_base").element_size()
        gathered = gathered_bytes(module.spec.layout, routed.top_k_index.numel(), element_size)
        if gathered <= limit:
            return None
        return f"skipped: gathers {gathered / 2**30:.1f} GiB of weights, more than {limit / 2**30:.1f} GiB"

    return skip


def _list_loop(experts: nn.ModuleList) -> Callable[[Routed], Tensor]:
    """A list of expert modules, each run on its tokens, as models with remote code do."""

    def run(routed: Routed) -> Tensor:
        x, index, weights = routed
        output = torch.zeros_like(x)
        for expert in torch.unique(index).tolist():
            token, slot = torch.where(index == expert)
            output.index_add_(0, token, experts[expert](x[token]) * weights[token, slot, None])
        return output

    return run


def expert_loop(module: D2MoEExperts) -> Callable[[Routed], Tensor]:
    """The paper's Algorithm 1 in plain torch: expert by expert, ``W_b x + U[e] (V[e] x)`` on that expert's tokens.

    The base is multiplied once for every expert, as in the published code, and not once for every token.

    Raises:
        ValueError: factors of eight bits or gauge-fixed ones, a bias, or a gate of the model's own.
    """
    spec = module.spec
    layout = spec.layout
    if spec.gauge_fixed or spec.factor_dtype != "model" or layout.has_bias or layout.activation is None or not layout.gated:
        raise ValueError(f"expert_loop needs gated experts with whole floating factors and no bias, got {spec}.")
    activation = layout.activation

    def product(x: Tensor, expert: int, group: str, projections: Iterable[str]) -> Tensor:
        base = int(getattr(module, f"{group}_expert_to_base")[expert])
        columns = getattr(module, f"{group}_columns", None)
        kept = x if columns is None else x[:, columns[base].long()]
        deltas = [functional.linear(x, v) @ u for u, v in (_factors(module, name, expert) for name in projections)]
        return functional.linear(kept, getattr(module, f"{group}_base")[base]) + torch.cat(deltas, dim=1)

    def run(routed: Routed) -> Tensor:
        x, index, weights = routed
        output = torch.zeros_like(x)
        for expert in torch.unique(index).tolist():
            token, slot = torch.where(index == expert)
            gate_up = product(x[token], expert, "gate_up", spec.delta_order[:-1])
            h = gated_activation(gate_up, activation, layout.interleaved, gated=True)
            down = product(h, expert, "down", spec.delta_order[-1:])
            output.index_add_(0, token, down * weights[token, slot, None])
        return output

    return run


def _factors(module: D2MoEExperts, projection: str, expert: int) -> tuple[Tensor, Tensor]:
    """``[r, out]`` and ``[r, in]``."""
    rank, u, v = (int(getattr(module, f"{projection}_delta_{part}")[expert]) for part in ("rank", "u_start", "v_start"))
    return getattr(module, f"{projection}_delta_u")[u : u + rank], getattr(module, f"{projection}_delta_v")[v : v + rank]
