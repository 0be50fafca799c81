"""The parts of the forward that have aims of their own: low-rank products, the sparse base, and what runs between products.

The first two are calls in which little else runs (:mod:`benchmarks.gpu.part_calls`); such a call is compared with its
reference, timed in a graph, and profiled for the time of the part's own kernels. Everything else is kernels of a whole forward,
whose times are a profile's; the profile itself becomes a row, too. A row of a part::

    part, shape, layer, tokens, case   what it is; layer is None for a call
    ceiling, bytes, flops              the rate that it is held against; the least that the part must move and multiply
    call_us, call_share                the whole call, and the share of it that the part takes at the ceiling
    floor_us                           of a call: the least time for both its bytes and its FLOPs
    own_us, own_share, own_each_us     the part's own kernels, together and one by one, as the profiler saw them
    own_note                           why they are not there
    over_all                           of pruned bases: the call's time over that on all channels
    contains                           what else the call runs
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.gpu.ceilings import floors_from
from benchmarks.gpu.moved import ACTIVATION, COMBINE, SORT, SUMS
from benchmarks.gpu.part_calls import KERNEL, LOW_RANK, RANKS, SPARSE_BASE, PartCall
from benchmarks.gpu.profiled import part_call
from benchmarks.gpu.profiles import Found, Subject, durations, summary
from benchmarks.gpu.timing import Stopwatch
from benchmarks.layer.shapes import layer_view
from benchmarks.performance.claims import counted
from d2moe_ext.bench.layer import FAILED, WRONG, failure, tolerance
from d2moe_ext.bench.timing import time_rounds

KIND, PROFILE = "part", "profile"
ROUNDS = 30
SHAPES = ("Mixtral-8x7B", "Qwen3-30B-A3B")
SPARSE_SHAPE, SPARSE_TOKENS = SHAPES[0], (1, 4, 16)
# Most telling first.
PROFILE_TOKENS = (64, 4096, 1, 16, 512)
PART_TOKENS = (64, 4096)
ROUTING, GATED, WEIGHTED, COMBINED = "routing", "gated activation", "gate-weighted sum for the base", "sum over experts"
_CEILINGS = {LOW_RANK: "bfloat16", SPARSE_BASE: "memory"}
PARTS = {SORT: (ROUTING, None), ACTIVATION: (GATED, "copy"), SUMS: (WEIGHTED, "copy"), COMBINE: (COMBINED, "copy")}

Row = dict[str, Any]
_NOT_A_CALL: Row = dict.fromkeys(("call_us", "call_share", "floor_us", "over_all", "contains"))
_NOT_PROFILED: Row = dict.fromkeys(("own_us", "own_share", "own_each_us", "own_note"))


def low_rank_subjects() -> list[Subject]:
    """Two shapes, each with factors about as thin and as thick as compressed layers have."""
    return [{"what": LOW_RANK, "shape": shape, "rank": rank} for shape in SHAPES for rank in RANKS]


def sparse_base_subjects() -> list[Subject]:
    """All channels, then half of them."""
    channels = layer_view(SPARSE_SHAPE).layout.hidden_size
    subject = {"what": SPARSE_BASE, "shape": SPARSE_SHAPE, "channels": channels}
    return [subject | {"tokens": tokens, "keep": keep} for tokens in SPARSE_TOKENS for keep in (channels, channels // 2)]


def layer_subjects(shape: str) -> list[Subject]:
    """A shape's forwards."""
    return [{"what": "layer", "shape": shape, "tokens": tokens} for tokens in PROFILE_TOKENS]


@torch.no_grad()
def measure_calls(subjects: Sequence[Subject], ceilings: Row, watch: Stopwatch) -> list[Row]:
    """A row for each of :func:`low_rank_subjects` or :func:`sparse_base_subjects`."""
    rows = [_measure_call(subject, ceilings, watch) for subject in subjects]
    _compare_with_all_channels(rows)
    profiles = watch.profile(subjects)
    for row, subject in zip(rows, subjects, strict=True):
        own, launches = row.pop("own_launches", 0), row.pop("launches", 0)
        found = next((found for found in profiles if found["subject"] == subject), None)
        if row["note"] is None:
            row |= _own_kernels(found, own, launches)
            _add_own_share(row, ceilings)
    return rows


def _measure_call(subject: Subject, ceilings: Row, watch: Stopwatch) -> Row:
    about = {"part": subject["what"], "shape": subject["shape"], "layer": None, "ceiling": _CEILINGS[subject["what"]]}
    row: Row = (
        dict.fromkeys(("tokens", "case", "note"))
        | _NOT_A_CALL
        | _NOT_PROFILED
        | about
        | {name: value for name, value in subject.items() if name != "what"}
    )
    try:
        _add_call(row, part_call(subject, watch.device), ceilings, watch)
    except RuntimeError as error:
        row["note"] = failure(error)  # the others' memory may suffice
    _release(watch)
    return row


def _add_call(row: Row, call: PartCall, ceilings: Row, watch: Stopwatch) -> None:
    row |= _sizes(call) | {"contains": call.contains, "own_launches": call.own, "launches": call.launches}
    row |= _time_call(call, row["ceiling"], ceilings, watch)


