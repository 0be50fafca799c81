"""Random weights of a sensible scale, plain and compressed: a layer's time does not depend on what its weights are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from d2moe_ext.adapters import ExpertsView, FusedExperts
from d2moe_ext.budget import LayerPlan
from d2moe_ext.experts import D2MoEExperts
from d2moe_ext.spec import GROUPS, ExpertsSpec

# A prime, so that rows of no width repeat one another; copying it is many times faster than drawing every number.
_POOL = 2**24 + 43
# Base columns differ in norm by up to this factor either way, as those of trained layers do. Where all weigh the same,
# which of them dynamic pruning takes is a matter of rounding.
_COLUMN_RANGE = 8.0
_DELTA_SHARE = 0.5


@cache
def _pool(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(_POOL, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def fill_(weight: Tensor, scale: float) -> None:
    """Normal numbers of this standard deviation, the same ones again every 16 million."""
    pool, flat = _pool(weight.dtype, weight.device), weight.detach().view(-1)
    for start in range(0, flat.numel(), _POOL):
        part = flat[start : start + _POOL]
        torch.mul(pool[: part.numel()], scale, out=part)


@torch.no_grad()
def plain_experts(view: ExpertsView, dtype: torch.dtype, device: str = "cpu") -> ExpertsView:
    """transformers' own experts module of a layer that is on the meta device, in memory and filled."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            module = type(view.module)(view.module.config).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)
    for parameter in module.parameters():
        fill_(parameter, 1 / math.sqrt(parameter.shape[-1]))
    return FusedExperts(view.name, module, nn.Module())


@torch.no_grad()
def compressed_experts(
    spec: ExpertsSpec, ranks: Mapping[str, Sequence[int]], dtype: torch.dtype, device: str = "cpu"
) -> D2MoEExperts:
    """A compressed layer of these shapes, filled.

    Args:
        spec: its shapes; factors are floating, and expert e belongs to base ``e % K``.
        ranks: by projection, each expert's.
        dtype: of bases and factors.
        device: where it is made; its numbers are the same everywhere.
    """
    module = D2MoEExperts(spec, None, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(2)
    for group in GROUPS:
        base = getattr(module, f"{group}_base")
        fill_(base, 1 / math.sqrt(base.shape[2]))
        columns = base.shape[2]
        spread = torch.rand(columns, generator=generator).mul(2).sub(1).mul(math.log(_COLUMN_RANGE)).exp()
        base.mul_((spread / spread.square().mean().sqrt()).to(device, dtype))
        if hasattr(module, f"{group}_columns"):
            inputs = spec.shape_of(group)[1]
            for row in getattr(module, f"{group}_columns"):
                row.copy_(_some_of(inputs, columns, generator))
        bases = torch.arange(spec.layout.num_experts) % base.shape[0]
        getattr(module, f"{group}_expert_to_base").copy_(bases)
    for name in spec.delta_order:
        _fill_delta(module, name, ranks[name], generator)
    module.refresh_column_norms()
    module.check_indices()
    return module


def from_plan(plan: LayerPlan, spec: ExpertsSpec, dtype: torch.dtype, device: str = "cpu") -> D2MoEExperts:
    """The compressed layer of a plan."""
    return compressed_experts(spec, plan.ranks, dtype, device)


def _fill_delta(module: D2MoEExperts, name: str, ranks: Sequence[int], generator: torch.Generator) -> None:
    spec = module.spec
    inputs = spec.shape_of(name)[1]
    rank = torch.tensor(ranks)
    fill_(getattr(module, f"{name}_delta_v"), 1 / math.sqrt(inputs))
    fill_(getattr(module, f"{name}_delta_u"), _DELTA_SHARE / math.sqrt(max(1.0, float(rank.float().mean()))))
    lengths = rank * (inputs - rank) if spec.gauge_fixed else rank
    for part, value in (("rank", rank), ("u_start", _starts(rank)), ("v_start", _starts(lengths))):
        getattr(module, f"{name}_delta_{part}").copy_(value)
    if spec.gauge_fixed:
        pivots = [_some_of(inputs, count, generator) for count in ranks]
        getattr(module, f"{name}_delta_pivots").copy_(torch.cat(pivots))


def _starts(lengths: Tensor) -> Tensor:
    return lengths.cumsum(0) - lengths


def _some_of(total: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` of ``0..total-1``, ascending."""
    return torch.randperm(total, generator=generator)[:count].sort().values
