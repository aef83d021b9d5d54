"""Three times what a cluster can do, for a minute: what is accepted, what is refused, what is left behind.

What is accepted should keep its targets, what is not should hear so at once, memory should not grow, and soon
afterwards all should be as before. Probes, one small request every half second, show when that is.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Sequence

from benchmarks import BenchmarkFailed
from benchmarks.clusters import ONE_CORE, PACED_LIMITS, capacity, drive_observed, start_cluster
from benchmarks.load import add_targets, summarize, targets_of
from benchmarks.report import Report, make_parser, quantiles, transposed
from flowkv.bench.load import Arrival, Lengths, Outcome, Phase, poisson

LENGTHS = Lengths(300, 60, spread=0.5)
PROBE = Lengths(20, 2)
PROBE_PERIOD_S = 0.5
QUIET_S = 5.0  # before the load
# Served again as before: within so many times the first token's time without load.
RECOVERED_FACTOR = 2.0


def main(argv: Sequence[str]) -> int:
    parser = make_parser("overload", __doc__, model=True)
    parser.add_argument("--prefill", type=int, default=2)
    parser.add_argument("--decode", type=int, default=2)
    parser.add_argument("--factor", type=float, default=3.0, help="times the capacity")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument("--after", type=float, default=60.0, help="seconds of probes after it")
    parser.add_argument("--seed", type=int, default=0)
    add_targets(parser)
    options = parser.parse_args(argv)
    targets = targets_of(options)
    most_per_s = capacity(ONE_CORE, options.prefill, options.decode, LENGTHS).per_s
    arrivals = arrivals_at(options.factor * most_per_s, options.seconds, options.after, options.seed)
    report = Report(options, fit=ONE_CORE, lengths=LENGTHS._asdict(), probe=PROBE._asdict())
    with start_cluster(
        options.model,
        {"prefill": options.prefill, "decode": options.decode},
        settings={
            **PACED_LIMITS,
            "ttft_goal_s": options.ttft_s,
            "itl_goal_s": options.tpot_s,
            # The other half is for the prompt itself, and for waits that were predicted too short.
            "max_wait_s": options.ttft_s / 2,
        },
        fit=ONE_CORE,
    ) as started:
        outcomes, observed = asyncio.run(drive_observed(started.cluster, arrivals))
    load, probes = ([each for each in outcomes if each.arrival.kind == kind] for kind in ("load", "probe"))
    refused = [each for each in load if each.status == 429]
    usual_s = usual_ttft_s(probes)
    report.add_row(
        cluster=f"{options.prefill}P{options.decode}D",
        rate_per_s=round(options.factor * most_per_s, 3),
        capacity_per_s=round(most_per_s, 3),
        **summarize(load, targets, options.seconds),
        num_refused=len(refused),
        refused_after_s=quantiles(each.ended_s for each in refused),
        retry_after_s=quantiles(each.retry_after_s for each in refused if each.retry_after_s is not None),
        probe_ttft_s=round(usual_s, 4),
        # From the end of the load until probes were served as before; None: not in this run.
        recovered_s=recovered_s(probes, usual_s, QUIET_S + options.seconds),
        memory_mb={name: memory_of(rss, options.seconds) for name, rss in observed.rss_bytes.items()},
        pace=started.pace,
    )
    return report.finish(shown=transposed(report.rows, "cluster"))


def arrivals_at(rate_per_s: float, seconds: float, after_s: float, seed: int) -> list[Arrival]:
    """Probes from beginning to end, and the load between `QUIET_S` and `QUIET_S + seconds`."""
    load = poisson([Phase("load", rate_per_s, seconds, LENGTHS)], random.Random(seed))
    num_probes = int((QUIET_S + seconds + after_s) / PROBE_PERIOD_S)
    probes = [Arrival(PROBE_PERIOD_S * i, *PROBE[:2], "probe") for i in range(num_probes)]
    return sorted([*probes, *(each._replace(at_s=QUIET_S + each.at_s) for each in load)])


def usual_ttft_s(probes: Sequence[Outcome]) -> float:
    """The median of the probes before the load."""
    served = [each.ttft_s for each in probes if each.arrival.at_s < QUIET_S and each.ttft_s is not None]
    if not served:
        raise BenchmarkFailed("no probe was served before the load")
    return statistics.median(served)


def recovered_s(probes: Sequence[Outcome], usual_s: float, load_ended_s: float) -> float | None:
    """Seconds from the end of the load to the first probe from which on all are served as before it."""
    since: float | None = None
    for probe in sorted(probes, key=lambda each: each.arrival.at_s):
        if probe.arrival.at_s < load_ended_s:
            continue
        is_usual = probe.is_complete and (probe.ttft_s or 0.0) <= RECOVERED_FACTOR * usual_s
        if not is_usual:
            since = None
        elif since is None:
            since = probe.arrival.at_s - load_ended_s
    return since


def memory_of(rss_bytes: Sequence[int], seconds: float) -> dict[str, float]:
    """Resident MB before the load, at most under it, and at the end; of one sample per second."""
    begins, ends = int(QUIET_S), int(QUIET_S + seconds)
    peak = max(rss_bytes[begins:ends], default=rss_bytes[-1])
    found = {"before": rss_bytes[0], "peak": peak, "after": rss_bytes[-1]}
    return {name: round(rss / 1e6, 1) for name, rss in found.items()}
