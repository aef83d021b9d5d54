"""How far the simulator is off: the same load over HTTP on real services, and simulated.

Paced nodes and the simulator have steps of the same stated time, the same scheduler and the same requests.
What differs is what the simulator leaves out: messages, handoffs, HTTP. A cluster under load is chaotic: that
requests come some milliseconds later makes up to a twentieth of them good or bad, so the simulator's figures
are means of several runs with such delays. With `--real` one prefill and one decode node compute the model on
one thread each. What they have measured of their own steps when the load has ended is all that the simulator
knows of them; nothing is refused.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from collections.abc import Sequence
from itertools import product
from operator import attrgetter
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from benchmarks import BenchmarkFailed
from benchmarks.clusters import (
    CHUNK_TOKENS,
    MAX_NUM_SEQS,
    NUM_BLOCKS,
    ONE_CORE,
    PACED_LIMITS,
    Pace,
    drive_observed,
    start_cluster,
)
from benchmarks.report import Report, make_parser
from benchmarks.simulator.batch import slowed
from benchmarks.simulator.kinds import SMOLLM2_CPU, NodeKind, default_targets
from benchmarks.simulator.run import Machines, carried_by, simulate
from benchmarks.simulator.run import Outcome as SimOutcome
from benchmarks.traffic import read_window
from flowkv.bench.load import Outcome, arrivals_of
from flowkv.bench.traces import Request, Targets, at_rate, cut_to
from tests.paced.nodes import paced_layout

MEANS = ("good", "num_served", "late_first", "slow", "ttft_s", "tpot_s", "tokens_per_s")
COLUMNS = (*(f"{side}_{name}" for name in MEANS for side in ("measured", "simulated")), "simulator_off_by")
CELL = ("trace", "cluster", "load", "lending", "run")
# With real nodes all are served: what is compared is how long things take.
REAL_TARGETS = Targets(ttft_s=60.0, tpot_s=1.0)
# Simulated runs of one cell, and by how much at most their requests come later, in seconds.
NUM_SIMULATED = 8
MOST_DELAY_S = 0.02
# The longest prompt and answer together: what the model of the paced nodes allows.
MAX_MODEL_LEN = 8192
# The paced nodes for the simulator. Their KV is 64 bytes per token: what a handoff takes is latency.
PACED = NodeKind(
    name="paced",
    fit=ONE_CORE,
    layout=paced_layout(block_size=16),
    num_blocks=NUM_BLOCKS,
    token_budget=CHUNK_TOKENS,
    max_num_seqs=MAX_NUM_SEQS,
    max_model_len=MAX_MODEL_LEN,
    connector="shm",
    link_bytes_per_s=1e9,
)


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    report = Report(options, fit=ONE_CORE)
    if options.real:
        chosen = cut_to(read_window(options.trace[0], options.requests, options.seed), options.longest)
        beside_real_nodes(options, [asked_exactly(request) for request in chosen], report)
        return report.finish("rate_per_s", *COLUMNS)
    if options.resume and options.json.exists():
        report.rows += earlier_rows(options)
    known = {cell_of(row) for row in report.rows}
    for trace, num_each, load, lending, run in product(
        options.trace, options.nodes, options.loads, options.lending, range(options.runs)
    ):
        lends = lending == "on"
        cluster = f"{num_each}P{num_each}D"
        row = {"trace": Path(trace).name, "cluster": cluster, "load": load, "lending": lends, "run": run}
        if cell_of(row) in known:
            continue
        report.say(f"{trace}: {cluster} at {load:.0%}, lending {lending}, run {run + 1} of {options.runs}")
        found = beside_paced_nodes(options, trace, num_each, load, options.seed + run, lends)
        report.add_row(**row, **found)
    return report.finish(shown=points_off(report.rows))


def beside_paced_nodes(
    options: argparse.Namespace, trace: str, num_each: int, load: float, seed: int, lends: bool
) -> dict[str, object]:
    """One run on each. The load is a share of what the best static split carries of the same requests."""
    kind = msgspec.structs.replace(PACED, fit=slowed(ONE_CORE, max(1.0, num_each / 4)))
    machines = Machines(kind, 2 * num_each)
    chosen = cut_to(read_window(trace, options.requests, seed), options.longest)
    requests = [asked_exactly(request) for request in chosen]
    targets = default_targets(kind, requests)
    requests = at_rate(requests, load * carried_by(machines, requests, targets, seed).rate, seed)
    with start_cluster(
        options.model,
        {"prefill": num_each, "decode": num_each},
        settings={**PACED_LIMITS, **goals_of(targets), "lending": lends},
        fit=kind.fit,
    ) as started:
        outcomes, observed = asyncio.run(drive_observed(started.cluster, arrivals_of(requests), seed))
    policy = "flowkv" if lends else "static"
    simulated = [
        simulate(machines, num_each, policy, delayed(requests, number), targets, seed)
        for number in range(NUM_SIMULATED)
    ]
    return {
        "rate_per_s": round(len(requests) / requests[-1].arrival_s, 3),
        "targets": targets._asdict(),
        **compare(outcomes, simulated, targets),
        "measured_moves": observed.num_cap_moves,
        "simulated_moves": fmean(outcome.num_lendings for outcome in simulated),
        "pace": started.pace,
    }


def earlier_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of `--json`. Raises BenchmarkFailed if they are of other requests."""
    document = json.loads(options.json.read_text())
    for name in ("requests", "seed", "longest"):
        before, now = document["conditions"][name], getattr(options, name)
        if before != now:
            raise BenchmarkFailed(f"{options.json} was begun with --{name} {before}: give that, not {now}")
    return [{**row, "pace": Pace(**row["pace"])} for row in document["rows"]]


