"""The parts of the paper's own study that the package has no option for: each row changes one part of its pipeline."""

from benchmarks.quality.package_methods import paper_method
from benchmarks.quality.variants.bases import regmean, ties, truncated_svd
from benchmarks.quality.variants.deltas import ColumnPruning, SharedFactors
from benchmarks.quality.variants.pipeline import PAPER_SPARSITY, Pipeline
from benchmarks.quality.variants.shares import by_sensitivity, trim
from benchmarks.study import Method

PAPER_VARIANTS: dict[str, Method] = {
    "merge: TIES": Pipeline(merge=ties),
    "merge: RegMean": Pipeline(merge=regmean),
    "base: truncated SVD": Pipeline(base=truncated_svd(PAPER_SPARSITY)),
    # Fewer columns are stored than where half of them are pruned per batch, so the deltas get more.
    "base: static": paper_method(dynamic_pruning=False),
    "base: unpruned": paper_method(base_sparsity=0.0),
    "delta: magnitude pruning": Pipeline(delta=ColumnPruning()),
    **{f"split: s = {sparsity}": paper_method(base_sparsity=sparsity) for sparsity in (0.2, 0.4, 0.6, 0.8)},
    **{f"trim: {count}": Pipeline(weights=trim(count)) for count in (1, 2, 4, 6)},
    "factors: shared V": Pipeline(delta=SharedFactors(shared_v=True, merged_u=False)),
    "factors: merged U": Pipeline(delta=SharedFactors(shared_v=False, merged_u=True)),
    "factors: shared V, merged U": Pipeline(delta=SharedFactors(shared_v=True, merged_u=True)),
    "layers: adaptive": Pipeline(weights=by_sensitivity),
}
