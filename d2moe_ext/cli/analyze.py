"""``d2moe analyze``: diagnostics of a model, and what to compress it with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2moe_ext.cli import common
from d2moe_ext.cli.options import (
    BatchSizeOption,
    CalibrationOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    OffloadOption,
    SamplesOption,
    SeedOption,
    SeqlenOption,
    TrustOption,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_DEFAULT_SEQLEN = 512


def analyze_command(
    model: ModelArgument,
    calibration: CalibrationOption = None,
    samples: SamplesOption = 128,
    seqlen: SeqlenOption = None,
    batch_size: BatchSizeOption = 8,
    seed: SeedOption = 0,
    offload_folder: OffloadOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure how alike MODEL's experts are and how fast their spectra fall; recommend bases, ratio and preset."""
    text = None if calibration is None else common.read_text("--calibration", calibration)
    network = common.load_model(model, dtype, trust_remote_code, device)
    if getattr(network.config, "quantization_config", None) is not None:
        raise ValueError("MODEL must be neither compressed nor quantized, got a quantization_config.")
    window = common.default_seqlen(network.config, _DEFAULT_SEQLEN) if seqlen is None else seqlen
    common.check_seqlen("--seqlen", window, network.config)
    if text is None:
        from d2moe_ext.text import python_text

        text = python_text("calibration")
    tokens = common.token_stream(common.load_tokenizer(model, trust_remote_code), text)
    batches = common.calibration_batches(tokens, samples, window, batch_size, seed)
    source = "python" if calibration is None else str(calibration)
    record = {"model": model, "calibration": {"text": source, "samples": samples, "seqlen": window, "seed": seed}}
    record |= _analyze(network, batches, offload_folder)
    if as_json:
        common.print_json(record)
    else:
        from d2moe_ext.report_analysis import analysis_tables

        common.stdout_console().print(analysis_tables(record))


def _analyze(network: PreTrainedModel, batches: list[Tensor], offload_folder: Path | None) -> dict[str, Any]:
    from d2moe_ext.advice import advise
    from d2moe_ext.analysis import analyze_layers
    from d2moe_ext.calibration import calibrate
    from d2moe_ext.shapes import model_shapes

    with common.progress_bar() as progress:
        # Bases are plain means here, so the forward pass alone will do.
        stats = calibrate(network, batches, merge="mean", left_gram=None, offload_folder=offload_folder, progress=progress)
        layers = analyze_layers(network, stats, progress)
    advice = advise(layers, model_shapes(network))
    return {"layers": [layer.to_dict() for layer in layers], "advice": advice.to_dict()}
