"""`python -m benchmarks.paced.simulated --json FILE`: the same load over HTTP on paced nodes, and simulated.

Both have steps of the same stated time, the same scheduler and the same requests. What differs is what the
simulator leaves out: messages, handoffs, HTTP.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import msgspec

from benchmarks.command import Command, Report
from benchmarks.load.arrivals import Arrival
from benchmarks.load.client import Outcome
from benchmarks.load.drive import drive
from benchmarks.load.summary import tpot_s
from benchmarks.paced.kept import Pace, pace_of
from benchmarks.paced.pace import CHUNK_TOKENS, MAX_NUM_SEQS, NUM_BLOCKS, ONE_CORE, stretched
from benchmarks.simulator.kinds import NodeKind, Targets
from benchmarks.simulator.run import WAIT_SHARE, Machines, carried_by, simulate
from benchmarks.traces import Request, at_rate, cut_to, read_window
from flowkv.local_cluster import ClusterError
from flowkv_common.wire.nodes import StepFit
from tests.paced.cluster import kept, paced_cluster, paced_settings
from tests.paced.nodes import paced_layout

TARGETS = Targets(ttft_s=5.0, tpot_s=0.25)
# The longest prompt and answer together: what the model of the paced nodes allows.
MAX_MODEL_LEN = 8192


@dataclass(frozen=True)
class Means:
    """Over all requests that were served; `tokens_per_s` from the first arrival to the last token."""

    num_served: int
    ttft_s: float
    tpot_s: float
    tokens_per_s: float


@dataclass(frozen=True)
class Row:
    """One size of the cluster at one load: a share of what its best static split carries, if known."""

    num_each: int
    load: float | None
    rate_per_s: float
    measured: Means
    simulated: Means
    pace: Pace | None  # real nodes state none

    @property
    def differences(self) -> list[float]:
        """Of TTFT, TPOT and throughput: simulated over measured, less 1."""
        names = ("ttft_s", "tpot_s", "tokens_per_s")
        return [getattr(self.simulated, name) / getattr(self.measured, name) - 1 for name in names]


def paced_kind(fit: StepFit) -> NodeKind:
    """The paced nodes for the simulator. Their KV is 64 bytes per token: what a handoff takes is latency."""
    return NodeKind(
        name="paced",
        fit=fit,
        layout=paced_layout(block_size=16),
        num_blocks=NUM_BLOCKS,
        token_budget=CHUNK_TOKENS,
        max_num_seqs=MAX_NUM_SEQS,
        max_model_len=MAX_MODEL_LEN,
        connector="shm",
        link_bytes_per_s=1e9,
    )


def main(argv: list[str]) -> int:
    options = _options(argv)
    conditions = {
        "trace": Path(options.trace).name,
        "num_requests": options.requests,
        "seed": options.seed,
        "fit": msgspec.structs.asdict(ONE_CORE),
        "goals": TARGETS._asdict(),
    }
    report = Report("paced.simulated", conditions)
    chosen = cut_to(read_window(options.trace, options.requests, options.seed), MAX_MODEL_LEN)
    try:
        for num_each in options.nodes:
            fit = stretched(ONE_CORE, max(1.0, num_each / 4))
            machines = Machines(paced_kind(fit), 2 * num_each)
            carried = carried_by(machines, chosen, TARGETS, options.seed)
            for load in options.loads:
                report.say(f"{num_each}P{num_each}D at {load:.0%} of {carried.rate:.2f} requests/s")
                requests = at_rate(chosen, load * carried.rate, options.seed)
                report.rows.append(_run(options, machines, num_each, load, requests))
                report.write(options.json)
    except (ClusterError, TimeoutError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return report.end(options.json, table(report.rows))


def _run(
    options: argparse.Namespace, machines: Machines, num_each: int, load: float, requests: list[Request]
) -> Row:
    settings = paced_settings(
        NUM_BLOCKS,
        token_budget=CHUNK_TOKENS,
        max_num_seqs=MAX_NUM_SEQS,
        ttft_goal_s=TARGETS.ttft_s,
        itl_goal_s=TARGETS.tpot_s,
        max_wait_s=WAIT_SHARE * TARGETS.ttft_s,
    )
    counts = {"prefill": num_each, "decode": num_each}
    with tempfile.TemporaryDirectory(prefix="flowkv-simulated-") as folder:
        with paced_cluster(
            Path(folder), options.model, counts, machines.kind.fit, settings=settings
        ) as cluster:
            outcomes = asyncio.run(drive(cluster.url, arrivals_of(requests), seed=options.seed))
        pace = pace_of(kept(Path(folder)))
    simulated = simulated_means(machines, num_each, requests, TARGETS, options.seed)
    rate = len(requests) / requests[-1].arrival_s
    return Row(num_each, load, round(rate, 3), means_of(outcomes), simulated, pace)


def simulated_means(
    machines: Machines, num_prefill: int, requests: list[Request], targets: Targets, seed: int
) -> Means:
    outcome = simulate(machines, num_prefill, "flowkv", requests, targets, seed)
    lives = [life for life in outcome.lives if life.is_done]
    return Means(
        len(lives),
        fmean(life.ttft_s for life in lives),
        fmean(life.tpot_s for life in lives if life.request.num_output_tokens > 1),
        sum(life.request.num_output_tokens for life in lives) / max(life.last_token_s for life in lives),
    )


def arrivals_of(requests: Sequence[Request]) -> list[Arrival]:
    return [
        Arrival(request.arrival_s, request.num_prompt_tokens, request.num_output_tokens)
        for request in requests
    ]


def means_of(outcomes: Sequence[Outcome]) -> Means:
    served = [outcome for outcome in outcomes if outcome.is_complete]
    return Means(
        len(served),
        fmean(outcome.ttft_s or 0.0 for outcome in served),
        fmean(tpot_s(outcome) for outcome in served if len(outcome.token_ids) > 1),
        sum(len(outcome.token_ids) for outcome in served)
        / max(outcome.sent_s + outcome.ended_s for outcome in served),
    )


def table(rows: Sequence[Row]) -> str:
    """Measured and simulated side by side, and by how much the simulator is off."""
    head = (
        f"{'cluster':<9}{'load':>6}{'rate/s':>8}{'served':>14}{'mean TTFT, s':>22}{'mean TPOT, ms':>22}"
        f"{'tokens/s':>20}{'simulator off by':>26}{'slip':>8}"
    )
    lines = [head]
    for row in rows:
        measured, simulated = row.measured, row.simulated
        off = " ".join(f"{difference:+.1%}" for difference in row.differences)
        lines.append(
            f"{f'{row.num_each}P{row.num_each}D':<9}{f'{row.load:.0%}' if row.load else '':>6}"
            f"{row.rate_per_s:>8.2f}{f'{measured.num_served} / {simulated.num_served}':>14}"
            f"{f'{measured.ttft_s:.3f} / {simulated.ttft_s:.3f}':>22}"
            f"{f'{measured.tpot_s * 1e3:.1f} / {simulated.tpot_s * 1e3:.1f}':>22}"
            f"{f'{measured.tokens_per_s:.1f} / {simulated.tokens_per_s:.1f}':>20}{off:>26}"
            f"{str(row.pace or ''):>8}"
        )
    return "\n".join(lines)


def add_traffic(parser: argparse.ArgumentParser, num_requests: int) -> None:
    """Which requests are sent; `num_requests` if nobody says how many."""
    parser.add_argument(
        "--trace", default="synthetic", help="Mooncake .jsonl, Azure .csv, `shifting` or `synthetic`"
    )
    parser.add_argument("--requests", type=int, default=num_requests, help="a window of the trace")
    parser.add_argument("--seed", type=int, default=0)


def _options(argv: list[str]) -> argparse.Namespace:
    command = Command("paced.simulated", __doc__)
    parser = command.parser
    add_traffic(parser, num_requests=300)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 4], help="of each role")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    return command.parse(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