def _sizes(call: PartCall) -> Row:
    tokens, inputs = call.arguments["hidden_states"].shape
    outputs, keep = call.arguments["gate_up_base"].shape[1], call.arguments["gate_up_keep"]
    if not call.arguments["delta_rank"]:
        case = f"{counted(tokens)}, {keep:,} of {inputs:,} channels, {outputs:,} outputs"
        return {"tokens": tokens, "case": case}
    ranks, pairs = call.arguments["delta_rank"][0], call.arguments["top_k_index"].numel()
    case = f"{pairs:,} pairs, {inputs:,} inputs, ranks {int(ranks.min())} to {int(ranks.max())}, {outputs:,} outputs"
    return {"tokens": tokens, "case": case, "pairs": pairs}


def _time_call(call: PartCall, ceiling: str, ceilings: Row, watch: Stopwatch) -> Row:
    """Not timed where its output is wrong."""
    row: Row = {"bytes": call.cost.bytes, "flops": call.cost.flops, "relative_error": call.error()}
    row["floor_us"] = 1e6 * floors_from(ceilings).floors.seconds(call.cost, "bfloat16")
    limit = tolerance(torch.bfloat16, call.dynamic)
    if not row["relative_error"] <= limit:
        return row | {"note": f"{WRONG}: differs from its reference by {row['relative_error']:.1e}, more than {limit:.1e}"}
    graph = watch.record([call.run])[0]
    times = time_rounds({"": lambda _: graph()}, [None], ROUNDS, watch.flush, seconds_of=watch.queued)[""]
    seconds = statistics.median(times)
    share = _amount(row, ceiling) / _rate(ceiling, ceilings) / seconds
    return row | {"call_us": 1e6 * seconds, "call_share": share, "rounds": len(times)}


def _amount(row: Row, ceiling: str) -> float:
    return float(row["flops"] if ceiling == "bfloat16" else row["bytes"])


def _rate(ceiling: str, ceilings: Row) -> float:
    """Memory is held against the faster of copying and reading, as floors are."""
    return floors_from(ceilings).floors.bandwidth if ceiling == "memory" else float(ceilings[ceiling])


def _own_kernels(found: Found | None, count: int, launches: int) -> Row:
    """The first ``count`` of the ``launches`` of a call's products."""
    if found is None or found["note"] is not None:
        return {"own_note": f"{FAILED}: not profiled" if found is None else found["note"]}
    runs = durations(found, KERNEL)
    if any(len(call) != launches for call in runs):
        return {"own_note": f"{FAILED}: {KERNEL} ran {len(runs[0])} times a call in the profile, not {launches}"}
    each = [statistics.median(call[place] for call in runs) for place in range(count)]
    return {"own_us": statistics.median(sum(call[:count]) for call in runs), "own_each_us": each}


def _add_own_share(row: Row, ceilings: Row) -> None:
    if row["own_us"] and row["ceiling"] is not None:
        row["own_share"] = _amount(row, row["ceiling"]) / _rate(row["ceiling"], ceilings) / (row["own_us"] / 1e6)


def _compare_with_all_channels(rows: list[Row]) -> None:
    """Of the same tokens; a pruned call of which there is no time has no ratio."""
    sparse = [row for row in rows if row["part"] == SPARSE_BASE and row["call_us"] is not None]
    whole = {row["tokens"]: row["call_us"] for row in sparse if row["keep"] == row["channels"]}
    for row in sparse:
        if row["keep"] < row["channels"] and row["tokens"] in whole:
            row["over_all"] = row["call_us"] / whole[row["tokens"]]


def measure_profiles(shape: str, ceilings: Row, watch: Stopwatch) -> list[Row]:
    """For each number of tokens and layer a row of the profile, and of every part that is some kernel's."""
    rows: list[Row] = []
    _release(watch)
    for found in watch.profile(layer_subjects(shape)):
        about = {"shape": shape, "tokens": found["subject"]["tokens"], "layer": found["layer"], "note": found["note"]}
        rows.append({"table": PROFILE} | about)
        if found["note"] is not None:
            continue
        rows[-1] |= summary(found["calls"])
        if about["tokens"] in PART_TOKENS:
            rows += [_kernel_row(kernel, found, ceilings, about) for kernel in PARTS if kernel in found["moved"]]
    return rows


def _kernel_row(kernel: str, found: Found, ceilings: Row, about: Row) -> Row:
    """One kernel of a forward: the median over calls, in which it runs once."""
    part, ceiling = PARTS[kernel]
    row = {"table": KIND, "part": part, "case": kernel, "ceiling": ceiling, "bytes": found["moved"][kernel], "flops": 0}
    row |= about | _NOT_A_CALL | _NOT_PROFILED
    times = [time for call in durations(found, kernel) for time in call]
    if not times:
        return row | {"own_note": f"{FAILED}: no kernel of this name in the profile"}
    row["own_us"] = statistics.median(times)
    _add_own_share(row, ceilings)
    return row


def _release(watch: Stopwatch) -> None:
    """Give back the memory of what is gone, a graph's among it."""
    gc.collect()
    if watch.device == "cuda":
        torch.cuda.empty_cache()
