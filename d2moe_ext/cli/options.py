"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2moe_ext.cli.common import Dtype
from d2moe_ext.config import Count, Decomposition, FactorDtype, Merge, Preset, Ranks

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A model's directory or its name on the hub.")]
RatioOption = Annotated[float, typer.Option(help="Parameters to remove, as a share of the whole model's.")]
PresetOption = Annotated[
    Preset, typer.Option(help="What lost least at equal bytes, or the paper's pipeline for quality or for speed; see below.")
]
SparsityOption = Annotated[
    float | None, typer.Option(help="The share of the base's columns to prune; quality compares several.")
]
CountOption = Annotated[
    Count, typer.Option(help="Count what the file holds, or as the paper does, without dynamically pruned columns.")
]
MergeOption = Annotated[Merge | None, typer.Option(help="What weighs the experts in their shared base.")]
DecompositionOption = Annotated[Decomposition | None, typer.Option(help="What the deltas' SVD is whitened with.")]
RanksOption = Annotated[Ranks | None, typer.Option(help="One share for every delta, or chosen across the whole model.")]
FoldOption = Annotated[bool | None, typer.Option("--fold/--no-fold", help="Let the deltas repair what pruning removed.")]
JointOption = Annotated[
    bool | None, typer.Option("--joint-gate-up/--separate-gate-up", help="One delta for gate and up together, or one each.")
]
GaugeOption = Annotated[
    bool | None,
    typer.Option("--gauge-fixed/--whole-factors", help="Leave an identity out of each stored V, or store factors whole."),
]
FactorDtypeOption = Annotated[
    FactorDtype | None, typer.Option(help="Store the deltas' factors in the model's dtype, or in eight bits.")
]
AlternationsOption = Annotated[int | None, typer.Option(help="How often bases are refitted to the truncated deltas.")]
DynamicPruningOption = Annotated[
    bool | None,
    typer.Option("--dynamic-pruning/--static-pruning", help="Prune half of the columns per batch, or all of them for good."),
]
SequentialOption = Annotated[
    bool | None,
    typer.Option("--sequential/--no-sequential", help="Fit each layer on what the compressed layers before it pass on."),
]
BasesOption = Annotated[int, typer.Option(help="Bases per projection.")]
CalibrationOption = Annotated[Path | None, typer.Option(help="A UTF-8 text file; without it, text that comes with Python.")]
SamplesOption = Annotated[int, typer.Option(help="Calibration windows, drawn at random.")]
SeqlenOption = Annotated[int | None, typer.Option(help="Tokens per window; without it 512, or what the model can take.")]
BatchSizeOption = Annotated[int, typer.Option(help="Calibration windows read at once.")]
SeedOption = Annotated[int, typer.Option(help="Chooses the windows.")]
OffloadOption = Annotated[
    Path | None, typer.Option(help="A new folder for the calibration's large sums, for models that fill the memory.")
]
DtypeOption = Annotated[Dtype, typer.Option(help="Load the weights as this; auto: as they are stored.")]
DeviceOption = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda or cuda:N.")]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run model code that comes with the model.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write.")]
