"""A duck-typed view of the experts of an MoE block: their weights, gate and layout, and the call that reaches them.

Two kinds of experts are known:

- :class:`FusedExperts`: one module holds all experts stacked, ``gate_up_proj [E, 2 I, H]`` (or ``up_proj`` where there
  is no gate) and ``down_proj [E, H, I]``, perhaps transposed or with biases, and is called with
  ``(hidden_states [T, H], top_k_index [T, k], top_k_weights [T, k])``: every decorated experts class of transformers 5.
- :class:`ExpertList`: an ``nn.ModuleList`` of gated MLPs that its block runs through ``block.moe_infer``, as the code
  that comes with DeepSeek-MoE-16B, V2 and V3 does.

Nothing here reads weights unless asked for one expert, so a model on the meta device can be viewed as well.
"""

from __future__ import annotations

import copy
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

RoutedCall = Callable[[Tensor, Tensor, Tensor], Tensor]

_NATIVE_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu2": lambda x: functional.relu(x).square(),
}


@dataclass(frozen=True)
class ExpertsLayout:
    """What one layer's experts look like.

    Attributes:
        num_experts: E.
        hidden_size: H, the width of what the experts read and write (not always the model's).
        intermediate_size: I.
        gated: ``gate_up`` has 2 I rows (gate and up), else I rows (up alone).
        interleaved: the rows are gate0, up0, gate1, up1, ... instead of ``[gate; up]``.
        has_bias: both projections have a bias.
        activation: ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"relu2"`` where the native operators compute the whole
            gate; None where only the model's own code does.
        has_post_expert_norm: a norm follows each expert, before the router's weight.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    gated: bool
    interleaved: bool
    has_bias: bool
    activation: str | None
    has_post_expert_norm: bool

    @property
    def gate_up_rows(self) -> int:
        """R: the rows of the gate_up group."""
        return 2 * self.intermediate_size if self.gated else self.intermediate_size


class ExpertGating:
    """What is left of a layer's experts without their routed weights: the gate, and the norm after each expert.

    Holds no routed weight. The submodules that it calls stand in ``children``; a module that owns the gating registers
    them under their names, so that they move, save and load with it.
    """

    def __init__(self, children: dict[str, nn.Module], gate: Callable[[Tensor], Tensor]) -> None:
        self.children = children
        self.apply_gate = gate

    def post_expert_norm(self, x: Tensor) -> Tensor:
        """The norm after each expert, of ``[n, H]``; the identity where there is none."""
        return self.children["post_expert_norm"](x) if "post_expert_norm" in self.children else x


class ExpertsView(ABC):
    """The experts of one MoE block.

    Attributes:
        name: the path of the experts module in the model, e.g. ``"model.layers.0.mlp.experts"``.
        module: the experts module that stands there now.
        layout: its :class:`ExpertsLayout`.
    """

    layout: ExpertsLayout

    def __init__(self, name: str, module: nn.Module, block: nn.Module) -> None:
        self.name = name
        self.module: Any = module
        self.block: Any = block

    @abstractmethod
    def gate_up_weight(self, expert: int) -> Tensor:
        """``[R, H]``, out by in, rows in the model's own order (a view of the parameter where the layout allows it)."""

    @abstractmethod
    def down_weight(self, expert: int) -> Tensor:
        """``[H, I]``, out by in."""

    @abstractmethod
    def gate_up_bias(self, expert: int) -> Tensor | None:
        """``[R]``, or None."""

    @abstractmethod
    def down_bias(self, expert: int) -> Tensor | None:
        """``[H]``, or None."""

    @abstractmethod
    def gating(self) -> ExpertGating:
        """The model's own gate and norm, without the routed weights."""

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """The weights and biases of the routed experts: what compression removes."""

    @abstractmethod
    def _routed_call(self) -> tuple[nn.Module, str, Callable[[RoutedCall], Callable[..., Tensor]]]:
        """The object and attribute through which the experts are called, and how to put a function there."""

    def apply_gate(self, gate_up: Tensor) -> Tensor:
        """The model's own gate, ``[n, R] -> [n, I]``; differentiable."""
        return self.gating().apply_gate(gate_up)

    def post_expert_norm(self, x: Tensor) -> Tensor:
        """The norm after each expert, of ``[n, H]``; the identity where there is none."""
        return self.gating().post_expert_norm(x)

    @contextmanager
    def intercept(self, function: Callable[[Tensor, Tensor, Tensor], Any], observe: bool = False) -> Iterator[None]:
        """While active, the model calls ``function(hidden_states [T, H], top_k_index [T, k], top_k_weights [T, k])``.

        ``function`` returns ``[T, H]``: the weighted sum over each token's experts. With ``observe`` the experts run as
        ever, and what it returns is dropped. What stood there before comes back at the end, also after an error.

        Raises:
            RuntimeError: the experts are a list and the block is in training mode, where it loops over them.
        """
        owner, attribute, adapt = self._routed_call()
        previous, run, call = owner.__dict__.get(attribute), getattr(owner, attribute), adapt(function)

        def seen(*arguments: Any) -> Tensor:
            call(*arguments)
            return run(*arguments)

        owner.__dict__[attribute] = seen if observe else call
        try:
            yield
        finally:
            if previous is None:
                del owner.__dict__[attribute]
            else:
                owner.__dict__[attribute] = previous

    def replace(self, experts: nn.Module) -> None:
        """Put ``experts``, called like a fused module, in the place of these; the view lets go of the original."""
        setattr(self.block, self.name.rpartition(".")[2], experts)
        self.module = experts


