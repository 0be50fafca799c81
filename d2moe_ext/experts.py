"""The module that stands where a compressed layer's experts stood.

Sizes as everywhere: E experts, H hidden, I intermediate, R rows of gate_up, K bases, r rank. What the module holds is
what the file holds (one name per tensor, in the module's own place in the model):

    gate_up_base [K, R, H_kept]   gate_up_columns [K, H_kept] int32 where H_kept < H   gate_up_expert_to_base [E] int32
    down_base    [K, H, I_kept]   down_columns    [K, I_kept] int32 where I_kept < I   down_expert_to_base    [E] int32
    gate_up_bias [E, R] and down_bias [E, H] where the model has them
    {projection}_delta_u [R_u, out], _delta_v [R_v, in], _delta_rank, _delta_u_start, _delta_v_start [E] int32
    {projection}_delta_pivots [R_u] int32 where the factors are gauge-fixed (:mod:`d2moe_ext.gauge`)
    {projection}_delta_u_scale [R_u], _delta_v_scale [R_v], or [R_u] if gauge-fixed, where U and V are int8

Expert e's delta of a projection is ``delta_u[u : u + r].T @ V`` with ``r, u, v`` its rank and starts and ``V`` the rows
``delta_v[v : v + r]``. Gauge-fixed, columns ``delta_pivots[u : u + r]`` of V are an identity, and its other columns stand
row by row in the flat ``delta_v`` from element v on; R_v rows of ``in`` elements are as many as that needs. Rows of int8
are a scale times what is stored (:mod:`d2moe_ext.quantise`); row i of a gauge-fixed V has scale ``delta_v_scale[u + i]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from d2moe_ext import ops
from d2moe_ext.adapters import ExpertGating, ExpertList, ExpertsView, FusedExperts
from d2moe_ext.reference.moe_forward import moe_down_forward, moe_forward, moe_gate_up_forward
from d2moe_ext.spec import GROUPS, DeltaSpec, ExpertsSpec, GroupSpec, delta_names

__all__ = ["D2MoEExperts", "DeltaSpec", "ExpertsSpec", "GroupSpec", "UncompressedExperts", "delta_names"]


Backend = Literal["torch", "native"]
_CACHE_LINE = 64


class _Operators(NamedTuple):
    moe_forward: Callable[..., Tensor]
    moe_gate_up_forward: Callable[..., Tensor]
    moe_down_forward: Callable[..., Tensor]


_BACKENDS = {
    "torch": _Operators(moe_forward, moe_gate_up_forward, moe_down_forward),
    "native": _Operators(ops.moe_forward, ops.moe_gate_up_forward, ops.moe_down_forward),
}


def _frozen(*shape: int, dtype: torch.dtype, device: torch.device | str | None) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=False)


class D2MoEExperts(nn.Module):
    """The compressed experts of one layer, called like the experts they replace.

    Args:
        spec: the shapes.
        gating: the original experts' view (or its gating, or a function ``[n, R] -> [n, I]``), needed where the gate or
            the norm after each expert is the model's own; None where ``spec.layout.activation`` says it all.
        dtype: of all floating tensors (the forward's dtype); factors of int8 are int8 whatever it is.
        device: of all tensors; they are zeros until filled or loaded.

    Attributes:
        backend: ``"torch"``, the differentiable reference, or ``"native"``, the operators; see :meth:`set_backend`.
        dynamic: False multiplies all stored columns instead of the best ``keep`` for the batch at hand.

    Raises:
        ValueError: no gating was given and the layout needs one.
    """

    def __init__(
        self,
        spec: ExpertsSpec,
        gating: ExpertsView | ExpertGating | Callable[[Tensor], Tensor] | None,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.backend: Backend = "torch"
        self.dynamic = True
        self._take_gating(gating)
        layout = spec.layout
        for group in GROUPS:
            group_spec: GroupSpec = getattr(spec, group)
            out, inputs = spec.shape_of(group)
            setattr(self, f"{group}_base", _frozen(group_spec.num_bases, out, group_spec.kept, dtype=dtype, device=device))
            if layout.has_bias:
                setattr(self, f"{group}_bias", _frozen(layout.num_experts, out, dtype=dtype, device=device))
            if group_spec.kept < inputs:
                self._register_indices(f"{group}_columns", (group_spec.num_bases, group_spec.kept), device)
            self._register_indices(f"{group}_expert_to_base", (layout.num_experts,), device)
            if group_spec.keep < group_spec.kept:
                self.register_buffer(f"{group}_column_norms", None, persistent=False)
        for name, delta in spec.deltas.items():
            out, inputs = spec.shape_of(name)
            factor_dtype = torch.int8 if spec.factor_dtype == "int8" else dtype
            setattr(self, f"{name}_delta_u", _frozen(delta.u_rows, out, dtype=factor_dtype, device=device))
            setattr(self, f"{name}_delta_v", _frozen(delta.v_rows, inputs, dtype=factor_dtype, device=device))
            for part, count in spec.scales_of(name).items():
                setattr(self, f"{name}_delta_{part}_scale", _frozen(count, dtype=dtype, device=device))
            for part in ("rank", "u_start", "v_start"):
                self._register_indices(f"{name}_delta_{part}", (layout.num_experts,), device)
            if spec.gauge_fixed:
                self._register_indices(f"{name}_delta_pivots", (delta.u_rows,), device)
        self.refresh_column_norms()
        self.register_load_state_dict_post_hook(_refresh_after_load)

    def _take_gating(self, gating: ExpertsView | ExpertGating | Callable[[Tensor], Tensor] | None) -> None:
        if isinstance(gating, ExpertsView):
            gating = gating.gating()
        if gating is not None and not isinstance(gating, ExpertGating):
            gating = ExpertGating({}, gating)
        if gating is None and (self.spec.layout.activation is None or self.spec.layout.has_post_expert_norm):
            raise ValueError("D2MoEExperts: gating must be given where the gate or a norm is the model's own, got None")
        for name, child in gating.children.items() if gating is not None else ():
            self.add_module(name, child)
        self.gating = gating

    def _register_indices(self, name: str, shape: tuple[int, ...], device: torch.device | str | None) -> None:
        self.register_buffer(name, torch.zeros(shape, dtype=torch.int32, device=device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> D2MoEExperts:
        # .to(dtype) would round the float32 norms, and .to_empty() lose them.
        super()._apply(fn, recurse)
        self.refresh_column_norms()
        return self

    def set_backend(self, backend: Backend) -> None:
        """Choose what runs the forward, and lay the bases out for it.

        The native operators read a base that is pruned by the batch channel by channel (``stride(1) == 1``), so that what
        is not multiplied is not read either; everything else is read as it stands in the file. Shapes and values stay.
        """
        for group in GROUPS:
            if self._group(group).keep == self._group(group).kept:
                continue
            base: nn.Parameter = getattr(self, f"{group}_base")
            by_channel = base.detach().transpose(1, 2)
            base.data = by_channel.contiguous().transpose(1, 2) if backend == "native" else base.detach().contiguous()
        if backend == "native":
            self._align()
        self.backend = backend

    def _align(self) -> None:
        """Copy what begins off a cache line's boundary, as tensors do that are mapped from a checkpoint's file: each load of a
        vector would cross two lines. Tensor by tensor, so that no more than one of them is held twice."""
        for parameter in self.parameters(recurse=False):
            if parameter.device.type == "cpu" and parameter.data_ptr() % _CACHE_LINE:
                parameter.data = parameter.detach().clone()  # keeps the layout; torch allocates at cache lines

    @property
    def prunes_dynamically(self) -> bool:
        """Whether a forward multiplies fewer columns than are stored: then a batch's tokens depend on one another."""
        return self.dynamic and any(self._group(group).keep < self._group(group).kept for group in GROUPS)

    def _group(self, group: str) -> GroupSpec:
        return getattr(self.spec, group)

    def refresh_column_norms(self) -> None:
        """Recompute ``||base[:, j]||_2`` (eq. 9), which is not stored; needed after the bases were written to."""
        for group in GROUPS:
            if self._group(group).keep < self._group(group).kept:
                base = getattr(self, f"{group}_base").detach()
                accumulate = torch.promote_types(base.dtype, torch.float32)
                norms = torch.linalg.vector_norm(base, dim=1, dtype=accumulate)
                setattr(self, f"{group}_column_norms", norms.float())

    def check_indices(self, name: str = "D2MoEExperts") -> None:
        """Check every index list against the tensors it points into; called once after loading.

        Raises:
            ValueError: one sentence with ``name``, the list, its range and the value found.
        """
        for group in GROUPS:
            columns = getattr(self, f"{group}_columns", None)
            if columns is not None:
                _check_range(f"{name}: {group}_columns", columns, self.spec.shape_of(group)[1])
            bases = getattr(self, f"{group}_expert_to_base")
            _check_range(f"{name}: {group}_expert_to_base", bases, self._group(group).num_bases)
        for projection, delta in self.spec.deltas.items():
            rank = getattr(self, f"{projection}_delta_rank").long()
            u_start, v_start = (getattr(self, f"{projection}_delta_{part}_start").long() for part in ("u", "v"))
            what = f"{name}: {projection}_delta"
            outputs, inputs = self.spec.shape_of(projection)
            _check_range(f"{what}_rank", rank, min(delta.u_rows, outputs, inputs) + 1)
            _check_slices(f"{what}_u_start", u_start, "rank", rank, delta.u_rows)
            if not self.spec.gauge_fixed:
                _check_slices(f"{what}_v_start", v_start, "rank", rank, delta.v_rows)
                continue
            elements = rank * (inputs - rank)
            _check_slices(f"{what}_v_start", v_start, "rank * (columns - rank)", elements, delta.v_rows * inputs)
            _check_pivots(f"{what}_pivots", getattr(self, f"{projection}_delta_pivots").long(), u_start, rank, inputs)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run the experts: ``[T, H]``, ``[T, k]`` ids and ``[T, k]`` router weights to ``[T, H]``.

        Ids outside ``0..E-1`` contribute nothing. With the native backend a gradient that would be needed raises
        ``RuntimeError``.
        """
        layout, operators, tensors = self.spec.layout, _BACKENDS[self.backend], self._tensors()
        down = self._arguments("down", tensors)
        if layout.activation is not None and not layout.has_post_expert_norm:
            gate_up, deltas = self._arguments("gate_up", tensors), self._deltas(self.spec.delta_order, tensors)
            how = (layout.activation, layout.interleaved)
            return operators.moe_forward(hidden_states, top_k_index, top_k_weights, *gate_up, *down, *deltas, *how)
        gating = self.gating
        assert gating is not None  # _take_gating
        activated = gating.apply_gate(self.gate_up_rows(hidden_states, top_k_index)).to(hidden_states.dtype)
        per_pair, lower = layout.has_post_expert_norm, self._deltas(self.spec.delta_order[-1:], tensors)
        output = operators.moe_down_forward(activated, top_k_index, top_k_weights, *down, *lower, per_pair)
        if not per_pair:
            return output
        pairs = gating.post_expert_norm(output).view(*top_k_index.shape, -1)
        # A norm with an offset would make something of the zero rows of ids that are no expert.
        valid = (top_k_index >= 0) & (top_k_index < layout.num_experts)
        pairs = pairs.where(valid.unsqueeze(-1), 0) * top_k_weights.unsqueeze(-1)
        return pairs.sum(dim=1, dtype=torch.promote_types(pairs.dtype, torch.float32)).to(hidden_states.dtype)

    def gate_up_rows(self, hidden_states: Tensor, top_k_index: Tensor) -> Tensor:
        """What goes into the gate: ``[T, H]`` and ``[T, k]`` ids to ``[T * k, R]``, a row for every (token, expert) pair."""
        moe_gate_up_forward, tensors = _BACKENDS[self.backend].moe_gate_up_forward, self._tensors()
        upper = self._deltas(self.spec.delta_order[:-1], tensors)
        return moe_gate_up_forward(hidden_states, top_k_index, *self._arguments("gate_up", tensors), *upper)

    def _tensors(self) -> dict[str, Any]:
        """All of them by name: a look-up here costs less than one through ``Module.__getattr__``, of which a forward would make
        some thirty (a call of a tiny compressed layer takes 23 µs, and took 39 with them)."""
        return self._parameters | self._buffers

    def _arguments(
        self, group: str, tensors: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, int, Tensor | None]:
        """base, columns, column_norms, expert_to_base, keep, bias of a group, as the operators take them."""
        spec = self._group(group)
        return (
            tensors[f"{group}_base"],
            tensors.get(f"{group}_columns"),
            tensors.get(f"{group}_column_norms"),
            tensors[f"{group}_expert_to_base"],
            spec.keep if self.dynamic else spec.kept,
            tensors.get(f"{group}_bias"),
        )

    def _deltas(self, names: tuple[str, ...], tensors: dict[str, Any]) -> list[list[Tensor]]:
        """The operators' lists from delta_u to delta_v_scale: one entry for each of ``names``, but no pivots where V is
        stored whole, and no scales where factors are floating."""
        int8 = self.spec.factor_dtype == "int8"
        there = dict.fromkeys(("u", "v", "rank", "u_start", "v_start"), True)
        there |= {"pivots": self.spec.gauge_fixed, "u_scale": int8, "v_scale": int8}
        return [[tensors[f"{name}_delta_{part}"] for name in names if there[part]] for part in there]

    @classmethod
    def uncompressed(cls, view: ExpertsView) -> UncompressedExperts:
        """The experts of ``view`` as they are (K = E, no deltas), sharing their storage."""
        return UncompressedExperts(view)

    def extra_repr(self) -> str:
        return f"num_experts={self.spec.layout.num_experts}, gate_up={self.spec.gate_up}, down={self.spec.down}"


def _check_range(what: str, indices: Tensor, end: int) -> None:
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= end):
        value = int(indices.min()) if int(indices.min()) < 0 else int(indices.max())
        raise ValueError(f"{what} must be in 0..{end - 1}, got {value}")


def _check_slices(what: str, start: Tensor, length_name: str, length: Tensor, end: int) -> None:
    """``start : start + length`` of every expert must lie within ``end`` rows or elements."""
    _check_range(what, start, end + 1)
    _check_range(f"{what} + {length_name}", start + length, end + 1)


def _check_pivots(what: str, pivots: Tensor, start: Tensor, rank: Tensor, columns: int) -> None:
    """The pivots must be columns, and ascend within each expert."""
    _check_range(what, pivots, columns)
    for expert, (first, count) in enumerate(zip(start.tolist(), rank.tolist(), strict=True)):
        steps = pivots[first : first + count].diff()
        if steps.numel() and int(steps.min()) < 1:
            at = first + int(steps.argmin())
            raise ValueError(
                f"{what} must ascend within an expert, got {int(pivots[at])} before {int(pivots[at + 1])} for expert {expert}"
            )


def _refresh_after_load(module: D2MoEExperts, incompatible_keys: object) -> None:
    module.refresh_column_norms()


class UncompressedExperts(D2MoEExperts):
    """The experts of a plain layer, run by the same operators: K = E, every base an expert, no deltas.

    Shares the original's storage: no weight is held twice. (A module list's weights become views of one stacked tensor
    each; a transposed layout is read through a transposed view.) Its state dict is the original's, name by name, so a
    patched model saves and loads as the plain model that it is.

    Args:
        view: the plain experts; ``view.module`` is kept as ``original``.
    """

    original: nn.Module

    def __init__(self, view: ExpertsView) -> None:
        layout = view.layout
        gate_up, down = (
            GroupSpec(num_bases=layout.num_experts, kept=columns, keep=columns)
            for columns in (layout.hidden_size, layout.intermediate_size)
        )
        weight = view.down_weight(0)
        # On meta: nothing is allocated that the original's own tensors will replace.
        super().__init__(ExpertsSpec(layout, gate_up, down, {}), view, dtype=weight.dtype, device="meta")
        for group in GROUPS:
            every = torch.arange(layout.num_experts, dtype=torch.int32, device=weight.device)
            setattr(self, f"{group}_expert_to_base", every)
        # In __dict__, not as a submodule: its parameters are this module's already.
        self.__dict__["original"] = view.module
        self._stacked: Callable[[Any], dict[str, nn.Parameter]] = _stack_list if isinstance(view, ExpertList) else _stack_fused
        self._share()

    def _share(self) -> None:
        stacked: Callable[..., dict[str, nn.Parameter]] = self.__dict__["_stacked"]
        for name, parameter in stacked(self.original).items():
            setattr(self, name, parameter)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> UncompressedExperts:
        self.original._apply(fn, recurse)
        super()._apply(fn, recurse)
        self._share()
        return self

    def _align(self) -> None:
        """Nothing: weights stay where the original has them."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.original.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        for name, module in self.original.named_modules():
            module._load_from_state_dict(state_dict, f"{prefix}{name}." if name else prefix, *arguments)


