"""Time to the second token, KV sent while later chunks compute or after them, beside one node.

One request at a time. Each node has its own cores; NATS, scheduler, gateway and client run anywhere.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks import BenchmarkFailed
from benchmarks.clusters import event_of, listening, start_cluster
from benchmarks.load import check_complete
from benchmarks.report import Report, make_parser, spread
from flowkv.bench.load import ask
from flowkv.local_cluster import Cluster
from flowkv_common.wire.messages import KVTransferred

CHUNK_TOKENS = 512
LENGTHS = (500, 1000, 2000, 4000)
NUM_WARMUPS = 2
WARMUP_TOKENS = 600  # more than one chunk


class Setup(NamedTuple):
    """`cores` says for each role on how many cores its one node runs; a core belongs to one node."""

    title: str
    cores: dict[str, int]
    settings: dict[str, object]


# No chunk keeps such an ITL target, so no prompt stays on the idle decode node; nor is that node lent. With
# such a TTFT target none waits for the other one, until the decode node has reported that it is idle (0.5 s).
TINY_S = 0.000001
APART = {"token_budget": CHUNK_TOKENS, "itl_goal_s": TINY_S, "ttft_goal_s": TINY_S, "lending": False}
# A mixed node's chunk is half of its token budget: with twice the budget all setups cut prompts alike.
MIXED = {"token_budget": 2 * CHUNK_TOKENS}
SPLIT = {"prefill": 1, "decode": 1}
SETUPS = {
    "off": Setup("P + D, overlap off", SPLIT, {**APART, "overlap_transfer": False}),
    "on": Setup("P + D, overlap on", SPLIT, {**APART, "overlap_transfer": True}),
    "mixed-1": Setup("colocated, 1 core", {"mixed": 1}, dict(MIXED)),
    "mixed-2": Setup("colocated, 2 cores", {"mixed": 2}, dict(MIXED)),
}


class Sample(NamedTuple):
    """One request. `transferred` is missing where prefill and decode are one node."""

    num_tokens: int
    first_s: float
    second_s: float
    transferred: KVTransferred | None


def main(argv: Sequence[str]) -> int:
    parser = make_parser("overlap", __doc__, model=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(LENGTHS), help="prompt lengths")
    parser.add_argument("--repeat", type=int, default=7, help="requests per row")
    parser.add_argument("--connector", default="shm", choices=("shm", "tcp"))
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=list(SETUPS))
    options = parser.parse_args(argv)
    setups = {name: setup for name, setup in SETUPS.items() if name in options.setups}
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < max(sum(setup.cores.values()) for setup in setups.values()):
        raise BenchmarkFailed("not enough cores: each node needs its own")
    report = Report(options, chunk_tokens=CHUNK_TOKENS, setups=SETUPS)
    for name, setup in setups.items():
        report.say(f"{setup.title}: starting")
        free = iter(cores)
        mine = {role: {next(free) for _ in range(num)} for role, num in setup.cores.items()}
        num_threads = max(setup.cores.values())
        settings = {"connectors": options.connector, "num_threads": num_threads, **setup.settings}
        with start_cluster(options.model, {}, cores=mine, settings=settings) as started:
            samples = asyncio.run(measure(started.cluster, setup, options, report))
        report.rows += rows_of(name, samples)
        report.write()
    names = ("first_token_ms", "second_token_ms", "num_bytes", "num_copies", "hidden_ms", "exposed_ms")
    return report.finish("setup", "num_tokens", *names)


async def measure(
    cluster: Cluster, setup: Setup, options: argparse.Namespace, report: Report
) -> list[Sample]:
    """Some samples of each length, in turn, after some that don't count.

    Prompts are random and never repeat, so no prefix is cached. Raises BenchmarkFailed.
    """
    rng = random.Random(setup.title)
    samples = []
    async with listening(cluster, "kv_transferred", KVTransferred) as events:

        async def sample(num_tokens: int) -> Sample:
            outcome = await ask(cluster.url, rng, num_tokens, 2)
            check_complete([outcome])
            transferred = await event_of(events) if setup.cores == SPLIT else None
            return Sample(num_tokens, outcome.event_times_s[0], outcome.event_times_s[-1], transferred)

        for _ in range(NUM_WARMUPS):
            await sample(WARMUP_TOKENS)
        for number in range(options.repeat):
            samples += [await sample(num_tokens) for num_tokens in options.tokens]
            report.say(f"{setup.title}: {number + 1} of {options.repeat}")
    return samples


def rows_of(setup: str, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """One row for each prompt length. What was moved is missing where prefill and decode are one node."""
    rows = []
    for length in dict.fromkeys(sample.num_tokens for sample in samples):
        mine = [each for each in samples if each.num_tokens == length]
        events = [each.transferred for each in mine if each.transferred]
        row: dict[str, Any] = {
            "setup": setup,
            "num_tokens": length,
            "num_repeats": len(mine),
            "first_token_ms": spread(1e3 * each.first_s for each in mine),
            "second_token_ms": spread(1e3 * each.second_s for each in mine),
        }
        for name in ("num_bytes", "num_copies", "num_calls"):
            row[name] = statistics.median(getattr(event, name) for event in events) if events else None
        for name in ("total", "hidden", "exposed"):
            times = [1e3 * getattr(event, f"{name}_s") for event in events]
            row[f"{name}_ms"] = spread(times) if times else None
        rows.append(row)
    return rows
