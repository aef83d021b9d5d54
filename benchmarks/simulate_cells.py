"""Policies on traces, loads and mixes of nodes: how good is FlowKV beside what hindsight would have chosen?

A cell is a trace, a load, and nodes that are alike or half of them slow; it is run with several seeds. The
load is a share of what the best static split carries of the first seed's requests, found first.

With `--beside FILE` only the policies that are named are run: the load and the others are those of FILE, an
earlier run with the same cells.

Nodes are few and the slowest that hold the longest prompt, so that a thousand requests last for minutes: what
a policy does by lending shows only over many report periods.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from benchmarks import BenchmarkFailed
from benchmarks.report import Report, make_parser
from benchmarks.simulator.bound import most_good
from benchmarks.simulator.kinds import KINDS, TPOT_FACTOR, default_targets, slowest_that_holds
from benchmarks.simulator.run import (
    ALL_POLICIES,
    BEST_STATIC,
    LEAST_RATE,
    MIXED,
    Machines,
    capacity,
    figures,
    run_policy,
)
from benchmarks.traffic import MADE_UP, read_window
from flowkv.bench.traces import ASKED_NEW_TOKENS, at_rate, cut_to

LOADS = (0.7, 1.0, 1.3)
MIXES = ALIKE, SLOW_HALF = "alike", "slow-half"
# What the scheduler's constants may be tuned on, and what its figures are reported on (docs/simulator.md).
TUNING = ("code", "agents", "bursts", "giants", "documents", "turns", "alternating", "ramp", "shifting")
TUNING_SEEDS = range(100, 105)
REPORTING = (*TUNING, "hot", "batchy", "bimodal", "synthetic")  # and the trace files
REPORTING_SEEDS = range(5)

# A cell is the same as another one, but for load and seed, if these are.
NAMES = ("trace", "mix", "nodes", "num_nodes", "num_requests")
BOUND = "bound"  # an upper limit for any policy
# What is told first.
SHOWN = ("flowkv", "static", BEST_STATIC, MIXED, BOUND)
ALL = (*ALL_POLICIES, BOUND)

Cell = dict[str, Any]


class Task(NamedTuple):
    """The cells of one trace, mix of nodes and seed; their loads share one capacity.

    `options` are the command's, `known` the cells of `--beside` and of the first seed.
    """

    trace: str
    mix: str
    seed: int
    options: argparse.Namespace
    known: Sequence[Cell] = ()


def main(argv: Sequence[str]) -> int:
    options = parse_options(argv)
    traces = options.trace or (TUNING if options.tuning else REPORTING)
    seeds = options.seeds or (TUNING_SEEDS if options.tuning else REPORTING_SEEDS)
    if missing := [trace for trace in traces if trace not in MADE_UP and not Path(trace).exists()]:
        raise BenchmarkFailed(f"no such trace: {', '.join(missing)}")
    known = json.loads(options.beside.read_text())["rows"] if options.beside else []
    report = Report(options)
    places = list(product(traces, options.mixes))
    began = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(min(options.jobs, len(seeds) * len(places))) as workers:
        for these in (seeds[:1], seeds[1:]):
            tasks = [
                Task(trace, mix, seed, options, [*known, *report.rows])
                for seed, (trace, mix) in product(these, places)
            ]
            for cells in workers.imap_unordered(run_task, tasks):
                report.say(f"{cells[0]['trace']}, {cells[0]['mix']}, seed {cells[0]['seed']}")
                report.rows += cells
                report.write()
    order = [Path(trace).name for trace in traces]
    report.rows.sort(key=lambda cell: (order.index(cell["trace"]), cell["mix"], cell["load"], cell["seed"]))
    report.more["wall_s"] = time.monotonic() - began
    shown = means_of(report.rows)
    report.finish(shown=shown)
    print("\n".join(differences(shown)))
    return 0


def run_task(task: Task) -> list[Cell]:
    """One cell per load: what each policy made of it.

    `rate` is the load's; `carried` is the rate that the best static split carries, `lending_carries` the one
    that FlowKV does from half of the nodes on each side.
    """
    trace, mix, seed, options, known = task
    requests = read_window(trace, options.requests, seed)
    longest = max(request.num_prompt_tokens for request in requests) + ASKED_NEW_TOKENS
    kind = KINDS[options.nodes] if options.nodes else slowest_that_holds(longest)
    machines = Machines(kind, options.num_nodes, mix == SLOW_HALF)
    requests = cut_to(requests, kind.max_model_len)
    targets = default_targets(kind, requests, options.tpot_factor)
    half = options.num_nodes // 2
    place = Path(trace).name, mix, kind.name, options.num_nodes, options.requests
    of_any_seed = [
        cell
        for cell in known
        if tuple(cell[name] for name in NAMES) == place
        and cell.get("tpot_factor", TPOT_FACTOR) == options.tpot_factor
    ]
    known = [cell for cell in of_any_seed if cell["seed"] == seed]
    shared: Cell = dict(zip(NAMES, place, strict=True))
    shared |= {"seed": seed, "tpot_factor": options.tpot_factor}
    if of_any_seed:
        first = (known or of_any_seed)[0]
        shared |= {"carried": first["carried"], "best_prefill": first["best_prefill"]}
    else:
        carried = capacity(machines, requests, targets, seed)
        shared |= {"carried": carried.rate, "best_prefill": carried.num_prefill}
    if options.capacity:
        lending = capacity(machines, requests, targets, seed, "flowkv", splits=[half])
        shared["lending_carries"] = lending.rate
    cells: list[Cell] = []
    for load in options.loads:
        rate = load * max(shared["carried"], LEAST_RATE * options.num_nodes)
        timed = at_rate(requests, rate, seed)
        earlier: Cell = next((cell for cell in known if cell["load"] == load), {"runs": {}})
        runs: Cell = {}
        for policy in options.policy:
            if policy == BOUND:
                runs[BOUND] = {"good_share": most_good(machines, timed, targets) / len(timed)}
            else:
                likely = shared["best_prefill"]
                runs[policy] = figures(run_policy(policy, machines, half, timed, targets, seed, likely))
        cells.append({**earlier, **shared, "load": load, "rate": rate, "runs": {**earlier["runs"], **runs}})
    return cells


def means_of(cells: Sequence[Cell]) -> list[Cell]:
    """For each trace, mix and load: the share of good requests by policy, the mean of all seeds, in percent.

    `of bound` is FlowKV's share of the bound. `carries` is what FlowKV carries, over what the best static
    split does.
    """
    rows = []
    names = ("trace", "mix", "load")
    for key in dict.fromkeys(tuple(cell[name] for name in names) for cell in cells):
        here = [cell for cell in cells if tuple(cell[name] for name in names) == key]
        row = {**dict(zip(names, key, strict=True)), "requests/s": mean(cell["rate"] for cell in here)}
        policies = dict.fromkeys(policy for cell in cells for policy in cell["runs"])
        for policy in sorted(policies, key=(*SHOWN, *ALL).index):
            row[policy] = 100 * mean(cell["runs"][policy]["good_share"] for cell in here)
        if row.keys() >= {"flowkv", BOUND}:
            row["of bound"] = f"{row['flowkv'] / row[BOUND]:.0%}"
        if all("lending_carries" in cell for cell in cells):
            lending, carried = (sum(cell[name] for cell in here) for name in ("lending_carries", "carried"))
            row["carries"] = lending / carried
        rows.append(row)
    return rows


def differences(rows: Sequence[Cell]) -> list[str]:
    """FlowKV less each of `SHOWN`, in points of good requests: the mean of all rows and the worst one."""
    lines = []
    for policy in SHOWN[1:-1]:
        points = [(row["flowkv"] - row[policy], row) for row in rows if {"flowkv", policy} <= row.keys()]
        if points:
            worst, row = min(points, key=lambda pair: pair[0])
            where = f"{row['trace']}, {row['mix']}, {row['load']:.0%}"
            lines.append(
                f"flowkv - {policy}: {mean(point for point, _ in points):+.1f} on average, "
                f"{worst:+.1f} at worst ({where})"
            )
    return lines


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("simulate-cells", __doc__)
    parser.add_argument(
        "--tuning", action="store_true", help="traffic and seeds for tuning, not for reporting"
    )
    parser.add_argument("--trace", nargs="+", help="instead: files, or made up: " + ", ".join(MADE_UP))
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS)
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=MIXES)
    parser.add_argument("--policy", nargs="+", choices=ALL, default=ALL)
    parser.add_argument(
        "--beside", type=Path, help="JSON of an earlier run: take from it what is not to be run"
    )
    parser.add_argument("--capacity", action="store_true", help="search what FlowKV carries, too")
    parser.add_argument(
        "--nodes", choices=KINDS, help="of one kind; without, the slowest that hold the longest prompt"
    )
    parser.add_argument("--num-nodes", type=int, default=8, help="half of them start on each side")
    parser.add_argument(
        "--tpot-factor", type=float, default=TPOT_FACTOR, help="the TPOT target, in steps of one sequence"
    )
    parser.add_argument("--requests", type=int, default=1200, help="in each run")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    return parser.parse_args(argv)
