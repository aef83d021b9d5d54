"""Figures of many outcomes. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.load.client import Outcome


@dataclass(frozen=True)
class Quantiles:
    """Of `num` values, in seconds; all 0 where there are none."""

    num: int
    p50: float
    p90: float
    p99: float
    max: float

    def __str__(self) -> str:
        if not self.num:
            return "none"
        return f"{self.p50:.3f} / {self.p90:.3f} / {self.p99:.3f}"


@dataclass(frozen=True)
class Summary:
    """`good` requests were complete and within both targets; `goodput_per_s` counts them per second.

    ITL is over all gaps of all complete requests; a request keeps the target when its mean gap does.
    """

    num_sent: int
    num_complete: int
    num_good: int
    goodput_per_s: float
    ttft_s: Quantiles
    itl_s: Quantiles
    tpot_s: Quantiles
    statuses: dict[str, int]
    errors: dict[str, int]
    client_late_s: Quantiles


@dataclass(frozen=True)
class Targets:
    """What users are to see, in seconds."""

    ttft_s: float
    tpot_s: float

    def are_met_by(self, outcome: Outcome) -> bool:
        if not outcome.is_complete or outcome.ttft_s is None:
            return False
        return outcome.ttft_s <= self.ttft_s and tpot_s(outcome) <= self.tpot_s


def tpot_s(outcome: Outcome) -> float:
    """Mean seconds per token after the first; 0 where there is only one."""
    times, num_tokens = outcome.event_times_s, len(outcome.token_ids)
    return (times[-1] - times[0]) / (num_tokens - 1) if num_tokens > 1 else 0.0


def summarize(outcomes: Sequence[Outcome], targets: Targets, duration_s: float) -> Summary:
    """`duration_s`: over which the requests were sent."""
    complete = [outcome for outcome in outcomes if outcome.is_complete]
    num_good = sum(targets.are_met_by(outcome) for outcome in complete)
    failed = [outcome for outcome in outcomes if outcome.error and outcome.status != 429]
    return Summary(
        num_sent=len(outcomes),
        num_complete=len(complete),
        num_good=num_good,
        goodput_per_s=round(num_good / duration_s, 3),
        ttft_s=quantiles(outcome.ttft_s for outcome in complete if outcome.ttft_s is not None),
        itl_s=quantiles(gap for outcome in complete for gap in outcome.itls_s),
        tpot_s=quantiles(tpot_s(outcome) for outcome in complete),
        statuses=dict(Counter(str(outcome.status) for outcome in outcomes)),
        errors=dict(Counter(str(outcome.error) for outcome in failed)),
        client_late_s=quantiles(outcome.late_s for outcome in outcomes),
    )


def quantiles(values: Iterable[float]) -> Quantiles:
    """The value that so many of a hundred do not exceed (nearest rank)."""
    ordered = sorted(values)
    if not ordered:
        return Quantiles(0, 0.0, 0.0, 0.0, 0.0)

    def rank(percent: int) -> float:
        return round(ordered[-(-percent * len(ordered) // 100) - 1], 4)

    return Quantiles(len(ordered), rank(50), rank(90), rank(99), round(ordered[-1], 4))
