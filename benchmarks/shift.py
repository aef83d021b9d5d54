"""The load shifts from prompts to outputs and back: what lending nodes to the other side is worth.

Each time the busier side gets more than its nodes can do, and the cluster less than all nodes can do: with
lending on, idle nodes help out; with lending off, requests queue.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

from benchmarks.clusters import ONE_CORE, PACED_LIMITS, capacity, drive_observed, start_cluster
from benchmarks.load import add_targets, summarize, targets_of
from benchmarks.report import Report, make_parser
from benchmarks.simulator.batch import slowed
from flowkv.bench.load import Lengths, Phase, poisson
from flowkv_common.wire.nodes import StepFit

PROMPTS = Lengths(1000, 20, spread=0.5)
OUTPUTS = Lengths(100, 200, spread=0.5)
# Of what the busier side can do with its own nodes.
OVERLOAD = 1.3
COLUMNS = (
    "cluster", "lending", "phase", "num_sent", "num_complete", "goodput_per_s", "ttft_s", "tpot_s",
    "num_cap_moves", "pace",
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = make_parser("shift", __doc__, model=True)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 4, 8], help="of each role")
    parser.add_argument("--real", action="store_true", help="nodes that compute the model, one thread each")
    parser.add_argument("--core-share", type=float, help="of a core for each real node; needs root")
    parser.add_argument("--seconds", type=float, default=40.0, help="of each phase")
    parser.add_argument("--stretch", type=float, help="so many times slower nodes; without, --nodes / 4")
    parser.add_argument("--seed", type=int, default=0)
    add_targets(parser, tpot_s=0.25)
    options = parser.parse_args(argv)
    targets = targets_of(options)
    goals = {"ttft_goal_s": targets.ttft_s, "itl_goal_s": targets.tpot_s}
    report = Report(
        options, fit=ONE_CORE, prompts=PROMPTS._asdict(), outputs=OUTPUTS._asdict(), overload=OVERLOAD
    )
    for num_each in options.nodes:
        stretch = options.stretch or max(1.0, num_each / 4)
        fit = slowed(ONE_CORE, stretch)
        phases = phases_of(fit, num_each, options.seconds)
        arrivals = list(poisson(phases, random.Random(options.seed)))
        for lending in (False, True):
            report.say(f"{num_each}P{num_each}D, lending {'on' if lending else 'off'}")
            with start_cluster(
                options.model,
                {"prefill": num_each, "decode": num_each},
                settings={**PACED_LIMITS, **goals, "lending": lending},
                fit=None if options.real else fit,
                core_share=options.core_share,
            ) as started:
                outcomes, observed = asyncio.run(drive_observed(started.cluster, arrivals))
            for phase in [*(phase.kind for phase in phases), "all"]:
                mine = [each for each in outcomes if phase in ("all", each.arrival.kind)]
                duration_s = options.seconds * (len(phases) if phase == "all" else 1)
                report.add_row(
                    cluster=f"{num_each}P{num_each}D",
                    lending=lending,
                    stretch=stretch,
                    phase=phase,
                    **summarize(mine, targets, duration_s),
                    num_cap_moves=observed.num_cap_moves,
                    pace=started.pace,
                )
    return report.finish(*COLUMNS)


def phases_of(fit: StepFit, num_each: int, seconds: float) -> list[Phase]:
    """Prompts, outputs, prompts: each at `OVERLOAD` times what the static split can do."""
    named = (("prompts", PROMPTS), ("outputs", OUTPUTS), ("prompts again", PROMPTS))
    return [
        Phase(name, OVERLOAD * capacity(fit, num_each, num_each, lengths).per_s, seconds, lengths)
        for name, lengths in named
    ]