class FusedExperts(ExpertsView):
    """The experts of one module with stacked weights, called ``(hidden_states, top_k_index, top_k_weights)``."""

    def __init__(self, name: str, module: nn.Module, block: nn.Module) -> None:
        super().__init__(name, module, block)
        self.is_transposed = bool(getattr(module, "is_transposed", False))
        self._gated = bool(getattr(module, "has_gate", True))
        self._gate_up_name = "gate_up_proj" if self._gated else "up_proj"
        self.layout = self._read_layout()

    def _read_layout(self) -> ExpertsLayout:
        gate_up, down = self._stacked(self._gate_up_name), self._stacked("down_proj")
        (experts, rows, hidden_size), (_, outputs, intermediate_size) = gate_up.shape, down.shape
        if down.shape[0] != experts or outputs != hidden_size or rows != intermediate_size * (1 + self._gated):
            raise ValueError(
                f"find_experts: {self.name} must hold {self._gate_up_name} [E, R, H] and down_proj [E, H, I] "
                f"that agree, got {list(gate_up.shape)} and {list(down.shape)}"
            )
        gate = getattr(type(self.module), "_apply_gate", None)
        default_gate = not self._gated or getattr(gate, "__name__", "") == "_default_apply_gate"
        act_fn = getattr(self.module, "act_fn", None)
        return ExpertsLayout(
            num_experts=experts,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            gated=self._gated,
            interleaved=self._gated and not getattr(self.module, "is_concatenated", True),
            has_bias=bool(getattr(self.module, "has_bias", False)),
            activation=native_activation(act_fn) if default_gate and act_fn is not None else None,
            has_post_expert_norm=bool(getattr(self.module, "has_post_expert_norm", False)),
        )

    def _stacked(self, name: str) -> Tensor:
        """A stacked weight as ``[E, out, in]``."""
        weight = getattr(self.module, name)
        return weight.transpose(1, 2) if self.is_transposed else weight

    def gate_up_weight(self, expert: int) -> Tensor:
        return self._stacked(self._gate_up_name)[expert]

    def down_weight(self, expert: int) -> Tensor:
        return self._stacked("down_proj")[expert]

    def gate_up_bias(self, expert: int) -> Tensor | None:
        return getattr(self.module, f"{self._gate_up_name}_bias")[expert] if self.layout.has_bias else None

    def down_bias(self, expert: int) -> Tensor | None:
        return self.module.down_proj_bias[expert] if self.layout.has_bias else None

    def stacked_weights(self) -> dict[str, nn.Parameter]:
        """The parameters that hold the routed experts, by name."""
        names = [self._gate_up_name, "down_proj"]
        if self.layout.has_bias:
            names += [f"{name}_bias" for name in names]
        return {name: getattr(self.module, name) for name in names}

    def gating(self) -> ExpertGating:
        # A shallow copy keeps every setting that the class's own gate reads (limits, act_fn), but not the weights.
        shell = copy.copy(self.module)
        shell.__dict__["_modules"] = dict(self.module._modules)
        removed = self.stacked_weights()
        shell.__dict__["_parameters"] = {k: p for k, p in self.module._parameters.items() if k not in removed}
        shell.__dict__.pop("forward", None)
        children = {name: child for name, child in shell._modules.items() if child is not None}
        return ExpertGating(children, _ModelsGate(shell) if self._gated else shell.act_fn)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.stacked_weights().values())

    def _routed_call(self) -> tuple[nn.Module, str, Callable[[RoutedCall], Callable[..., Tensor]]]:
        return self.module, "forward", lambda function: function