def _stack_fused(original: nn.Module) -> dict[str, nn.Parameter]:
    """A fused module's parameters under the names of :class:`D2MoEExperts`: the same objects, or transposed views."""
    view = FusedExperts("", original, original)
    shared = {}
    for name, parameter in view.stacked_weights().items():
        group = "down" if name.startswith("down") else "gate_up"
        if name.endswith("_bias"):
            shared[f"{group}_bias"] = parameter
        elif view.is_transposed:
            data = parameter.detach().transpose(1, 2)
            shared[f"{group}_base"] = nn.Parameter(data, requires_grad=parameter.requires_grad)
        else:
            shared[f"{group}_base"] = parameter
    return shared


def _stack_list(original: nn.ModuleList) -> dict[str, nn.Parameter]:
    """A module list's weights stacked, the list's own parameters made views of the stack."""
    shared = {}
    for kind, suffix in (("weight", "base"), ("bias", "bias")):
        for group, projections in (("gate_up", ("gate_proj", "up_proj")), ("down", ("down_proj",))):
            parts = [[getattr(getattr(expert, name), kind) for name in projections] for expert in original]
            if parts[0][0] is None:
                continue
            stack = torch.stack([torch.cat([part.detach() for part in expert]) for expert in parts])
            for expert, rows in zip(parts, stack, strict=True):
                for part, data in zip(expert, rows.split([part.shape[0] for part in expert]), strict=True):
                    part.data = data
            shared[f"{group}_{suffix}"] = nn.Parameter(stack, requires_grad=any(p.requires_grad for e in parts for p in e))
    return shared
