"""What the operators are meant to reach on a GPU, and whether they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.performance.claims import Verdict, counted
from benchmarks.performance.records import Row
from d2moe_ext.bench.layer import wrong_rows

# Of the rate that an operator is held against.
SHARES = {"gram_update_": 0.60, "fisher_merge_": 0.80, "column_select": 0.70}
# Microseconds of one that is held against none.
MICROSECONDS = {"column_select": 15.0}
# Over torch.linalg.svd of the same matrices, one after the other; a truncation that is worse than theirs is not timed.
SPEEDUPS = {"whitened_svd": 10.0}

MIXTRAL, QWEN3 = "Mixtral-8x7B", "Qwen3-30B-A3B"
# By shape, layer and tokens: the least ratio to the best of transformers' contenders.
SPEEDS = {
    MIXTRAL: {
        "throughput 0.6": {1: 1.5, 64: 1.7, 4096: 1.3},
        "performance 0.6": {1: 1.15, 64: 1.7, 4096: 1.0},
    },
    QWEN3: {"throughput 0.6": {1: 1.3, 64: 1.7, 4096: 1.5}},
}
PLAIN, PLAIN_SLOWER = "plain", 0.05
DECODE_SHARE = 0.75

# Of the parts of a forward. What is moved between products is held against copying only where it exceeds the caches.
SORT_TOKENS, SORT_MICROSECONDS, UNSORTED_TOKENS = 64, 10.0, 4
LOW_RANK_SHARE, LOW_RANK_PAIRS, LOW_RANK_LEAST = 0.60, 8192, 256
SPARSE_SHARE, SPARSE_TOKENS, SPARSE_HALF = 0.75, 16, 0.6
MOVING_SHARE, MOVING_TOKENS = 0.80, 4096
MOVING_PARTS = ("gated activation", "gate-weighted sum for the base", "sum over experts")


@dataclass(frozen=True)
class PartAim:
    """What rows of parts are meant to reach.

    Attributes:
        claim: in words.
        judged: which rows are.
        score: what a row reached over what it is meant to, from 1 on where it does; None where it was not measured.
        shown: what it reached.
    """

    claim: str
    judged: Callable[[Row], bool]
    score: Callable[[Row], float | None]
    shown: Callable[[Row], str]


def _low_rank_share(row: Row) -> float | None:
    """Of the products' own kernels: the call around them writes more than they do."""
    share: float | None = row["own_share"] if row["own_share"] is not None else row["call_share"]
    return share


def _over(value: float | None, limit: float) -> float | None:
    return None if value is None else value / limit


def _under(value: float | None, limit: float) -> float | None:
    return None if not value else limit / value


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _moving_aim(part: str) -> PartAim:
    return PartAim(
        f"{part}, {counted(MOVING_TOKENS)}: at least {MOVING_SHARE:.0%} of the copy bandwidth",
        lambda row: row["part"] == part and row["tokens"] == MOVING_TOKENS,
        lambda row: _over(row["own_share"], MOVING_SHARE),
        lambda row: _percent(row["own_share"]),
    )


