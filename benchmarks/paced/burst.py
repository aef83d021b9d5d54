"""`python -m benchmarks.paced.burst --json FILE`: many requests at once, and how long they wait.

For each request: how long its first token should take by the scheduler's first answer (the event
`request_finished` tells), beside how long that took at the client. Where requests were refused, the same
burst is sent again to a cluster that refuses nobody: so each refused request's wait becomes known.
With `--real` the nodes compute the model, on one thread each.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from benchmarks.command import Command, Report
from benchmarks.load.arrivals import Arrival
from benchmarks.load.client import Outcome
from benchmarks.load.drive import drive
from benchmarks.load.summary import Quantiles, quantiles
from benchmarks.paced.kept import Pace, pace_of
from benchmarks.paced.pace import NUM_BLOCKS, ONE_CORE
from flowkv.local_cluster import Cluster, ClusterError
from flowkv_common.bus.connection import connect
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import RequestFinished
from tests.paced.cluster import kept, paced_cluster, paced_settings, variables

PROMPT_TOKENS = 37
READY_TIMEOUT_S = 120.0
# Before the first burst: nodes learn what their steps cost, which takes steps that differ.
WARM_UP = [Arrival(0.05 * i, (20, 60, 200)[i % 3], 32, "warm-up") for i in range(48)]
# Between bursts: reports settle, and what was lent goes home.
PAUSE_S = 4.0
# A cluster that refuses nobody, and the gateway's deadline for a request.
NO_LIMIT_S = 500.0
# Shorter times count as this: whether 10 ms or 30 were foreseen is nobody's concern.
LEAST_S = 0.5
EVENT_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Row:
    """One burst. `off_by`: the larger of foreseen and real time to the first token over the smaller.

    `foreseen_over_real` says in which direction. `num_refused_rightly`: of the refused, those who waited for
    longer than `max_wait_s` where nobody was refused; None where nobody was.
    """

    num_prefill: int
    num_decode: int
    num_requests: int
    max_tokens: int
    num_complete: int
    num_refused: int
    num_refused_rightly: int | None
    errors: dict[str, int]  # of the others
    seconds: float
    tokens_per_s: float
    ttft_s: Quantiles
    foreseen_s: Quantiles
    off_by: Quantiles
    foreseen_over_real: Quantiles
    retry_after_s: Quantiles
    pace: Pace | None  # real nodes state none; of the whole cluster's life


@dataclass(frozen=True)
class Burst:
    """What was sent at once, and what became of it; `foreseen_s` by request id."""

    num_requests: int
    max_tokens: int
    outcomes: Sequence[Outcome]
    foreseen_s: dict[str, float]
    seconds: float


def row_of(burst: Burst, again: Burst | None, num_each: int, max_wait_s: float) -> Row:
    """`again`: the same burst where nobody is refused."""
    complete = [each for each in burst.outcomes if each.is_complete]
    refused = [i for i, each in enumerate(burst.outcomes) if each.status == 429]
    pairs = [
        (max(LEAST_S, burst.foreseen_s[each.request_id]), max(LEAST_S, each.ttft_s))
        for each in complete
        if each.ttft_s is not None and each.request_id in burst.foreseen_s
    ]
    waits = [again.outcomes[i].ttft_s for i in refused] if again else []
    return Row(
        num_prefill=num_each,
        num_decode=num_each,
        num_requests=burst.num_requests,
        max_tokens=burst.max_tokens,
        num_complete=len(complete),
        num_refused=len(refused),
        num_refused_rightly=sum(s is None or s > max_wait_s for s in waits) if refused else None,
        errors=dict(
            Counter(str(each.error) for each in burst.outcomes if not each.is_complete and each.status != 429)
        ),
        seconds=round(burst.seconds, 2),
        tokens_per_s=round(sum(len(each.token_ids) for each in complete) / burst.seconds, 1),
        ttft_s=quantiles(real for _, real in pairs),
        foreseen_s=quantiles(foreseen for foreseen, _ in pairs),
        off_by=quantiles(max(pair) / min(pair) for pair in pairs),
        foreseen_over_real=quantiles(foreseen / real for foreseen, real in pairs),
        retry_after_s=quantiles(
            each.retry_after_s for each in burst.outcomes if each.retry_after_s is not None
        ),
        pace=None,
    )


async def send(cluster: Cluster, num_requests: int, max_tokens: int) -> Burst:
    """Raises TimeoutError when an event of a request that was served does not come."""
    foreseen_s: dict[str, float] = {}
    finished = asyncio.Event()

    def hear(event: RequestFinished, _: object) -> None:
        if event.predicted_ttft_s:
            foreseen_s[event.request_id] = event.predicted_ttft_s
        finished.set()

    async with connect(cluster.nats_url, name="bench-burst") as bus:
        async with await bus.subscribe(subjects.event("request_finished", "*"), RequestFinished, hear):
            began = time.monotonic()
            arrivals = [Arrival(0.0, PROMPT_TOKENS, max_tokens)] * num_requests
            outcomes = await drive(cluster.url, arrivals, seed=num_requests + max_tokens)
            seconds = time.monotonic() - began
            served = {each.request_id for each in outcomes if each.is_complete}
            async with asyncio.timeout(EVENT_TIMEOUT_S):
                while served - foreseen_s.keys():
                    finished.clear()
                    await finished.wait()
    return Burst(num_requests, max_tokens, outcomes, foreseen_s, seconds)


async def _bursts(cluster: Cluster, cells: Sequence[tuple[int, int]], report: Report) -> list[Burst]:
    await drive(cluster.url, WARM_UP)
    bursts = []
    for num_requests, max_tokens in cells:
        await asyncio.sleep(PAUSE_S)
        bursts.append(await send(cluster, num_requests, max_tokens))
        num_refused = sum(each.status == 429 for each in bursts[-1].outcomes)
        report.say(f"{num_requests} x {max_tokens}: {bursts[-1].seconds:.1f} s, {num_refused} refused")
    return bursts


def _rows(options: argparse.Namespace, num_each: int, report: Report) -> list[Row]:
    cells = [(num, tokens) for tokens in options.tokens for num in options.requests]
    with tempfile.TemporaryDirectory(prefix="flowkv-burst-") as folder:
        with _cluster(options, Path(folder), num_each, options.max_wait_s) as cluster:
            bursts = asyncio.run(_bursts(cluster, cells, report))
        pace = None if options.real else pace_of(kept(Path(folder)))
    refusing = [
        (burst.num_requests, burst.max_tokens)
        for burst in bursts
        if any(each.status == 429 for each in burst.outcomes)
    ]
    again: dict[tuple[int, int], Burst] = {}
    if refusing:
        report.say("again, refusing nobody")
        with tempfile.TemporaryDirectory(prefix="flowkv-burst-") as folder:
            with _cluster(options, Path(folder), num_each, NO_LIMIT_S) as cluster:
                repeated = asyncio.run(_bursts(cluster, refusing, report))
        again = dict(zip(refusing, repeated, strict=True))
    rows = (
        row_of(burst, again.get((burst.num_requests, burst.max_tokens)), num_each, options.max_wait_s)
        for burst in bursts
    )
    return [replace(row, pace=pace) for row in rows]


@contextlib.contextmanager
def _cluster(
    options: argparse.Namespace, folder: Path, num_each: int, max_wait_s: float
) -> Iterator[Cluster]:
    counts = {"prefill": num_each, "decode": num_each}
    if options.real:
        settings = variables(num_threads=1, max_wait_s=max_wait_s)
        with Cluster(folder, options.model, nodes=counts, settings=settings) as cluster:
            cluster.wait_ready(READY_TIMEOUT_S)
            yield cluster
        return
    settings = paced_settings(NUM_BLOCKS, max_wait_s=max_wait_s)
    with paced_cluster(folder, options.model, counts, ONE_CORE, settings=settings) as cluster:
        yield cluster


def table(rows: Sequence[Row]) -> str:
    head = (
        f"{'cluster':<9}{'burst':<12}{'served':>7}{'refused':>8}{'rightly':>8}{'seconds':>9}{'tokens/s':>10}"
        f"{'TTFT p50 / p90 / p99, s':>28}{'off by p50 / p90':>18}{'foreseen / real p50':>21}"
    )
    return "\n".join([head, *map(_line, rows)])


def _line(row: Row) -> str:
    rightly = "" if row.num_refused_rightly is None else row.num_refused_rightly
    return (
        f"{f'{row.num_prefill}P{row.num_decode}D':<9}{f'{row.num_requests} x {row.max_tokens}':<12}"
        f"{row.num_complete:>7}{row.num_refused:>8}{rightly:>8}{row.seconds:>9.1f}{row.tokens_per_s:>10.1f}"
        f"{row.ttft_s!s:>28}{f'{row.off_by.p50:.2f} / {row.off_by.p90:.2f}':>18}"
        f"{row.foreseen_over_real.p50:>21.2f}"
    )


def main(argv: list[str]) -> int:
    options = _options(argv)
    report = Report(
        "paced.burst",
        {
            "fit": None if options.real else msgspec.structs.asdict(ONE_CORE),
            "real": options.real,
            "prompt_tokens": PROMPT_TOKENS,
            "max_wait_s": options.max_wait_s,
            "least_s": LEAST_S,
            "beside": options.beside,
        },
    )
    try:
        for num_each in options.nodes:
            report.say(f"{num_each}P{num_each}D")
            report.rows += _rows(options, num_each, report)
            report.write(options.json)
    except (ClusterError, TimeoutError) as error:
        print(error, file=sys.stderr)
        return 1
    return report.end(options.json, table(report.rows))


def _options(argv: list[str]) -> argparse.Namespace:
    command = Command("paced.burst", __doc__)
    parser = command.parser
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2], help="of each role")
    parser.add_argument("--requests", type=int, nargs="+", default=[32, 100, 200, 300], help="at once")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 128], help="max_tokens")
    parser.add_argument("--real", action="store_true", help="nodes that compute the model")
    parser.add_argument("--max-wait-s", type=float, default=60.0, help="the longest wait that is admitted")
    parser.add_argument("--beside", default="", help="what else runs on this host, for the record")
    return command.parse(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
