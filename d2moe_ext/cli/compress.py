"""``d2moe compress``: calibrate, compress, save."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2moe_ext.cli import common
from d2moe_ext.cli.options import (
    AlternationsOption,
    BasesOption,
    BatchSizeOption,
    CalibrationOption,
    CountOption,
    DecompositionOption,
    DeviceOption,
    DtypeOption,
    DynamicPruningOption,
    FactorDtypeOption,
    FoldOption,
    GaugeOption,
    JointOption,
    JsonOption,
    MergeOption,
    ModelArgument,
    OffloadOption,
    OutArgument,
    PresetOption,
    RanksOption,
    RatioOption,
    SamplesOption,
    SeedOption,
    SeqlenOption,
    SequentialOption,
    SparsityOption,
    TrustOption,
)
from d2moe_ext.cli.output import check_output, complete_directory

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from d2moe_ext.compress import CompressionReport
    from d2moe_ext.config import CompressionConfig

REPORT_NAME = "d2moe_report.json"
_DEFAULT_SEQLEN = 512


def compress_command(
    model: ModelArgument,
    out: OutArgument,
    ratio: RatioOption,
    preset: PresetOption = "quality",
    base_sparsity: SparsityOption = None,
    calibration: CalibrationOption = None,
    samples: SamplesOption = 128,
    seqlen: SeqlenOption = None,
    batch_size: BatchSizeOption = 8,
    seed: SeedOption = 0,
    count: CountOption = "stored",
    merge: MergeOption = None,
    decomposition: DecompositionOption = None,
    ranks: RanksOption = None,
    fold: FoldOption = None,
    joint_gate_up: JointOption = None,
    gauge_fixed: GaugeOption = None,
    factor_dtype: FactorDtypeOption = None,
    alternations: AlternationsOption = None,
    dynamic_pruning: DynamicPruningOption = None,
    sequential: SequentialOption = None,
    num_bases: BasesOption = 1,
    offload_folder: OffloadOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    trust_remote_code: TrustOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it holds anything.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compress MODEL into the directory OUT, which appears complete or not at all.

    Presets: quality whitens deltas from both sides, gives columns and ranks where they count most, and fits bases and
    deltas to each other. performance and throughput are the paper's pipeline with 10 % and 60 % of the base's columns
    pruned. The options below change single choices of a preset.
    """
    from d2moe_ext.config import CompressionConfig

    # What is not given is the preset's.
    changed: dict[str, Any] = {
        "merge": merge,
        "decomposition": decomposition,
        "ranks": ranks,
        "fold": fold,
        "joint_gate_up": joint_gate_up,
        "gauge_fixed": gauge_fixed,
        "factor_dtype": factor_dtype,
        "alternations": alternations,
        "dynamic_pruning": dynamic_pruning,
        "sequential": sequential,
    }
    config = CompressionConfig(
        ratio=ratio,
        preset=preset,
        base_sparsity=base_sparsity,
        count=count,
        num_bases=num_bases,
        **{option: value for option, value in changed.items() if value is not None},
    )
    text = None if calibration is None else common.read_text("--calibration", calibration)
    common.check_model(model)
    out = out.expanduser().resolve()
    check_output(out, overwrite, model)
    with complete_directory(out) as partial, common.progress_bar() as progress:
        network = common.load_model(model, dtype, trust_remote_code, device)
        tokenizer = common.load_tokenizer(model, trust_remote_code)
        _check_reachable(network, config)
        window = common.default_seqlen(network.config, _DEFAULT_SEQLEN) if seqlen is None else seqlen
        common.check_seqlen("--seqlen", window, network.config)
        tokens = common.token_stream(tokenizer, _default_text() if text is None else text)
        batches = common.calibration_batches(tokens, samples, window, batch_size, seed)
        report = _compress(network, batches, config, offload_folder, progress)
        source = "python" if calibration is None else str(calibration)
        settings = {"text": source, "samples": samples, "seqlen": window, "seed": seed}
        record = _save(network, tokenizer, report, partial, {"model": model, "calibration": settings})
    if as_json:
        common.print_json(record)
    else:
        from d2moe_ext.report import compression_tables

        common.stdout_console().print(compression_tables(record, str(out)))


def _default_text() -> str:
    from d2moe_ext.text import python_text

    return python_text("calibration")


def _check_reachable(network: PreTrainedModel, config: CompressionConfig) -> None:
    """Refuse, before minutes of calibration, what compression would refuse after them."""
    from d2moe_ext.budget import plan_compression
    from d2moe_ext.shapes import model_shapes

    if getattr(network.config, "quantization_config", None) is not None:
        raise ValueError("MODEL must be neither compressed nor quantized, got a quantization_config.")
    plan_compression(model_shapes(network), config)


def _compress(
    network: PreTrainedModel,
    batches: list[Tensor],
    config: CompressionConfig,
    offload_folder: Path | None,
    progress: common.ProgressCallback,
) -> CompressionReport:
    from d2moe_ext import hf
    from d2moe_ext.calibration import calibrate

    stats = calibrate(
        network,
        batches,
        merge=config.merge,
        num_bases=config.num_bases,
        left_gram="diagonal" if config.decomposition == "two_sided" else None,
        offload_folder=offload_folder,
        progress=progress,
    )
    return hf.compress(network, stats, config, progress=progress, batches=batches)


def _save(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    report: CompressionReport,
    directory: Path,
    inputs: dict[str, Any],
) -> dict[str, Any]:
    """Write model, tokenizer and report; return the report with what the file came to."""
    network.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    record = inputs | report.to_dict()
    record["bytes_on_disk"] = common.weight_bytes(directory)
    record["raised_ridges"] = [
        {"layer": layer, "projection": name, "expert": expert, "ridge": ridge}
        for layer, name, expert, ridge in report.raised_ridges
    ]
    (directory / REPORT_NAME).write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return record
