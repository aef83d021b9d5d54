"""Six bad days of a cluster, each beside a steady one: how many requests are good, and who gets the work.

Services are real processes, nodes are paced (`tests/paced`). The nodes run beside the clients, in one process
per day: so one can be slowed, made to lie, or join in the middle. All days have the same steady chats.
"""

from __future__ import annotations

import asyncio
import math
import random
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise, product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import msgspec
import torch

from benchmarks.clusters import (
    NUM_BLOCKS,
    ONE_CORE,
    PACED_LIMITS,
    Pace,
    capacity,
)
from benchmarks.load import summarize, ttfts
from benchmarks.report import Report, cell, make_parser, spread
from benchmarks.simulator.batch import slowed
from flowkv.bench.load import Arrival, Lengths, Outcome, Phase, drive, poisson
from flowkv.bench.traces import Targets
from flowkv.local_cluster import Cluster
from flowkv_common.bus.connection import connect
from flowkv_common.config import NodeSettings
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Assignment
from flowkv_common.wire.nodes import CapMoved, LoadReport, RegimeChanged
from flowkv_node import reporting
from flowkv_node.node import Node
from tests.paced.cluster import READY_TIMEOUT_S, node_settings, paced_settings, services, wait_linked
from tests.paced.engine import PacedEngine
from tests.paced.nodes import PacedNode, pace_of, paced_nodes

CHATS = Lengths(800, 150, spread=0.5)
# Of what four nodes of each side can do: three of a side can do it, too.
LOAD = 0.6
END_S = 10.0  # the last ones: who gets work when the trouble is known
BURST, BURST_SIZE = Lengths(200, 100), 50
# A prefill node computes such a prompt for 29 s, so it can't be in time itself.
GIANT = Lengths(16_000, 50)
SLOWNESS = 10.0
# The settings' defaults, for the door and the figures alike.
TARGETS = Targets(ttft_s=5.0, tpot_s=0.25)
# By then no answer can be good any more.
TIMEOUT_S = 60.0
SPLIT = {"prefill": 4, "decode": 4}
# What a node says of its costs.
COSTS = ("step", "prefill_tokens_per_s", "decode_step_s")
# A node has lost its work when so many requests in a row go to others: one of four on its side, it would miss
# them by chance three times in a thousand.
NUM_ELSEWHERE = 20


class Day(NamedTuple):
    """`trouble`: what becomes of the node `who` in the middle."""

    nodes: Mapping[str, int] = SPLIT
    more: Callable[[float], Iterable[Arrival]] = lambda _: ()  # in so many seconds
    trouble: Literal["", "slow", "lies", "joins"] = ""
    who: str = ""


def burst(seconds: float) -> list[Arrival]:
    return [Arrival(seconds / 2, *BURST[:2], "burst")] * BURST_SIZE


def giants(seconds: float) -> list[Arrival]:
    return [Arrival(share * seconds, *GIANT[:2], "giant") for share in (0.2, 0.4)]


DAYS = {
    "steady": Day(),
    "burst": Day(more=burst),
    "giants": Day(more=giants),
    "slow prefill node": Day(trouble="slow", who="prefill-0"),
    "slow decode node": Day(trouble="slow", who="decode-0"),
    "lying prefill node": Day(trouble="lies", who="prefill-0"),
    "lying decode node": Day(trouble="lies", who="decode-0"),
    "joining node": Day(nodes={**SPLIT, "prefill": 3}, trouble="joins", who="prefill-3"),
    "only mixed nodes": Day(nodes={"mixed": 8}),
}


