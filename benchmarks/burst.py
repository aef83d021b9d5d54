"""Many requests at once: how long each waits, beside how long the scheduler said it would.

For each request: the time to its first token by the scheduler's first answer (the event `request_finished`
tells), beside what it took at the client. Where requests were refused, the same burst is sent again to a
cluster that refuses none, so that each refused request's wait becomes known.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.clusters import ONE_CORE, event_of, listening, start_cluster
from benchmarks.load import errors_of
from benchmarks.report import Report, make_parser, quantiles
from flowkv.bench.load import Arrival, Outcome, drive
from flowkv.local_cluster import Cluster
from flowkv_common.wire.messages import RequestFinished
from flowkv_scheduler.cluster import Goals

PROMPT_TOKENS = 37
# Before the first burst: nodes learn what their steps cost, which takes steps that differ.
WARM_UP = [Arrival(0.05 * i, (20, 60, 200)[i % 3], 32, "warm-up") for i in range(48)]
# Between bursts: reports settle, and what was lent goes home.
PAUSE_S = 4.0
# The longest wait of a cluster that refuses none.
NO_LIMIT_S = 500.0
# Shorter times count as this: whether 10 ms or 30 were predicted makes no difference.
LEAST_S = 0.5
COLUMNS = (
    "cluster", "num_requests", "max_tokens", "num_complete", "num_refused", "num_refused_rightly",
    "seconds", "tokens_per_s", "ttft_s", "off_by", "predicted_over_real", "pace",
)  # fmt: skip


class Burst(NamedTuple):
    """What was sent at once, and what became of it; `predicted_s` by request id."""

    num_requests: int
    max_tokens: int
    outcomes: Sequence[Outcome]
    predicted_s: dict[str, float]
    seconds: float

    @property
    def cell(self) -> tuple[int, int]:
        return self.num_requests, self.max_tokens

    @property
    def refused(self) -> list[int]:
        return [i for i, each in enumerate(self.outcomes) if each.status == 429]


def main(argv: Sequence[str]) -> int:
    parser = make_parser("burst", __doc__, model=True)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2], help="of each role")
    parser.add_argument("--requests", type=int, nargs="+", default=[32, 100, 200, 300], help="at once")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 128], help="max_tokens")
    parser.add_argument("--real", action="store_true", help="nodes that compute the model, one thread each")
    parser.add_argument("--max-wait-s", type=float, default=0.0, help="as FLOWKV_MAX_WAIT_S")
    options = parser.parse_args(argv)
    fit = None if options.real else ONE_CORE
    longest_wait_s = Goals(max_wait_s=options.max_wait_s).longest_wait_s
    report = Report(options, fit=fit, prompt_tokens=PROMPT_TOKENS, least_s=LEAST_S)
    cells = [(num, tokens) for tokens in options.tokens for num in options.requests]
    for num_each in options.nodes:
        report.say(f"{num_each}P{num_each}D")
        nodes = {"prefill": num_each, "decode": num_each}
        settings = {"max_wait_s": options.max_wait_s}
        with start_cluster(options.model, nodes, settings=settings, fit=fit) as started:
            bursts = asyncio.run(send_bursts(started.cluster, cells, report))
        again: dict[tuple[int, int], Burst] = {}
        if refusing := [burst.cell for burst in bursts if burst.refused]:
            report.say("again, refusing none")
            with start_cluster(options.model, nodes, settings={"max_wait_s": NO_LIMIT_S}, fit=fit) as patient:
                repeated = asyncio.run(send_bursts(patient.cluster, refusing, report))
            again = dict(zip(refusing, repeated, strict=True))
        for burst in bursts:
            figures = figures_of(burst, again.get(burst.cell), longest_wait_s)
            report.add_row(cluster=f"{num_each}P{num_each}D", **figures, pace=started.pace)
    return report.finish(*COLUMNS)


async def send_bursts(cluster: Cluster, cells: Sequence[tuple[int, int]], report: Report) -> list[Burst]:
    """Raises BenchmarkFailed when an event of a request that was served does not come."""
    await drive(cluster.url, WARM_UP)
    bursts = []
    async with listening(cluster, "request_finished", RequestFinished) as finished:
        for num_requests, max_tokens in cells:
            await asyncio.sleep(PAUSE_S)
            predicted_s: dict[str, float] = {}
            began = time.monotonic()
            arrivals = [Arrival(0.0, PROMPT_TOKENS, max_tokens)] * num_requests
            outcomes = await drive(cluster.url, arrivals, seed=num_requests + max_tokens)
            seconds = time.monotonic() - began
            served = {each.request_id for each in outcomes if each.is_complete}
            while served - predicted_s.keys():
                event = await event_of(finished, lambda event: event.predicted_ttft_s > 0)
                predicted_s[event.request_id] = event.predicted_ttft_s
            bursts.append(Burst(num_requests, max_tokens, outcomes, predicted_s, seconds))
            num_refused = len(bursts[-1].refused)
            report.say(f"{num_requests} x {max_tokens}: {seconds:.1f} s, {num_refused} refused")
    return bursts


def figures_of(burst: Burst, again: Burst | None, max_wait_s: float) -> dict[str, Any]:
    """`again`: the same burst where none is refused.

    `off_by`: the larger of predicted and real time to the first token over the smaller; `predicted_over_real`
    says in which direction. `num_refused_rightly`: of the refused, those that waited for longer than
    `max_wait_s` where none was refused; None where none was.
    """
    complete = [each for each in burst.outcomes if each.is_complete]
    pairs = [
        (max(LEAST_S, burst.predicted_s[each.request_id]), max(LEAST_S, each.ttft_s))
        for each in complete
        if each.ttft_s is not None and each.request_id in burst.predicted_s
    ]
    waits = [again.outcomes[i].ttft_s for i in burst.refused] if again else []
    return {
        "num_requests": burst.num_requests,
        "max_tokens": burst.max_tokens,
        "num_complete": len(complete),
        "num_refused": len(burst.refused),
        "num_refused_rightly": sum(s is None or s > max_wait_s for s in waits) if burst.refused else None,
        "errors": errors_of(burst.outcomes),
        "seconds": round(burst.seconds, 2),
        "tokens_per_s": round(sum(len(each.token_ids) for each in complete) / burst.seconds, 1),
        "ttft_s": quantiles(real for _, real in pairs),
        "predicted_s": quantiles(predicted for predicted, _ in pairs),
        "off_by": quantiles(max(pair) / min(pair) for pair in pairs),
        "predicted_over_real": quantiles(predicted / real for predicted, real in pairs),
        "retry_after_s": quantiles(each.retry_after_s for each in burst.outcomes if each.retry_after_s),
    }
