"""What became of a load, as vLLM defines it (`vllm bench serve`): its figures can stand beside ours.

TTFT: from sending to the first token. ITL: between two events that bring tokens. TPOT: time after the first
token over the number of tokens after it. E2E: to the last token. Throughputs are over the time from the first
request to the last answer's end. Goodput counts complete requests within both targets.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from flowkv.bench.load import Outcome
from flowkv.bench.traces import Targets


class Distribution(msgspec.Struct, frozen=True):
    """Of `num` values, in milliseconds. Percentiles lie between two values where none is at their place."""

    num: int
    mean: float
    median: float
    p90: float
    p99: float
    max: float


class Figures(msgspec.Struct, frozen=True):
    duration_s: float
    num_sent: int
    num_complete: int
    requests_per_s: float
    good_requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    ttft_ms: Distribution
    tpot_ms: Distribution
    itl_ms: Distribution
    e2e_ms: Distribution
    statuses: dict[str, int]
    errors: dict[str, int]
    client_late_ms: Distribution  # by how much the client itself was late: its host was too busy


def figures_of(outcomes: Sequence[Outcome], targets: Targets) -> Figures:
    complete = [one for one in outcomes if one.is_complete]
    first = min((one.sent_s for one in outcomes), default=0.0)
    duration_s = max((one.sent_s + one.ended_s for one in outcomes), default=0.0) - first or 1e-9
    num_good = sum(targets.are_met(one.ttft_s, one.tpot_s) for one in complete)
    return Figures(
        duration_s=duration_s,
        num_sent=len(outcomes),
        num_complete=len(complete),
        requests_per_s=len(complete) / duration_s,
        good_requests_per_s=num_good / duration_s,
        input_tokens_per_s=sum(map(num_prompt_tokens, complete)) / duration_s,
        output_tokens_per_s=sum(one.num_output_tokens for one in complete) / duration_s,
        ttft_ms=distribution(one.ttft_s for one in complete if one.ttft_s is not None),
        tpot_ms=distribution(one.tpot_s for one in complete if one.num_output_tokens > 1),
        itl_ms=distribution(gap for one in complete for gap in one.itls_s),
        e2e_ms=distribution(one.event_times_s[-1] for one in complete if one.event_times_s),
        statuses=dict(Counter(str(one.status) for one in outcomes)),
        errors=dict(Counter(one.error for one in outcomes if one.error)),
        client_late_ms=distribution(one.late_s for one in outcomes),
    )


def num_prompt_tokens(outcome: Outcome) -> int:
    """As the server counts them, where it tells."""
    return outcome.usage.prompt_tokens if outcome.usage else outcome.arrival.num_prompt_tokens


def distribution(seconds: Iterable[float]) -> Distribution:
    ordered = sorted(1e3 * one for one in seconds)
    if not ordered:
        return Distribution(0, 0.0, 0.0, 0.0, 0.0, 0.0)
    shares = (percentile(ordered, percent) for percent in (50, 90, 99, 100))
    return Distribution(len(ordered), statistics.fmean(ordered), *shares)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """As numpy has it, which vLLM uses: in a straight line between the two nearest values."""
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
