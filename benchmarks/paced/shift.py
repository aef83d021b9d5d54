"""`python -m benchmarks.paced.shift --json FILE`: the load shifts from prompts to outputs and back.

Each time the busier side gets more than its nodes can do, and the cluster less than all nodes can do: with
lending on, idle nodes help out; with lending off, requests queue. With `--real` the nodes compute the model,
on one thread each.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from benchmarks.command import Command, Report
from benchmarks.load.arrivals import Arrival, Lengths, Phase, poisson
from benchmarks.load.client import Outcome
from benchmarks.load.drive import drive
from benchmarks.load.summary import Summary, Targets, summarize
from benchmarks.paced.kept import Pace, pace_of
from benchmarks.paced.observe import CapSeen, Observed, observing
from benchmarks.paced.pace import (
    CHUNK_TOKENS,
    MAX_NUM_SEQS,
    NUM_BLOCKS,
    ONE_CORE,
    capacity,
    stretched,
)
from flowkv.local_cluster import Cluster, ClusterError
from flowkv_common.wire.nodes import StepFit
from tests.paced.cluster import kept, paced_cluster, paced_settings, variables

PROMPTS = Lengths(1000, 20, spread=0.5)
OUTPUTS = Lengths(100, 200, spread=0.5)
READY_TIMEOUT_S = 120.0
# Of what the busier side can do with its own nodes.
OVERLOAD = 1.3


@dataclass(frozen=True)
class Row:
    """One size of the cluster, lending on or off: by phase and over all."""

    num_each: int
    lending: bool
    stretch: float
    phases: dict[str, Summary]
    num_cap_moves: int
    caps: list[CapSeen]
    pace: Pace | None  # real nodes state none


def phases_of(fit: StepFit, num_each: int, seconds: float) -> list[Phase]:
    """Prompts, outputs, prompts: each at `OVERLOAD` times what the static split can do."""
    named = (("prompts", PROMPTS), ("outputs", OUTPUTS), ("prompts again", PROMPTS))
    return [
        Phase(name, OVERLOAD * capacity(fit, num_each, num_each, lengths).per_s, seconds, lengths)
        for name, lengths in named
    ]


def main(argv: list[str]) -> int:
    options = _options(argv)
    targets = Targets(options.ttft_s, options.tpot_s)
    conditions = {
        "fit": msgspec.structs.asdict(ONE_CORE),
        "prompts": PROMPTS._asdict(),
        "outputs": OUTPUTS._asdict(),
        "overload": OVERLOAD,
        "phase_s": options.seconds,
        "seed": options.seed,
        "real": options.real,
        "targets": asdict(targets),
    }
    report = Report("paced.shift", conditions)
    try:
        for num_each in options.nodes:
            for lending in (False, True):
                report.say(f"{num_each}P{num_each}D, lending {'on' if lending else 'off'}")
                report.rows.append(_run(options, num_each, lending, targets))
                report.write(options.json)
    except (ClusterError, TimeoutError) as error:
        print(error, file=sys.stderr)
        return 1
    return report.end(options.json, table(report.rows))


def _run(options: argparse.Namespace, num_each: int, lending: bool, targets: Targets) -> Row:
    stretch = options.stretch or max(1.0, num_each / 4)
    fit = stretched(ONE_CORE, stretch)
    arrivals = list(poisson(phases_of(fit, num_each, options.seconds), random.Random(options.seed)))
    with tempfile.TemporaryDirectory(prefix="flowkv-shift-") as folder:
        with _cluster(options, Path(folder), num_each, lending, fit) as cluster:
            outcomes, observed = asyncio.run(_load(cluster, arrivals))
        pace = None if options.real else pace_of(kept(Path(folder)))
    kinds = list(dict.fromkeys(arrival.kind for arrival in arrivals))
    phases = {kind: [each for each in outcomes if each.arrival.kind == kind] for kind in kinds}
    summaries = {kind: summarize(each, targets, options.seconds) for kind, each in phases.items()}
    summaries["all"] = summarize(outcomes, targets, options.seconds * len(kinds))
    return Row(num_each, lending, stretch, summaries, observed.num_cap_moves, observed.caps, pace)


@contextlib.contextmanager
def _cluster(
    options: argparse.Namespace, folder: Path, num_each: int, lending: bool, fit: StepFit
) -> Iterator[Cluster]:
    counts = {"prefill": num_each, "decode": num_each}
    limits = {"token_budget": CHUNK_TOKENS, "max_num_seqs": MAX_NUM_SEQS, "lending": lending}
    if options.real:
        settings = variables(num_threads=1, **limits)
        with Cluster(folder, options.model, nodes=counts, settings=settings) as cluster:
            cluster.wait_ready(READY_TIMEOUT_S)
            yield cluster
        return
    settings = paced_settings(NUM_BLOCKS, **limits)
    with paced_cluster(folder, options.model, counts, fit, settings=settings) as cluster:
        yield cluster


async def _load(cluster: Cluster, arrivals: list[Arrival]) -> tuple[list[Outcome], Observed]:
    async with observing(cluster) as observed:
        return await drive(cluster.url, arrivals), observed


def table(rows: list[Row]) -> str:
    """A line for each phase."""
    head = (
        f"{'cluster':<9}{'lending':<9}{'phase':<15}{'sent':>6}{'complete':>10}{'good/s':>8}"
        f"{'TTFT p50 / p90 / p99, s':>27}{'TPOT p50 / p90 / p99, s':>27}{'moves':>7}{'slip':>18}"
    )
    lines = [
        f"{f'{row.num_each}P{row.num_each}D':<9}{'on' if row.lending else 'off':<9}{name:<15}"
        f"{phase.num_sent:>6}{phase.num_complete:>10}{phase.goodput_per_s:>8.2f}{phase.ttft_s!s:>27}"
        f"{phase.tpot_s!s:>27}{row.num_cap_moves:>7}{str(row.pace or 'real'):>18}"
        for row in rows
        for name, phase in row.phases.items()
    ]
    return "\n".join([head, *lines])


def _options(argv: list[str]) -> argparse.Namespace:
    command = Command("paced.shift", __doc__)
    parser = command.parser
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 4, 8], help="of each role")
    parser.add_argument("--real", action="store_true", help="nodes that compute the model")
    parser.add_argument("--seconds", type=float, default=40.0, help="of each phase")
    parser.add_argument(
        "--stretch", type=float, default=0.0, help="slower nodes; 0: as many times as 4 go into --nodes"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ttft-s", type=float, default=5.0, help="target")
    parser.add_argument("--tpot-s", type=float, default=0.4, help="target")
    return command.parse(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
