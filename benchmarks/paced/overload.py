"""`python -m benchmarks.paced.overload --json FILE`: three times what the cluster can do, for a minute.

What is accepted should keep its targets, what is not should hear so at once, memory should not grow, and soon
afterwards all should be as before. Probes, one small request every half second, show when that is.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from benchmarks.command import Command, Report
from benchmarks.load.arrivals import Arrival, Lengths, Phase, poisson
from benchmarks.load.client import Outcome
from benchmarks.load.drive import drive
from benchmarks.load.summary import Quantiles, Summary, Targets, quantiles, summarize
from benchmarks.paced.kept import Pace, pace_of
from benchmarks.paced.observe import Observed, observing
from benchmarks.paced.pace import (
    CHUNK_TOKENS,
    MAX_NUM_SEQS,
    NUM_BLOCKS,
    ONE_CORE,
    capacity,
)
from flowkv.local_cluster import Cluster, ClusterError
from tests.paced.cluster import kept, paced_cluster, paced_settings

LENGTHS = Lengths(300, 60, spread=0.5)
PROBE = Lengths(20, 2)
PROBE_PERIOD_S = 0.5
QUIET_S = 5.0  # before the load
# Served again as before: within so many times the first token's time without load.
RECOVERED_FACTOR = 2.0


@dataclass(frozen=True)
class Memory:
    """A process's resident memory: before the load, its highest under it, and at the end of the run."""

    before_mb: float
    peak_mb: float
    after_mb: float


@dataclass(frozen=True)
class Row:
    """`recovered_s`: from the end of the load until probes were served as before; None: not in this run."""

    num_prefill: int
    num_decode: int
    rate_per_s: float
    capacity_per_s: float
    load: Summary
    num_refused: int
    refused_after_s: Quantiles
    retry_after_s: Quantiles
    probe_ttft_s: float
    recovered_s: float | None
    memory: dict[str, Memory]
    pace: Pace


def arrivals_of(rate_per_s: float, seconds: float, after_s: float, seed: int) -> list[Arrival]:
    """Probes from beginning to end, and the load between `QUIET_S` and `QUIET_S + seconds`."""
    load = poisson([Phase("load", rate_per_s, seconds, LENGTHS)], random.Random(seed))
    num_probes = int((QUIET_S + seconds + after_s) / PROBE_PERIOD_S)
    probes = [Arrival(PROBE_PERIOD_S * i, *PROBE[:2], "probe") for i in range(num_probes)]
    return sorted([*probes, *(each._replace(at_s=QUIET_S + each.at_s) for each in load)])


def row_of(
    outcomes: Sequence[Outcome],
    observed: Observed,
    options: argparse.Namespace,
    rate_per_s: float,
    pace: Pace,
) -> Row:
    """`outcomes` of `arrivals_of`. Raises StatisticsError when no probe was served before the load."""
    load = [each for each in outcomes if each.arrival.kind == "load"]
    probes = [each for each in outcomes if each.arrival.kind == "probe"]
    refused = [each for each in load if each.status == 429]
    usual_s = usual_ttft_s(probes)
    return Row(
        num_prefill=options.prefill,
        num_decode=options.decode,
        rate_per_s=round(rate_per_s, 3),
        capacity_per_s=round(rate_per_s / options.factor, 3),
        load=summarize(load, Targets(options.ttft_s, options.tpot_s), options.seconds),
        num_refused=len(refused),
        refused_after_s=quantiles(each.ended_s for each in refused),
        retry_after_s=quantiles(each.retry_after_s for each in refused if each.retry_after_s is not None),
        probe_ttft_s=round(usual_s, 4),
        recovered_s=recovered_s(probes, usual_s, QUIET_S + options.seconds),
        memory={name: memory_of(rss, options.seconds) for name, rss in observed.rss_bytes.items()},
        pace=pace,
    )


def usual_ttft_s(probes: Sequence[Outcome]) -> float:
    """The median of the probes before the load. Raises StatisticsError when none was served."""
    return statistics.median(
        each.ttft_s for each in probes if each.arrival.at_s < QUIET_S and each.ttft_s is not None
    )


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