def cell_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in CELL)


def asked_exactly(request: Request) -> Request:
    """As clients of `drive` ask: paced nodes end no answer by themselves."""
    return request._replace(max_tokens=request.num_output_tokens)


def delayed(requests: Sequence[Request], seed: int) -> list[Request]:
    """Each comes up to `MOST_DELAY_S` later."""
    draw = random.Random(seed)
    late = [
        request._replace(arrival_s=request.arrival_s + draw.uniform(0.0, MOST_DELAY_S))
        for request in requests
    ]
    return sorted(late, key=attrgetter("arrival_s"))


def points_off(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each cell the share of good requests, the mean of its runs, and how far the simulator is off."""
    shown = []
    for key in dict.fromkeys(cell_of(row)[:-1] for row in rows):
        here = [row for row in rows if cell_of(row)[:-1] == key]
        good = {
            side: [100 * row[f"{side}_good"] / row["num_requests"] for row in here]
            for side in ("measured", "simulated")
        }
        shown.append(
            {
                **dict(zip(CELL, key, strict=False)),
                **{f"{side} good %": fmean(values) for side, values in good.items()},
                "points off": f"{fmean(good['simulated']) - fmean(good['measured']):+.1f}",
                "measured in each run": " ".join(f"{value:.0f}" for value in good["measured"]),
                "worst pace": max((row["pace"] for row in here), key=lambda pace: pace.slip),
            }
        )
    return shown


def beside_real_nodes(options: argparse.Namespace, chosen: list[Request], report: Report) -> None:
    """One cluster, each rate."""
    kind = msgspec.structs.replace(SMOLLM2_CPU, num_blocks=options.blocks)
    with start_cluster(
        options.model,
        {"prefill": 1, "decode": 1},
        settings={
            "token_budget": kind.token_budget,
            "max_num_seqs": kind.max_num_seqs,
            "kv_cache_bytes": kind.num_blocks * kind.layout.block_bytes,
            **goals_of(REAL_TARGETS),
        },
    ) as started:
        for rate in options.rates:
            report.say(f"{rate} requests/s")
            requests = at_rate(chosen, rate, options.seed)
            outcomes, observed = asyncio.run(
                drive_observed(started.cluster, arrivals_of(requests), options.seed)
            )
            if unknown := {"prefill-0", "decode-0"} - observed.fits.keys():
                raise BenchmarkFailed(
                    f"too few steps to tell what they cost at {sorted(unknown)}: send more requests"
                )
            fits = {name: msgspec.structs.asdict(fit) for name, fit in observed.fits.items()}
            report.conditions["fits"] = fits
            prefill = msgspec.structs.replace(kind, fit=observed.fits["prefill-0"])
            decode = msgspec.structs.replace(kind, fit=observed.fits["decode-0"])
            machines = Machines(prefill, 2, decode_kind=decode)
            outcome = simulate(machines, 1, "flowkv", requests, REAL_TARGETS, options.seed)
            report.add_row(cluster="1P1D", rate_per_s=rate, **compare(outcomes, [outcome], REAL_TARGETS))


def goals_of(targets: Targets) -> dict[str, object]:
    """The settings of a scheduler that has these targets."""
    return {"ttft_goal_s": targets.ttft_s, "itl_goal_s": targets.tpot_s}


def compare(
    outcomes: Sequence[Outcome], simulated: Sequence[SimOutcome], targets: Targets
) -> dict[str, object]:
    """Good requests, those that missed the TTFT or the TPOT target, and means over all that were served.

    Of `simulated`, the means of the runs. `tokens_per_s` is from the first arrival to the last token. What is
    a mean of nothing is None.
    """
    served = [outcome for outcome in outcomes if outcome.is_complete]
    num_tokens = sum(len(outcome.token_ids) for outcome in served)
    ended_s = max((outcome.sent_s + outcome.ended_s for outcome in served), default=0.0)
    real = (
        sum(targets.are_met(outcome.ttft_s, outcome.tpot_s) for outcome in served),
        len(served),
        sum((outcome.ttft_s or 0.0) > targets.ttft_s for outcome in served),
        sum(outcome.tpot_s > targets.tpot_s for outcome in served),
        _mean([outcome.ttft_s or 0.0 for outcome in served]),
        _mean([outcome.tpot_s for outcome in served if len(outcome.token_ids) > 1]),
        num_tokens / ended_s if served else None,
    )
    runs = zip(*(simulated_figures(outcome, targets) for outcome in simulated), strict=True)
    imagined = [_mean([value for value in values if value is not None]) for values in runs]
    found: dict[str, object] = {"num_requests": len(outcomes)}
    for name, one, other in zip(MEANS, real, imagined, strict=True):
        found |= {f"measured_{name}": one, f"simulated_{name}": other}
    off_by = (
        f"{other / one - 1:+.1%}" if one and other else "unknown"
        for one, other in zip(real[-3:], imagined[-3:], strict=True)
    )
    return {**found, "simulator_off_by": " ".join(off_by)}  # of the last three


def simulated_figures(outcome: SimOutcome, targets: Targets) -> tuple[float | None, ...]:
    """`MEANS` of one run."""
    lives = [life for life in outcome.lives if life.is_done]
    last_s = max((life.last_token_s for life in lives), default=0.0)
    return (
        outcome.num_good,
        len(lives),
        sum(life.ttft_s > targets.ttft_s for life in lives),
        sum(life.tpot_s > targets.tpot_s for life in lives),
        _mean([life.ttft_s for life in lives]),
        _mean([life.tpot_s for life in lives if life.request.num_output_tokens > 1]),
        sum(life.request.num_output_tokens for life in lives) / last_s if lives else None,
    )


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("simulated", __doc__, model=True)
    parser.add_argument("--trace", nargs="+", default=["synthetic"], help="files, or made up")
    parser.add_argument("--requests", type=int, default=100, help="a window of the trace")
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    parser.add_argument("--real", action="store_true", help="1P1D of nodes that compute the model")
    parser.add_argument(
        "--longest", type=int, default=MAX_MODEL_LEN, help="prompt and answer are cut to so many tokens"
    )
    paced = parser.add_argument_group("beside paced nodes")
    paced.add_argument("--nodes", type=int, nargs="+", default=[2, 4], help="of each role")
    paced.add_argument("--loads", type=float, nargs="+", default=[0.7, 1.0, 1.3])
    paced.add_argument("--lending", nargs="+", choices=["off", "on"], default=["off", "on"])
    paced.add_argument("--runs", type=int, default=1, help="of each cell, each with another seed")
    paced.add_argument("--resume", action="store_true", help="run only cells that the file of --json lacks")
    real = parser.add_argument_group("with --real")
    real.add_argument("--rates", type=float, nargs="+", default=[0.15, 0.3], help="requests per second")
    real.add_argument("--blocks", type=int, default=4096, help="of each node's pool, 16 tokens each")
    return parser.parse_args(argv)