@dataclass
class Seen:
    """What the scheduler did, by seconds since the first request could come."""

    began: float
    seconds: float  # for which requests come
    chosen: list[tuple[float, Collection[str]]] = field(default_factory=list)  # the nodes of each assignment
    regimes: list[tuple[float, str]] = field(default_factory=list)
    num_cap_moves: int = 0

    @property
    def now_s(self) -> float:
        return time.monotonic() - self.began

    def hear(self, message: Assignment | RegimeChanged | CapMoved) -> None:
        match message:
            case Assignment():
                self.chosen.append((self.now_s, {message.prefill.node_id, message.decode.node_id}))
            case RegimeChanged():
                self.regimes.append((self.now_s, message.after))
            case CapMoved():
                self.num_cap_moves += 1

    def share_at_the_end(self, who: str) -> float:
        """Of the requests that were assigned in the last `END_S`, those that the node has a part in."""
        here = [nodes for at_s, nodes in self.chosen if self.seconds - END_S <= at_s < self.seconds]
        return sum(who in nodes for nodes in here) / max(1, len(here))

    def moved_after_s(self, day: Day) -> float | None:
        """From the middle until the day's node has lost its work, or has got the first; None: never."""
        later = [(at_s - self.seconds / 2, day.who in nodes) for at_s, nodes in self.chosen]
        named_s = [round(at_s, 2) for at_s, is_named in later if is_named and at_s >= 0]
        if day.trouble == "joins":
            return named_s[0] if named_s else None
        for before_s, after_s in pairwise([0.0, *named_s, math.inf]):
            if sum(before_s < at_s < after_s for at_s, _ in later) >= NUM_ELSEWHERE:
                return before_s
        return None

    def overload_s(self) -> float:
        """For how long the scheduler saw an overload while requests came."""
        changes = [*(each for each in self.regimes if each[0] < self.seconds), (self.seconds, "")]
        return sum(after - at_s for (at_s, regime), (after, _) in pairwise(changes) if regime == "overload")


