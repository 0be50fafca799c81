"""The numbers that describe one compressed layer: what config.json says of it, and what its shapes follow from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from d2moe_ext.adapters import ExpertsLayout
from d2moe_ext.config import FactorDtype

GROUPS = ("gate_up", "down")
# Gauge-fixed V's start at an element, counted in int32.
_LARGEST_START = 2**31 - 1
_DELTA_ORDER = ("gate", "up", "gate_up", "down")


@dataclass(frozen=True)
class GroupSpec:
    """One input group's base: K, the columns stored, and the columns multiplied per forward."""

    num_bases: int
    kept: int
    keep: int


@dataclass(frozen=True)
class DeltaSpec:
    """The rows that all experts' U and V of one projection take together.

    Gauge-fixed, V's are as many as its stored elements fill (:mod:`d2moe_ext.gauge`), the last one in part.
    """

    u_rows: int
    v_rows: int


def delta_names(layout: ExpertsLayout, joint_gate_up: bool) -> tuple[str, ...]:
    """The projections with a delta of their own, in the operators' order."""
    if not layout.gated:
        return ("up", "down")
    return ("gate_up", "down") if joint_gate_up else ("gate", "up", "down")


@dataclass(frozen=True)
class ExpertsSpec:
    """The shapes of one compressed layer.

    Attributes:
        layout: the layer's :class:`~d2moe_ext.adapters.ExpertsLayout`.
        gate_up, down: the bases.
        deltas: by projection: gate, up and down; or gate_up and down (which interleaved rows require); up and down
            where there is no gate; or none.
        gauge_fixed: every V has an identity in as many columns as its rank, which is not stored.
        factor_dtype: what U and V are stored in: ``model``, the dtype of all other weights, or ``int8`` with a scale a row
            (:mod:`d2moe_ext.quantise`).

    Raises:
        ValueError: one sentence, for numbers that do not describe a layer.
    """

    layout: ExpertsLayout
    gate_up: GroupSpec
    down: GroupSpec
    deltas: dict[str, DeltaSpec]
    gauge_fixed: bool = False
    factor_dtype: str = "model"

    def __post_init__(self) -> None:
        for group, columns in (("gate_up", self.layout.hidden_size), ("down", self.layout.intermediate_size)):
            spec: GroupSpec = getattr(self, group)
            if not 1 <= spec.num_bases <= self.layout.num_experts:
                raise ValueError(
                    f"ExpertsSpec: {group}.num_bases must be in 1..{self.layout.num_experts}, got {spec.num_bases}"
                )
            if not 1 <= spec.keep <= spec.kept <= columns:
                raise ValueError(
                    f"ExpertsSpec: {group} must have 1 <= keep <= kept <= {columns}, got keep {spec.keep}, kept {spec.kept}"
                )
        allowed = [delta_names(self.layout, joint_gate_up=True), ()]
        if not self.layout.interleaved:
            allowed.append(delta_names(self.layout, joint_gate_up=False))
        if set(self.deltas) not in [set(names) for names in allowed]:
            raise ValueError(f"ExpertsSpec: deltas must be one of {sorted(set(allowed))}, got {sorted(self.deltas)}")
        if not self.deltas and self.down.kept < self.layout.intermediate_size:
            raise ValueError(
                f"ExpertsSpec: down.kept must be {self.layout.intermediate_size} without deltas, got {self.down.kept}"
            )
        if self.factor_dtype not in get_args(FactorDtype):
            raise ValueError(
                f"ExpertsSpec: factor_dtype must be one of {list(get_args(FactorDtype))}, got {self.factor_dtype!r}"
            )
        for name, delta in self.deltas.items():
            if delta.u_rows < 0 or delta.v_rows < 0:
                raise ValueError(f"ExpertsSpec: deltas.{name} must have rows >= 0, got {delta.u_rows} and {delta.v_rows}")
            if self.gauge_fixed and delta.v_rows * self.shape_of(name)[1] > _LARGEST_START:
                raise ValueError(
                    f"ExpertsSpec: deltas.{name} must have at most {_LARGEST_START} elements of V where gauge_fixed, "
                    f"got {delta.v_rows} rows of {self.shape_of(name)[1]}"
                )

        # One order whatever the source (config.json sorts its keys): it is that of the tensors in sharded files.
        object.__setattr__(self, "deltas", {name: self.deltas[name] for name in _DELTA_ORDER if name in self.deltas})

    @property
    def delta_order(self) -> tuple[str, ...]:
        """The names of ``deltas``, which stand in the operators' order."""
        return tuple(self.deltas)

    def shape_of(self, projection: str) -> tuple[int, int]:
        """``(out, in)`` of a projection or group: gate, up, gate_up or down."""
        hidden_size, intermediate_size = self.layout.hidden_size, self.layout.intermediate_size
        if projection == "down":
            return hidden_size, intermediate_size
        return (self.layout.gate_up_rows if projection == "gate_up" else intermediate_size), hidden_size

    def scales_of(self, projection: str) -> dict[str, int]:
        """How many scales U's and V's tensors have: none, one a row, or one a component of gauge-fixed V."""
        if self.factor_dtype == "model":
            return {}
        delta = self.deltas[projection]
        return {"u": delta.u_rows, "v": delta.u_rows if self.gauge_fixed else delta.v_rows}

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and dicts, as they stand in config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ExpertsSpec:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: one sentence, for a missing, unknown or mistyped entry, or numbers that describe no layer.
        """
        # Files of the format's first version do not say how factors are stored: whole, and in the model's dtype.
        first: dict[str, Any] = {"gauge_fixed": False, "factor_dtype": "model"}
        data = first | data if isinstance(data, dict) else data
        _check_keys("spec", data, {"layout", "gate_up", "down", "deltas", "gauge_fixed", "factor_dtype"})
        if not isinstance(data["deltas"], dict):
            raise ValueError(f"ExpertsSpec: deltas must be a mapping, got {data['deltas']!r}")
        return cls(
            layout=_from_dict(ExpertsLayout, "layout", data["layout"]),
            gate_up=_from_dict(GroupSpec, "gate_up", data["gate_up"]),
            down=_from_dict(GroupSpec, "down", data["down"]),
            deltas={name: _from_dict(DeltaSpec, f"deltas.{name}", delta) for name, delta in data["deltas"].items()},
            gauge_fixed=_flag("gauge_fixed", data["gauge_fixed"]),
            factor_dtype=data["factor_dtype"],
        )


_FIELD_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "bool": (bool,), "str | None": (str, type(None))}


def _check_keys(where: str, data: Any, expected: set[str]) -> None:
    if not isinstance(data, dict) or set(data) != expected:
        got = sorted(data) if isinstance(data, dict) else repr(data)
        raise ValueError(f"ExpertsSpec: {where} must have the entries {sorted(expected)}, got {got}")


def _flag(where: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"ExpertsSpec: {where} must be bool, got {value!r}")
    return value


def _from_dict(kind: Any, where: str, data: Any) -> Any:
    _check_keys(where, data, {field.name for field in fields(kind)})
    for field in fields(kind):
        if type(data[field.name]) not in _FIELD_TYPES[str(field.type)]:
            raise ValueError(f"ExpertsSpec: {where}.{field.name} must be {field.type}, got {data[field.name]!r}")
    return kind(**data)
