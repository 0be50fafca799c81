"""Rival compressors of MoE layers, each written from its paper and none of them trained.

Every one is a ``Method`` of :mod:`benchmarks.study`: it changes a float32 copy of the model in place and returns its stored
bytes. Those that prune or merge whole experts need a router that holds ``weight [E, H]`` and nothing else.
"""

from benchmarks.baselines.hc_smoe import hc_smoe
from benchmarks.baselines.mc_smoe import mc_smoe
from benchmarks.baselines.mobe import mobe
from benchmarks.baselines.moe_i2 import moe_i2
from benchmarks.baselines.naee import naee
from benchmarks.baselines.reap import reap
from benchmarks.baselines.svd_llm import svd_llm
from benchmarks.study import Method

BASELINES: dict[str, Method] = {
    "naee": naee,
    "reap": reap,
    "hc_smoe": hc_smoe,
    "mc_smoe": mc_smoe,
    "svd_llm": svd_llm,
    "moe_i2": moe_i2,
    "mobe": mobe,
}