@dataclass
class Claims:
    """What nodes say of themselves: those of `stuck` these costs for ever, those of `liars` fairy tales."""

    latest: dict[str, LoadReport] = field(default_factory=dict)
    stuck: dict[str, LoadReport] = field(default_factory=dict)
    liars: set[str] = field(default_factory=set)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Nodes of this process report so while the context lasts."""
        true_report = reporting.load_report

        def load_report(node: Node, seq: int, pool: str = "") -> LoadReport:
            report, name = true_report(node, seq, pool), node.ref.node_id
            self.latest[name] = report
            if said := self.stuck.get(name):
                costs = {cost: getattr(said, cost) for cost in COSTS}
                report = msgspec.structs.replace(report, **costs)
            return idle(report) if name in self.liars else report

        with patch.object(reporting, "load_report", load_report):
            yield


def idle(report: LoadReport) -> LoadReport:
    """What the node would report that had nothing to do, and were ten times faster than the others are."""
    blocks = report.blocks
    free = blocks.total - blocks.cached - blocks.quarantined
    return msgspec.structs.replace(
        report,
        queued_prefill_tokens=0,
        interruptible_prefill_tokens=0,
        queued_attended=0,
        interruptible_attended=0,
        num_prompts=0,
        num_waiting=0,
        num_running=0,
        num_context_tokens=0,
        forecast=None,
        blocks=msgspec.structs.replace(blocks, leased=0, free=free, longest_free_run=free),
        step=slowed(ONE_CORE, 1 / SLOWNESS),
    )


def run_day(name: str, seed: int, model: str, seconds: float) -> dict[str, Any]:
    """Raises ClusterError or TimeoutError when the cluster does not get ready."""
    torch.set_num_threads(1)
    day = DAYS[name]
    rng = random.Random(seed)
    rate = LOAD * capacity(ONE_CORE, SPLIT["prefill"], SPLIT["decode"], CHATS).per_s
    chats = poisson([Phase("chat", rate, seconds, CHATS)], rng)
    arrivals = sorted([*chats, *day.more(seconds)])
    with tempfile.TemporaryDirectory(prefix="flowkv-bench-") as folder:
        with services(Path(folder), model, paced_settings(NUM_BLOCKS)) as cluster:
            settings = node_settings(cluster, model, NUM_BLOCKS, **PACED_LIMITS)
            outcomes, seen, pace = asyncio.run(live(day, cluster, settings, arrivals, seconds))
    return {"day": name, "seed": seed, "who": day.who, **figures_of(day, outcomes, seen), "pace": pace}


async def live(
    day: Day, cluster: Cluster, settings: NodeSettings, arrivals: Sequence[Arrival], seconds: float
) -> tuple[list[Outcome], Seen, Pace]:
    """From the first request to the last answer."""
    pace, claims = pace_of(settings.model_path, ONE_CORE), Claims()
    joining = PacedNode(day.who, day.who.partition("-")[0])

    async def make_trouble() -> None:
        await asyncio.sleep(seconds / 2)
        if day.trouble == "joins":
            await joining.run(settings, pace)
        elif day.trouble:
            engine_of(nodes[day.who]).slowdown = SLOWNESS
            claims.stuck[day.who] = claims.latest[day.who]
            if day.trouble == "lies":
                claims.liars.add(day.who)

    with claims.told():
        async with (
            connect(cluster.nats_url, name="bench") as bus,
            paced_nodes(settings, pace, day.nodes) as nodes,
        ):
            await wait_linked(cluster.nats_url, len(nodes))
            await asyncio.to_thread(cluster.wait_ready, READY_TIMEOUT_S)
            seen = Seen(time.monotonic(), seconds)
            async with (
                await bus.subscribe(subjects.assignment("*"), Assignment, seen.hear),
                await bus.subscribe(subjects.event("regime_changed", ">"), RegimeChanged, seen.hear),
                await bus.subscribe(subjects.event("cap_moved", ">"), CapMoved, seen.hear),
                asyncio.TaskGroup() as tasks,
            ):
                tasks.create_task(make_trouble())
                outcomes = await drive(cluster.url, arrivals, timeout_s=TIMEOUT_S)
                joining.stop.set()
            for node in nodes.values():
                engine_of(node).slowdown = 1.0  # or it drains for minutes
        return outcomes, seen, Pace.of(engine_of(node).kept for node in nodes.values())


def engine_of(node: PacedNode) -> PacedEngine:
    assert node.engine is not None
    return node.engine


def figures_of(day: Day, outcomes: Sequence[Outcome], seen: Seen) -> dict[str, Any]:
    """Of all requests, and apart from them of the steady chats."""
    chats = [each for each in outcomes if each.arrival.kind == "chat"]
    return {
        **summarize(outcomes, TARGETS, seen.seconds),
        "good_percent": percent_good(outcomes),
        "chats_good_percent": percent_good(chats),
        "chats_ttft_s": ttfts(chats),
        "num_refused": sum(each.status == 429 for each in outcomes),
        "num_chats_refused": sum(each.status == 429 for each in chats),
        "share_at_the_end": round(seen.share_at_the_end(day.who), 3) if day.trouble else None,
        "moved_after_s": seen.moved_after_s(day) if day.trouble else None,
        "overload_s": round(seen.overload_s(), 2),
        "num_cap_moves": seen.num_cap_moves,
    }


def percent_good(outcomes: Sequence[Outcome]) -> float:
    good = sum(each.is_complete and TARGETS.are_met(each.ttft_s, each.tpot_s) for each in outcomes)
    return round(100 * good / len(outcomes), 1)


def main(argv: Sequence[str]) -> int:
    parser = make_parser("bad-days", __doc__, model=True)
    parser.add_argument("--days", nargs="+", choices=DAYS, default=list(DAYS), metavar="DAY")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=50.0, help="for which requests come, each day")
    parser.add_argument("--at-once", type=int, default=3, help="clusters; each takes a fifth of a core")
    options = parser.parse_args(argv)
    report = Report(options, fit=ONE_CORE, chats=CHATS._asdict(), load=LOAD)
    context = get_context("spawn")
    with ProcessPoolExecutor(options.at_once, context, max_tasks_per_child=1) as pool:
        runs = [
            pool.submit(run_day, name, seed, options.model, options.seconds)
            for seed, name in product(options.seeds, options.days)
        ]
        for run in runs:
            report.add_row(**run.result())
            report.say("{day}, seed {seed}: {good_percent} % good, pace {pace}".format(**report.rows[-1]))
    return report.finish(shown=by_day(report.rows))


def by_day(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of the seeds the median; of good requests also the least and the most."""
    shown = []
    for name in dict.fromkeys(row["day"] for row in rows):
        here = [row for row in rows if row["day"] == name]
        has_trouble = bool(DAYS[name].trouble)
        shown.append(
            {
                "day": name,
                "good %": spread(row["good_percent"] for row in here),
                "chats good %": spread(row["chats_good_percent"] for row in here),
                **{
                    f"TTFT {part} s": median(getattr(row["chats_ttft_s"], part) for row in here)
                    for part in ("p50", "p90", "p99")
                },
                "refused": median(row["num_refused"] for row in here),
                "overload s": median(row["overload_s"] for row in here),
                "share at the end %": median(100 * row["share_at_the_end"] for row in here)
                if has_trouble
                else None,
                "moved after s": " ".join(cell(row["moved_after_s"]) or "never" for row in here)
                if has_trouble
                else None,
                "worst pace": max((row["pace"] for row in here), key=lambda pace: pace.slip),
            }
        )
    return shown
