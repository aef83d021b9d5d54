"""Rows, and the table on the terminal. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.overlap.measure import Sample
from benchmarks.overlap.setups import SETUPS, Setup
from flowkv_common.wire.messages import KVTransferred


@dataclass(frozen=True)
class Spread:
    """Of all repeats, in ms."""

    median: float
    min: float
    max: float

    def __str__(self) -> str:
        return f"{self.median:.0f} ({self.min:.0f}-{self.max:.0f})"


@dataclass(frozen=True)
class Moved:
    """What one request sent: medians over the repeats."""

    num_bytes: int
    num_copies: float
    num_calls: float
    total_ms: Spread
    hidden_ms: Spread
    exposed_ms: Spread


@dataclass(frozen=True)
class Row:
    """One setup and prompt length. `moved` is missing where prefill and decode are one node."""

    setup: str
    num_tokens: int
    num_repeats: int
    first_token_ms: Spread
    second_token_ms: Spread
    moved: Moved | None


def rows_of(setup: Setup, samples: Sequence[Sample]) -> list[Row]:
    """One row for each prompt length, in the order of `samples`."""
    lengths = dict.fromkeys(sample.num_tokens for sample in samples)
    return [_row(setup, [each for each in samples if each.num_tokens == length]) for length in lengths]


def _row(setup: Setup, samples: Sequence[Sample]) -> Row:
    events = [sample.transferred for sample in samples if sample.transferred]
    return Row(
        setup=setup.name,
        num_tokens=samples[0].num_tokens,
        num_repeats=len(samples),
        first_token_ms=_spread(sample.first_s for sample in samples),
        second_token_ms=_spread(sample.second_s for sample in samples),
        moved=_moved(events) if events else None,
    )


def _moved(events: Sequence[KVTransferred]) -> Moved:
    return Moved(
        num_bytes=events[0].num_bytes,
        num_copies=statistics.median(event.num_copies for event in events),
        num_calls=statistics.median(event.num_calls for event in events),
        total_ms=_spread(event.total_s for event in events),
        hidden_ms=_spread(event.hidden_s for event in events),
        exposed_ms=_spread(event.exposed_s for event in events),
    )


def _spread(seconds: Iterable[float]) -> Spread:
    ms = [1e3 * second for second in seconds]
    return Spread(*(round(figure, 3) for figure in (statistics.median(ms), min(ms), max(ms))))


def table(rows: Sequence[Row]) -> str:
    """Times to the second token beside each other, then what the transfers took."""
    by_key = {(row.setup, row.num_tokens): row for row in rows}
    setups = [setup for setup in SETUPS if any(row.setup == setup.name for row in rows)]
    lengths = list(dict.fromkeys(row.num_tokens for row in rows))

    def lines(title: str, setups: Sequence[Setup], cell: Callable[[Row], str]) -> list[str]:
        head = f"{title:>7}" + "".join(f"{setup.title:>26}" for setup in setups)
        body = [
            f"{length:>7}" + "".join(f"{cell(by_key[setup.name, length]):>26}" for setup in setups)
            for length in lengths
        ]
        return [head, *body]

    splits = [setup for setup in setups if setup.hands_over]
    return "\n".join(
        [
            "time to the second token, ms: median (min-max)",
            *lines("tokens", setups, lambda row: str(row.second_token_ms)),
            "",
            "the transfer: MB, copies, hidden ms + exposed ms (medians)",
            *lines("tokens", splits, _transfer_cell),
        ]
    )


def _transfer_cell(row: Row) -> str:
    moved = row.moved
    if moved is None:
        return "-"
    times = f"{moved.hidden_ms.median:.1f} + {moved.exposed_ms.median:.1f}"
    return f"{moved.num_bytes / 1e6:.0f}, {moved.num_copies:.0f}, {times}"