PART_AIMS = (
    PartAim(
        f"routing, {counted(SORT_TOKENS)}: sorted in at most {SORT_MICROSECONDS:g} µs",
        lambda row: row["part"] == "routing" and row["tokens"] == SORT_TOKENS,
        lambda row: _under(row["own_us"], SORT_MICROSECONDS),
        lambda row: f"{row['own_us']:.1f} µs",
    ),
    PartAim(
        f"low-rank products, {LOW_RANK_PAIRS:,} pairs, ranks about {LOW_RANK_LEAST} and more: "
        f"at least {LOW_RANK_SHARE:.0%} of the rate of products in bfloat16",
        lambda row: (
            row["part"] == "low-rank products"
            and row["rank"] >= LOW_RANK_LEAST
            and row.get("pairs", LOW_RANK_PAIRS) >= LOW_RANK_PAIRS
        ),
        lambda row: _over(_low_rank_share(row), LOW_RANK_SHARE),
        lambda row: _percent(_low_rank_share(row) or 0.0) + ("" if row["own_share"] is not None else " of the whole call"),
    ),
    PartAim(
        f"sparse base, at most {counted(SPARSE_TOKENS)}: at least {SPARSE_SHARE:.0%} of the bandwidth",
        lambda row: row["part"] == "sparse base" and row["tokens"] is not None and row["tokens"] <= SPARSE_TOKENS,
        lambda row: _over(row["call_share"], SPARSE_SHARE),
        lambda row: _percent(row["call_share"]),
    ),
    PartAim(
        f"sparse base, half of the channels: at most {SPARSE_HALF:g} times the time of all",
        lambda row: row["part"] == "sparse base" and 2 * row["keep"] == row["channels"],
        lambda row: _under(row["over_all"], SPARSE_HALF),
        lambda row: f"{row['over_all']:.2f} times",
    ),
    *map(_moving_aim, MOVING_PARTS),
)


def part_verdicts(rows: list[Row], profiles: list[Row]) -> list[Verdict]:
    """Every claim on parts that the measured rows allow to judge.

    Args:
        rows: of parts.
        profiles: of forwards, which tell where nothing was sorted.
    """
    verdicts = [
        _part_verdict(aim, shape, found)
        for aim in PART_AIMS
        for shape in _shapes(rows)
        if (found := [row for row in rows if row["shape"] == shape and aim.judged(row)])
    ]
    return verdicts + list(_unsorted([row for row in profiles if row["note"] is None and row["tokens"] <= UNSORTED_TOKENS]))


def _part_verdict(aim: PartAim, shape: str, rows: list[Row]) -> Verdict:
    scores = [aim.score(row) or 0.0 for row in rows]
    reached, place = sum(score >= 1 for score in scores), scores.index(min(scores))
    worst = rows[place]
    shown = "not measured" if scores[place] == 0.0 else aim.shown(worst)
    where = ", ".join(filter(None, (worst["layer"], worst["case"])))
    return Verdict(aim.claim, shape, f"{reached} of {len(rows)}; farthest {shown} ({where})", reached == len(rows))


def _unsorted(profiles: list[Row]) -> Iterator[Verdict]:
    for shape in _shapes(profiles):
        found = [row for row in profiles if row["shape"] == shape]
        sorting = [row["layer"] for row in found if any("sort_rows" in kernel["name"] for kernel in row["kernels"])]
        numbers = f"{len(found) - len(sorting)} of {len(found)}" + "".join(f"; sorted: {layer}" for layer in sorting)
        yield Verdict(f"routing, at most {counted(UNSORTED_TOKENS)}: nothing is sorted", shape, numbers, not sorting)


def operator_aim(row: Row) -> tuple[str, bool]:
    """What an operator's row is meant to reach, and whether it does."""
    operator = row["operator"]
    if operator in SPEEDUPS:
        return f"at least {SPEEDUPS[operator]:g} times as fast as the loop", (row.get("speedup") or 0.0) >= SPEEDUPS[operator]
    if row["ceiling"] is not None:
        return f"at least {SHARES[operator]:.0%} of the ceiling", (row["share"] or 0.0) >= SHARES[operator]
    time = row["median_ms"]
    return f"at most {MICROSECONDS[operator]:g} µs", time is not None and 1e3 * time <= MICROSECONDS[operator]


def layer_verdicts(rows: list[Row]) -> list[Verdict]:
    """Every claim on layers that the measured rows allow to judge."""
    return [*_right(rows), *_speeds(rows), *_plain(rows), *_decode(rows)]


def _cell_of(rows: list[Row], shape: str, tokens: int) -> list[Row]:
    return [row for row in rows if (row["shape"], row["tokens"]) == (shape, tokens)]


def _shapes(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["shape"] for row in rows))