class ExpertList(ExpertsView):
    """The experts of an ``nn.ModuleList`` of gated MLPs, run through ``block.moe_infer(x, ids, weights)``."""

    def __init__(self, name: str, module: nn.Module, block: nn.Module) -> None:
        super().__init__(name, module, block)
        self.layout = self._read_layout()

    def _read_layout(self) -> ExpertsLayout:
        if not callable(getattr(self.block, "moe_infer", None)):
            raise ValueError(
                f"find_experts: {self.name} is a list of experts, whose block must route them through moe_infer, "
                f"got {type(self.block).__name__} without it"
            )
        projections = [[expert.gate_proj, expert.up_proj, expert.down_proj] for expert in self.module]
        shapes = {tuple(tuple(p.weight.shape) for p in expert) for expert in projections}
        biases = {p.bias is not None for expert in projections for p in expert}
        if len(shapes) != 1 or len(biases) != 1:
            raise ValueError(
                f"find_experts: the experts of {self.name} must have equal shapes, and all or no biases, "
                f"got shapes {sorted(shapes)} and biases {sorted(biases)}"
            )
        intermediate_size, hidden_size = self.module[0].up_proj.weight.shape
        return ExpertsLayout(
            num_experts=len(self.module),
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            gated=True,
            interleaved=False,
            has_bias=biases.pop(),
            activation=native_activation(self.module[0].act_fn),
            has_post_expert_norm=False,
        )

    def gate_up_weight(self, expert: int) -> Tensor:
        return torch.cat([self.module[expert].gate_proj.weight, self.module[expert].up_proj.weight])

    def down_weight(self, expert: int) -> Tensor:
        return self.module[expert].down_proj.weight

    def gate_up_bias(self, expert: int) -> Tensor | None:
        if not self.layout.has_bias:
            return None
        return torch.cat([self.module[expert].gate_proj.bias, self.module[expert].up_proj.bias])

    def down_bias(self, expert: int) -> Tensor | None:
        return self.module[expert].down_proj.bias

    def gating(self) -> ExpertGating:
        act_fn = self.module[0].act_fn
        return ExpertGating({"act_fn": act_fn} if isinstance(act_fn, nn.Module) else {}, _ChunkedGate(act_fn))

    def parameters(self) -> list[nn.Parameter]:
        return list(self.module.parameters())

    def _routed_call(self) -> tuple[nn.Module, str, Callable[[RoutedCall], Callable[..., Tensor]]]:
        if self.block.training:
            raise RuntimeError(f"intercept: {self.name} uses moe_infer in eval mode only, got a training model")

        def adapt(function: RoutedCall) -> Callable[..., Tensor]:
            return lambda x, ids, weights: function(x, ids.reshape(x.shape[0], -1), weights.reshape(x.shape[0], -1))

        return self.block, "moe_infer", adapt

    def replace(self, experts: nn.Module) -> None:
        super().replace(experts)
        # A bound method, not a closure: copy.deepcopy binds it to the copied block.
        self.block.__dict__["moe_infer"] = types.MethodType(_moe_infer, self.block)