def memory_of(rss_bytes: Sequence[int], seconds: float) -> Memory:
    """One sample per second, from the beginning of the run."""
    begins, ends = int(QUIET_S), int(QUIET_S + seconds)
    peak = max(rss_bytes[begins:ends], default=rss_bytes[-1])
    return Memory(*(round(rss / 1e6, 1) for rss in (rss_bytes[0], peak, rss_bytes[-1])))


def table(row: Row) -> str:
    load = row.load
    recovered = "not in this run" if row.recovered_s is None else f"{row.recovered_s:.1f} s after the load"
    lines = [
        f"{row.num_prefill}P{row.num_decode}D, {row.rate_per_s:.2f} requests/s, "
        f"capacity {row.capacity_per_s:.2f} requests/s, slip {row.pace}",
        f"sent {load.num_sent}, complete {load.num_complete}, within targets {load.num_good} "
        f"({load.goodput_per_s:.2f}/s), refused {row.num_refused}, other errors {sum(load.errors.values())}",
        "seconds, p50 / p90 / p99",
        f"  first token of those accepted   {load.ttft_s}",
        f"  time per token of those         {load.tpot_s}",
        f"  gaps between tokens             {load.itl_s}",
        f"  until a refusal                 {row.refused_after_s}",
        f"  Retry-After                     {row.retry_after_s}",
        f"probes: {row.probe_ttft_s:.3f} s before the load, the same again: {recovered}",
        "memory, MB: before, peak, after",
        *(
            f"  {name:<12}{memory.before_mb:>8.1f}{memory.peak_mb:>8.1f}{memory.after_mb:>8.1f}"
            for name, memory in row.memory.items()
        ),
    ]
    return "\n".join(lines)


async def _load(cluster: Cluster, arrivals: list[Arrival]) -> tuple[list[Outcome], Observed]:
    async with observing(cluster) as observed:
        return await drive(cluster.url, arrivals), observed


def main(argv: list[str]) -> int:
    options = _options(argv)
    rate_per_s = options.factor * capacity(ONE_CORE, options.prefill, options.decode, LENGTHS).per_s
    arrivals = arrivals_of(rate_per_s, options.seconds, options.after, options.seed)
    report = Report(
        "paced.overload",
        {
            "fit": msgspec.structs.asdict(ONE_CORE),
            "lengths": LENGTHS._asdict(),
            "probe": PROBE._asdict(),
            "seconds": options.seconds,
            "seed": options.seed,
            "targets": asdict(Targets(options.ttft_s, options.tpot_s)),
        },
    )
    settings = paced_settings(
        NUM_BLOCKS,
        token_budget=CHUNK_TOKENS,
        max_num_seqs=MAX_NUM_SEQS,
        ttft_goal_s=options.ttft_s,
        itl_goal_s=options.tpot_s,
        # The other half is for the prompt itself, and for waits that were predicted too short.
        max_wait_s=options.ttft_s / 2,
    )
    counts = {"prefill": options.prefill, "decode": options.decode}
    try:
        with tempfile.TemporaryDirectory(prefix="flowkv-overload-") as folder:
            with paced_cluster(Path(folder), options.model, counts, ONE_CORE, settings=settings) as cluster:
                outcomes, observed = asyncio.run(_load(cluster, arrivals))
            pace = pace_of(kept(Path(folder)))
        row = row_of(outcomes, observed, options, rate_per_s, pace)
    except (ClusterError, TimeoutError, statistics.StatisticsError) as error:
        print(error, file=sys.stderr)
        return 1
    report.rows.append(row)
    report.write(options.json)
    return report.end(options.json, table(row))


def _options(argv: list[str]) -> argparse.Namespace:
    command = Command("paced.overload", __doc__)
    parser = command.parser
    parser.add_argument("--prefill", type=int, default=2)
    parser.add_argument("--decode", type=int, default=2)
    parser.add_argument("--factor", type=float, default=3.0, help="times the capacity")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument("--after", type=float, default=60.0, help="seconds of probes after it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ttft-s", type=float, default=5.0, help="target")
    parser.add_argument("--tpot-s", type=float, default=0.2, help="target")
    return command.parse(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
