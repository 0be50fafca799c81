"""The paper's pipeline with deltas taken against the pruned base: what most tests of the compressor's parts start from."""

from __future__ import annotations

from typing import Any

from d2moe_ext.config import CompressionConfig


def paper_config(ratio: float, **options: Any) -> CompressionConfig:
    return CompressionConfig(ratio, **({"preset": "performance", "fold": True} | options))
