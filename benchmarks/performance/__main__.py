"""``python -m benchmarks.performance``: write the page of times from saved results."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.performance.page import write_page
from benchmarks.performance.records import read_records
from d2moe_ext.cli import BAD_INPUT

DEFAULT_RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """Run the command and return its exit code: 2 and one sentence for results that cannot stand on one page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.performance", description="Write the page of times.")
    parser.add_argument("--results", type=Path, default=DEFAULT_RESULTS, help="the folder of the saved results")
    parser.add_argument("--write", type=Path, default=Path("docs/performance.md"), help="the page")
    arguments = parser.parse_args()
    try:
        records = read_records(arguments.results)
        if not records:
            raise ValueError(f"--results must be a folder with saved results, got {arguments.results.name!r} without one.")
        write_page(records, arguments.write)
    except (ValueError, OSError) as error:
        print(f"performance: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
