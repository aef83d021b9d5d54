"""All policies on all traces, loads and mixes of nodes.

A cell is a trace, a load, and nodes that are alike or half of them slow; it is run with several seeds. The
load is a share of what the best static split carries of the same requests, found first.

Nodes are few and the slowest that hold the longest prompt, so that a thousand requests last for minutes: what
a policy does by lending shows only over many report periods.
"""

from __future__ import annotations

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
from benchmarks.simulator.kinds import KINDS, default_targets, slowest_that_holds
from benchmarks.simulator.run import ALL_POLICIES, LEAST_RATE, Machines, Scene, capacity, figures
from benchmarks.traces import ASKED_NEW_TOKENS, at_rate, cut_to
from benchmarks.traffic import MADE_UP, read_window

LOADS = (0.7, 1.0, 1.3)
# What the scheduler's constants may be tuned on, and what its figures are reported on (docs/simulator.md).
TUNING = ("code", "agents", "bursts", "giants", "turns", "alternating", "ramp", "shifting")
TUNING_SEEDS = range(100, 105)
REPORTING = (*TUNING, "hot", "batchy", "bimodal", "synthetic")  # and the trace files
REPORTING_SEEDS = range(5)


class Task(NamedTuple):
    """The cells of one trace, mix of nodes and seed: their loads share one capacity."""

    trace: str
    slow_half: bool
    seed: int
    nodes: str | None
    num_nodes: int
    num_requests: int


def main(argv: Sequence[str]) -> int:
    parser = make_parser("simulate-cells", __doc__)
    parser.add_argument("--trace", action="append", default=[], help="several; `shifting` is added")
    parser.add_argument(
        "--nodes", choices=KINDS, help="of one kind; without, the slowest that hold the longest prompt"
    )
    parser.add_argument("--num-nodes", type=int, default=8, help="half of them start on each side")
    parser.add_argument("--requests", type=int, default=1200, help="in each run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one seed, 300 requests")
    options = parser.parse_args(argv)
    num_seeds, num_requests = (1, 300) if options.quick else (options.seeds, options.requests)
    traces = [*options.trace, "shifting"]
    if missing := [trace for trace in traces if trace not in MADE_UP and not Path(trace).exists()]:
        raise BenchmarkFailed(f"no such trace: {', '.join(missing)}")
    report = Report(options)
    tasks = [
        Task(trace, slow_half, seed, options.nodes, options.num_nodes, num_requests)
        for seed, trace, slow_half in product(range(num_seeds), traces, (False, True))
    ]
    began = time.monotonic()
    cores = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("spawn").Pool(min(cores, len(tasks))) as workers:
        for number, cells in enumerate(workers.imap_unordered(run_task, tasks), 1):
            report.say(f"{number} of {len(tasks)}: {cells[0]['trace']}, seed {cells[0]['seed']}")
            report.rows += cells
    report.rows.sort(key=lambda c: (traces.index(c["trace"]), c["slow_half"], c["load"], c["seed"]))
    report.more["wall_s"] = time.monotonic() - began
    return report.finish(shown=means_of(report.rows))


def run_task(task: Task) -> list[dict[str, Any]]:
    """One cell per load: what each policy made of it.

    `rate` is the load's; `carried` is the rate that the best static split carries, `lending_carries` the one
    that FlowKV does from half of the nodes on each side.
    """
    requests = read_window(task.trace, task.num_requests, task.seed)
    longest = max(request.num_prompt_tokens for request in requests) + ASKED_NEW_TOKENS
    kind = KINDS[task.nodes] if task.nodes else slowest_that_holds(longest)
    machines = Machines(kind, task.num_nodes, task.slow_half)
    requests = cut_to(requests, kind.max_model_len)
    targets = default_targets(kind, requests)
    carried = capacity(machines, requests, targets, task.seed)
    half = task.num_nodes // 2
    lending = capacity(machines, requests, targets, task.seed, "flowkv", splits=[half])
    cells = []
    for load in LOADS:
        rate = load * max(carried.rate, LEAST_RATE * task.num_nodes)
        timed = at_rate(requests, rate, task.seed)
        scene = Scene(machines, half, timed, targets, rate, task.seed, carried.num_prefill)
        cells.append(
            {
                "trace": task.trace,
                "load": load,
                "slow_half": task.slow_half,
                "seed": task.seed,
                "nodes": kind.name,
                "rate": rate,
                "carried": carried.rate,
                "lending_carries": lending.rate,
                "best_prefill": carried.num_prefill,
                "runs": [figures(scene.outcome(policy)) for policy in ALL_POLICIES],
            }
        )
    return cells


def means_of(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each trace, mix and load: the share of good requests by policy, the mean of all seeds, in percent.

    `carries` is what FlowKV carries, over what the best static split does.
    """
    rows = []
    names = ("trace", "slow_half", "load")
    for key in dict.fromkeys(tuple(cell[name] for name in names) for cell in cells):
        here = [cell for cell in cells if tuple(cell[name] for name in names) == key]
        carries = sum(cell["lending_carries"] for cell in here) / sum(cell["carried"] for cell in here)
        shares = {
            policy: 100 * mean(cell["runs"][place]["good_share"] for cell in here)
            for place, policy in enumerate(ALL_POLICIES)
        }
        rate = mean(cell["rate"] for cell in here)
        rows.append({**dict(zip(names, key, strict=True)), "requests/s": rate, "carries": carries, **shares})
    return rows
