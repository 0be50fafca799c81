"""``python -m benchmarks.bench_model``: whole models, loaded and run by transformers and by this package.

    python -m benchmarks.bench_model --write build/performance/results/model.json
    python -m benchmarks.bench_model --model shipped --contender eager --contender quality --json

Contenders: transformers' experts implementations; the same weights through this package's operators; and models compressed
at ratios 0.4 and 0.6. The large model's weights are random, and so are its compressed versions': a time does not depend on
them, and calibrating them would mean nothing. It takes about 10 GB of the temporary folder ($TMPDIR), and 8 GB of memory.
"""

from __future__ import annotations

import sys

from benchmarks.model.command import main

if __name__ == "__main__":
    sys.exit(main())
