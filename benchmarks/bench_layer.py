"""``python -m benchmarks.bench_layer``: one MoE layer at the shapes of published models, held against what the machine can do.

    python -m benchmarks.bench_layer --write build/performance/results/layer.json
    python -m benchmarks.bench_layer --shape Qwen3-30B-A3B --dtype bfloat16 --tokens 1 --contender eager --contender throughput
    python -m benchmarks.bench_layer --growth --json

Contenders: transformers' experts implementations; the paper's loop over experts on compressed layers; this package's
operators, uncompressed, and compressed at ratios 0.4 and 0.6 by each preset, with dynamic pruning and without.
"""

from __future__ import annotations

import sys

from benchmarks.layer.command import main

if __name__ == "__main__":
    sys.exit(main())
