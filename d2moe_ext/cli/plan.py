"""``d2moe plan``: what a compression would come to, from a configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2moe_ext.cli import common
from d2moe_ext.cli.options import (
    BasesOption,
    CountOption,
    DtypeOption,
    FactorDtypeOption,
    GaugeOption,
    JointOption,
    JsonOption,
    PresetOption,
    RatioOption,
    SparsityOption,
    TrustOption,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def plan_command(
    model: Annotated[str, typer.Argument(metavar="CONFIG_OR_MODEL", help="A config.json, a model's directory or its name.")],
    ratio: RatioOption,
    preset: PresetOption = "quality",
    base_sparsity: SparsityOption = None,
    count: CountOption = "stored",
    joint_gate_up: JointOption = None,
    gauge_fixed: GaugeOption = None,
    factor_dtype: FactorDtypeOption = None,
    num_bases: BasesOption = 1,
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Print ranks, kept columns and costs before and after. No weight is read.

    The quality preset's ranks and columns depend on calibration; here stand equal ranks and a share of columns that fits,
    and what comes out has the same size.
    """
    from d2moe_ext.config import CompressionConfig

    config = CompressionConfig(
        ratio=ratio,
        preset=preset,
        base_sparsity=base_sparsity,
        count=count,
        joint_gate_up=joint_gate_up,  # type: ignore[arg-type]  # None takes the preset's
        gauge_fixed=gauge_fixed,  # type: ignore[arg-type]
        factor_dtype=factor_dtype,  # type: ignore[arg-type]
        num_bases=num_bases,
    )
    plan = _plan(common.load_config(model, trust_remote_code), config, dtype, trust_remote_code)
    if as_json:
        common.print_json(plan)
    else:
        from d2moe_ext.report import plan_tables

        name = Path(model).name if Path(model).exists() else model
        common.stdout_console().print(plan_tables(plan, f"{name} at ratio {ratio}, counted as {count}"))


def _plan(config: PreTrainedConfig, compression: Any, dtype: common.Dtype, trust_remote_code: bool) -> dict[str, Any]:
    from d2moe_ext.budget import plan_compression
    from d2moe_ext.shapes import model_shapes

    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("CONFIG_OR_MODEL must be neither compressed nor quantized, got a quantization_config.")
    return plan_compression(model_shapes(common.meta_model(config, dtype, trust_remote_code)), compression).to_dict()
