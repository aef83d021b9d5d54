"""`python -m benchmarks.paced.real --json FILE`: a load over HTTP on real nodes, and simulated by their fits.

One prefill and one decode node compute the model on one thread each. What they have measured of their own
steps when the load has ended is all that the simulator knows of them.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

import msgspec

from benchmarks.command import Command, Report
from benchmarks.load.arrivals import Arrival
from benchmarks.load.client import Outcome
from benchmarks.load.drive import drive
from benchmarks.paced.observe import observing
from benchmarks.paced.simulated import Row, add_traffic, arrivals_of, means_of, simulated_means, table
from benchmarks.simulator.kinds import SMOLLM2_CPU, Targets
from benchmarks.simulator.run import Machines
from benchmarks.traces import at_rate, cut_to, read_window
from flowkv.local_cluster import Cluster, ClusterError
from flowkv_common.wire.nodes import StepFit
from tests.paced.cluster import variables

# Nothing is refused: what is compared is how long things take.
TARGETS = Targets(ttft_s=60.0, tpot_s=1.0)
READY_TIMEOUT_S = 120.0
ROLES = ("prefill", "decode")


def main(argv: list[str]) -> int:
    options = _options(argv)
    kind = msgspec.structs.replace(SMOLLM2_CPU, num_blocks=options.blocks)
    conditions: dict[str, object] = {
        "trace": Path(options.trace).name,
        "num_requests": options.requests,
        "seed": options.seed,
        "fits": {},
    }
    report = Report("paced.real", conditions)
    settings = variables(
        num_threads=1,
        token_budget=kind.token_budget,
        max_num_seqs=kind.max_num_seqs,
        kv_cache_bytes=kind.num_blocks * kind.layout.block_bytes,
        ttft_goal_s=TARGETS.ttft_s,
        itl_goal_s=TARGETS.tpot_s,
        max_wait_s=TARGETS.ttft_s,
    )
    try:
        chosen = cut_to(read_window(options.trace, options.requests, options.seed), options.longest)
        with tempfile.TemporaryDirectory(prefix="flowkv-real-") as folder:
            nodes = dict.fromkeys(ROLES, 1)
            with Cluster(Path(folder), options.model, nodes=nodes, settings=settings) as cluster:
                cluster.wait_ready(READY_TIMEOUT_S)
                for rate in options.rates:
                    report.say(f"{rate} requests/s")
                    requests = at_rate(chosen, rate, options.seed)
                    outcomes, fits = asyncio.run(_load(cluster, arrivals_of(requests), options.seed))
                    conditions["fits"] = {role: msgspec.structs.asdict(fits[role]) for role in ROLES}
                    prefill, decode = (msgspec.structs.replace(kind, fit=fits[role]) for role in ROLES)
                    simulated = simulated_means(
                        Machines(prefill, 2, decode_kind=decode), 1, requests, TARGETS, options.seed
                    )
                    report.rows.append(Row(1, None, rate, means_of(outcomes), simulated, None))
                    report.write(options.json)
    except (ClusterError, TimeoutError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return report.end(options.json, table(report.rows))


async def _load(
    cluster: Cluster, arrivals: list[Arrival], seed: int
) -> tuple[list[Outcome], dict[str, StepFit]]:
    """All outcomes, and by role how long steps take there, as the nodes have found by then."""
    async with observing(cluster) as observed:
        outcomes = await drive(cluster.url, arrivals, seed=seed)
    if unknown := {f"{role}-0" for role in ROLES} - observed.fits.keys():
        raise ClusterError(f"too few steps to tell what they cost at {sorted(unknown)}: send more requests")
    return outcomes, {role: observed.fits[f"{role}-0"] for role in ROLES}


def _options(argv: list[str]) -> argparse.Namespace:
    command = Command("paced.real", __doc__)
    parser = command.parser
    add_traffic(parser, num_requests=60)
    parser.add_argument(
        "--longest", type=int, default=4096, help="prompt and answer are cut to so many tokens"
    )
    parser.add_argument("--rates", type=float, nargs="+", default=[0.15, 0.3], help="requests per second")
    parser.add_argument("--blocks", type=int, default=4096, help="of each node's pool, 16 tokens each")
    return command.parse(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
