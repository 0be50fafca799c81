"""What the operators are meant to reach on a GPU, and whether they do."""

from __future__ import annotations

from collections.abc import Iterator

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
