"""What the operators were meant to reach, and whether they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.performance.records import Row
from d2moe_ext.bench.layer import wrong_rows

# Tokens: the share of the floor that a forward should reach.
SHARES = {1: 0.75, 64: 0.75, 2048: 0.70}
DTYPE = "bfloat16"
SAVED = 0.8
PROMISED = 1.2
PLAIN_LEAST = 0.97
# On Mixtral-8x7B, one token: by layer, the least ratio to the best of transformers' contenders.
MIXTRAL = "Mixtral-8x7B"
SPEEDS = {"plain": 2.0, "throughput 0.6": 4.0}


@dataclass(frozen=True)
class Verdict:
    """One line of the page: a claim on one shape."""

    claim: str
    shape: str
    numbers: str
    holds: bool


def counted(tokens: int) -> str:
    """``1 token``, ``2,048 tokens``."""
    return f"{tokens:,} token" + ("s" if tokens > 1 else "")


def all_verdicts(rows: list[Row]) -> list[Verdict]:
    """Every claim that the measured rows allow to judge, shape by shape."""
    ours = [row for row in rows if row["kind"] == "native" and row["median_ms"] is not None]
    verdicts = list(_right(rows))
    for tokens, share in SHARES.items():
        verdicts += _shares(ours, tokens, share)
    verdicts += _speeds(ours)
    verdicts += _savings(ours)
    verdicts += _where_floors_promise(ours, rows)
    verdicts += _plain(ours)
    return verdicts


def _by_shape(rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    for shape in dict.fromkeys(row["shape"] for row in rows):
        yield shape, [row for row in rows if row["shape"] == shape]


def _counted(rows: list[Row], value: Callable[[Row], float], least: float) -> tuple[str, bool]:
    """How many rows reach ``least``, and the one that is farthest from it."""
    worst = min(rows, key=value)
    reached = sum(value(row) >= least for row in rows)
    place = (
        "" if len({(row["dtype"], row["tokens"]) for row in rows}) == 1 else f", {worst['dtype']}, {counted(worst['tokens'])}"
    )
    return f"{reached} of {len(rows)}; least {value(worst):.2f} ({worst['contender']}{place})", reached == len(rows)


def _right(rows: list[Row]) -> Iterator[Verdict]:
    """A wrong output is not timed, so that no other claim would see it."""
    for shape, found in _by_shape(rows):
        wrong = [f"{row['contender']}, {row['dtype']}, {counted(row['tokens'])}" for row in wrong_rows(found)]
        numbers = "; ".join(wrong) or f"{sum(row['relative_error'] is not None for row in found)} compared"
        yield Verdict("every output is its reference's, but for rounding", shape, numbers, not wrong)


def _shares(ours: list[Row], tokens: int, share: float) -> Iterator[Verdict]:
    claim = f"{counted(tokens)}, {DTYPE}: time at most floor / {share:.2f}"
    chosen = [row for row in ours if row["tokens"] == tokens and row["dtype"] == DTYPE]
    for shape, rows in _by_shape(chosen):
        yield Verdict(claim, shape, *_counted(rows, lambda row: row["share_of_floor"], share))


def _speeds(ours: list[Row]) -> Iterator[Verdict]:
    for layer, least in SPEEDS.items():
        chosen = [
            row
            for row in ours
            if (row["shape"], row["dtype"], row["tokens"], row["layer"]) == (MIXTRAL, DTYPE, 1, layer)
            and row["speed_over_hf"] is not None
        ]
        if chosen:
            claim = f"1 token, {DTYPE}, {layer}: at least {least:g} times as fast as the best HF contender"
            yield Verdict(claim, MIXTRAL, *_counted(chosen, lambda row: row["speed_over_hf"], least))


def _savings(ours: list[Row]) -> Iterator[Verdict]:
    """Time that dynamic pruning saves over the time that the bytes it saves would take to read."""
    claim = f"1 token, {DTYPE}: dynamic pruning saves at least {SAVED:g} of the time of the bytes that it saves"
    chosen = [row for row in ours if row["tokens"] == 1 and row["dtype"] == DTYPE]
    for shape, rows in _by_shape(chosen):
        static = {row["layer"]: row for row in rows if not row["dynamic"]}
        shares = {}
        for row in rows:
            whole = static.get(row["layer"])
            if row["saved_ms"] is not None and whole is not None:
                promised = 1e3 * (whole["bytes"] - row["bytes"]) / row["bandwidth"]
                shares[row["layer"]] = row["saved_ms"] / promised
        if shares:
            listed = "; ".join(f"{layer}: {share:.2f}" for layer, share in shares.items())
            yield Verdict(claim, shape, listed, min(shares.values()) >= SAVED)


def _where_floors_promise(ours: list[Row], rows: list[Row]) -> Iterator[Verdict]:
    """Faster than transformers wherever the plain layer's floor is much higher."""
    claim = f"faster than the best HF contender wherever floors say at least {PROMISED:g} times"
    plain = {_cell(row): row["floor_ms"] for row in rows if row["kind"] == "hf"}
    chosen = [
        row for row in ours if row["speed_over_hf"] is not None and plain.get(_cell(row), 0.0) >= PROMISED * row["floor_ms"]
    ]
    for shape, found in _by_shape(chosen):
        yield Verdict(claim, shape, *_counted(found, lambda row: row["speed_over_hf"], 1.0))


def _plain(ours: list[Row]) -> Iterator[Verdict]:
    claim = f"uncompressed: never below {PLAIN_LEAST:g} times the best HF contender"
    chosen = [row for row in ours if row["layer"] == "plain" and row["speed_over_hf"] is not None]
    for shape, rows in _by_shape(chosen):
        yield Verdict(claim, shape, *_counted(rows, lambda row: row["speed_over_hf"], PLAIN_LEAST))


def _cell(row: Row) -> tuple[object, ...]:
    return tuple(row[key] for key in ("shape", "dtype", "tokens", "group"))