def fastest(rows: list[Row]) -> Row | None:
    """The row of the least time, whichever way it was run; None where none was timed."""
    return min((row for row in rows if row["median_ms"] is not None), key=lambda row: row["median_ms"], default=None)


def _best_hf(cell: list[Row]) -> Row | None:
    return fastest([row for row in cell if row["kind"] == "hf"])


def _ours(cell: list[Row], layer: str) -> list[Row]:
    """A layer as it runs when it is loaded: with pruning by the batch where its preset has that."""
    rows = [row for row in cell if row["kind"] == "native" and row["layer"] == layer]
    return [row for row in rows if row["dynamic"]] or rows


def _against_hf(cell: list[Row], layer: str) -> tuple[float, str]:
    """How many times as fast a layer is, and who was compared; 0 and why where it was not timed."""
    best, candidates = _best_hf(cell), _ours(cell, layer)
    ours = fastest(candidates)
    if ours is None or best is None:
        return 0.0, next((f"{row['contender']}: {row['note']}" for row in candidates if row["note"]), "not measured")
    ratio = best["median_ms"] / ours["median_ms"]
    return ratio, f"{ratio:.2f} ({ours['contender']} against {best['contender']})"


def _right(rows: list[Row]) -> Iterator[Verdict]:
    """A wrong output is not timed, so that no other claim would see it."""
    for shape in _shapes(rows):
        found = [row for row in rows if row["shape"] == shape]
        wrong = [f"{row['contender']}, {counted(row['tokens'])}" for row in wrong_rows(found)]
        numbers = "; ".join(wrong) or f"{sum(row['relative_error'] is not None for row in found)} compared"
        yield Verdict("every output is its reference's, but for rounding", shape, numbers, not wrong)


def _speeds(rows: list[Row]) -> Iterator[Verdict]:
    for shape, layers in SPEEDS.items():
        for layer, least in layers.items():
            for tokens, speed in least.items():
                cell = _cell_of(rows, shape, tokens)
                if cell:
                    ratio, numbers = _against_hf(cell, layer)
                    claim = f"{counted(tokens)}, {layer}: at least {speed:g} times as fast as the best HF contender"
                    yield Verdict(claim, shape, numbers, ratio >= speed)


def _plain(rows: list[Row]) -> Iterator[Verdict]:
    least = 1 / (1 + PLAIN_SLOWER)
    for shape in _shapes(rows):
        sizes = sorted({row["tokens"] for row in rows if row["shape"] == shape})
        found = {tokens: _against_hf(_cell_of(rows, shape, tokens), PLAIN) for tokens in sizes}
        worst = min(found, key=lambda tokens: found[tokens][0])
        reached = sum(ratio >= least for ratio, _ in found.values())
        numbers = f"{reached} of {len(found)}; least {found[worst][1]}, {counted(worst)}"
        claim = f"uncompressed: at most {PLAIN_SLOWER:.0%} slower than the best HF contender"
        yield Verdict(claim, shape, numbers, reached == len(found))


def _decode(rows: list[Row]) -> Iterator[Verdict]:
    """Every layer by the faster of its ways, with and without pruning by the batch."""
    cell = [row for row in _cell_of(rows, MIXTRAL, 1) if row["kind"] == "native"]
    kinds = dict.fromkeys((row["layer"], row["dynamic"]) for row in cell)
    ways = [[row for row in cell if (row["layer"], row["dynamic"]) == kind] for kind in kinds]
    if not ways:
        return
    shares = {way[0]["contender"]: (fastest(way) or {"share_of_floor": 0.0})["share_of_floor"] for way in ways}
    worst = min(shares, key=lambda name: shares[name])
    reached = sum(share >= DECODE_SHARE for share in shares.values())
    numbers = f"{reached} of {len(shares)}; least {shares[worst]:.2f} ({worst})"
    yield Verdict(f"1 token: time at most floor / {DECODE_SHARE}", MIXTRAL, numbers, reached == len(shares))