class _ModelsGate:
    """``_apply_gate`` of a fused module without its weights (as an object: its bound method cannot be pickled)."""

    def __init__(self, shell: Any) -> None:
        self.shell = shell

    def __call__(self, gate_up: Tensor) -> Tensor:
        return self.shell._apply_gate(gate_up)


class _ChunkedGate:
    """``act_fn(gate) * up`` of rows ``[gate; up]``."""

    def __init__(self, act_fn: Callable[[Tensor], Tensor]) -> None:
        self.act_fn = act_fn

    def __call__(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up


def _moe_infer(block: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """``moe_infer`` of a block whose expert list was replaced: the flat pairs become rows of k per token again."""
    return block.experts(x, ids.reshape(x.shape[0], -1), weights.reshape(x.shape[0], -1))


def native_activation(act_fn: Callable[[Tensor], Tensor]) -> str | None:
    """The operators' name for ``act_fn``, or None: goes by what it computes, as models name and wrap it variously."""
    if isinstance(act_fn, nn.Module) and any(True for _ in act_fn.parameters()):
        return None
    # Wide enough to tell clipped variants apart; on the CPU also where the model itself is on the meta device.
    x = torch.linspace(-20, 20, 801, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        y = act_fn(x)
        for name, native in _NATIVE_ACTIVATIONS.items():
            if torch.allclose(y, native(x), rtol=1e-8, atol=1e-12):
                return name
    return None


def restore(model: nn.Module, name: str, original: nn.Module) -> None:
    """Undo :meth:`ExpertsView.replace`: put ``original`` back at the path ``name``."""
    block = model.get_submodule(name.rpartition(".")[0])
    setattr(block, name.rpartition(".")[2], original)
    if isinstance(original, nn.ModuleList):
        block.__dict__.pop("moe_infer", None)


def find_experts(model: nn.Module) -> list[ExpertsView]:
    """The routed experts of every MoE layer, in the model's own order.

    Args:
        model: a model in memory or on the meta device.

    Raises:
        ValueError: there are none, or a layer's experts are of a kind that is not known.
    """
    views: list[ExpertsView] = []
    for name, module in model.named_modules():
        block = model.get_submodule(name.rpartition(".")[0]) if name else model
        if _is_expert_list(module):
            views.append(ExpertList(name, module, block))
        elif _has_stacked_weights(module):
            if not hasattr(type(module), "_apply_gate"):
                raise ValueError(
                    f"find_experts: {name} must be called with (hidden_states, top_k_index, top_k_weights) as "
                    f"transformers' experts implementations are, got {type(module).__name__}, which is not one of them"
                )
            views.append(FusedExperts(name, module, block))
    if not views:
        raise ValueError(
            f"find_experts: the model must have mixture-of-experts layers (stacked experts of transformers 5, or a "
            f"list of gated MLPs run through moe_infer), got {type(model).__name__} without one"
        )
    return views


def _has_stacked_weights(module: nn.Module) -> bool:
    first = module._parameters.get("gate_up_proj", module._parameters.get("up_proj"))
    down = module._parameters.get("down_proj")
    return first is not None and down is not None and first.dim() == 3 and down.dim() == 3


def _is_expert_list(module: nn.Module) -> bool:
    projections = ("gate_proj", "up_proj", "down_proj", "act_fn")
    return (
        isinstance(module, nn.ModuleList)
        and len(module) > 0
        and all(all(hasattr(expert, name) for name in projections) for expert in module)
    )
