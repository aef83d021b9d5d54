"""16 nodes on 4 hosts under load, while one host after the other is killed or cut off, and comes back.

Hosts are network namespaces (`benchmarks/hosts.py`), nodes are paced (`tests/paced`): their tokens are a
function of the tokens before them, read out of the KV cache that was moved. So each token is checked. NATS,
schedulers, gateway and clients are on this host, which nothing happens to. It needs root.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks.clusters import PACED_LIMITS, listening
from benchmarks.hosts import Hosts
from benchmarks.report import Report, make_parser, quantiles
from flowkv.bench.load import Arrival, Lengths, Outcome, Phase, poisson, stream
from flowkv.bench.traces import TOKEN_IDS
from flowkv.local_cluster import Cluster
from flowkv_common.bus.connection import Bus, connect
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import RequestFinished
from flowkv_common.wire.nodes import Check, Checked, LoadReport, StepFit
from tests.paced.cluster import READY_TIMEOUT_S, nodes_command, paced_settings, services, wait_linked
from tests.paced.digest import paced_tokens
from tests.paced.nodes import pace_of

NODES_PER_HOST = {"prefill": 2, "decode": 2}
NUM_BLOCKS = 1024
FIT = StepFit(
    base_s=0.04, prefill_token_s=0.0005, attended_token_s=0.0, sequence_s=0.002, context_token_s=0.0
)
CHATS = Lengths(200, 100, spread=0.5)  # of some 5 s
TIMEOUT_S = 120.0
# A host is away for so long: shorter and longer than its records are kept without it (6 s).
OUTAGE_S = (2.0, 12.0)
# Between the return of a host and the next blow.
CALM_S = (3.0, 10.0)
BACK_TIMEOUT_S = 60.0
IDLE_TIMEOUT_S = 30.0
Blow = Literal["host killed", "link cut"]
BLOWS: tuple[Blow, ...] = ("host killed", "link cut")
COLUMNS = (
    "what", "times", "requests", "complete", "failed", "wrong_tokens", "retried", "longest_pause_s", "back_s",
)  # fmt: skip


class Trouble(NamedTuple):
    """What became of a host. Times are seconds since the first request could come."""

    blow: Blow
    host: int
    at_s: float
    outage_s: float
    back_s: float  # from the end of the outage until all its nodes are ready and linked with all others


@dataclass
class Asked:
    """A request: what it should get, and what it got."""

    outcome: Outcome
    expected: list[int]
    num_attempts: int = 0

    @property
    def num_wrong_tokens(self) -> int:
        """Of one that is not complete, only what has come is looked at."""
        got = self.outcome.token_ids
        num_missing = len(self.expected) - len(got) if self.outcome.is_complete else 0
        return abs(num_missing) + sum(one != other for one, other in zip(got, self.expected, strict=False))

    @property
    def longest_pause_s(self) -> float:
        """Without a token, the time to the first one included."""
        return max([self.outcome.ttft_s or self.outcome.ended_s, *self.outcome.itls_s])

    def lives_at(self, at_s: float) -> bool:
        return self.outcome.sent_s < at_s < self.outcome.sent_s + self.outcome.ended_s


def main(argv: Sequence[str]) -> int:
    parser = make_parser("many-hosts", __doc__, model=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--rate", type=float, default=5.0, help="requests per second")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    nodes = " and ".join(f"{count} {role}" for role, count in NODES_PER_HOST.items())
    report = Report(
        options,
        nodes=f"{nodes} nodes per host, paced, one process per host",
        lengths=CHATS._asdict(),
        outage_s=OUTAGE_S,
        shared="kernel, cores, clock and disks; NATS, 2 schedulers, gateway and clients are on no such host",
    )
    asked, troubles, num_held = run(
        options.model, options.hosts, 60 * options.minutes, options.rate, options.seed
    )
    report.more = {
        "blocks_held_at_the_end": num_held,
        "errors": Counter(one.outcome.error for one in asked if one.outcome.error),
        "troubles": [each._asdict() for each in troubles],
    }
    for row in rows(asked, troubles):
        report.add_row(**row)
    return report.finish(*COLUMNS)


def rows(asked: Sequence[Asked], troubles: Sequence[Trouble]) -> Iterator[dict[str, Any]]:
    """Per kind of blow what it did to the requests that were under way; then all requests."""
    for blow in BLOWS:
        here = [each for each in troubles if each.blow == blow]
        struck = [one for one in asked if any(one.lives_at(each.at_s) for each in here)]
        yield {"what": blow, "times": len(here), **figures(struck), **_back(here)}
    yield {"what": "all", "times": len(troubles), **figures(asked), **_back(troubles)}


def figures(asked: Collection[Asked]) -> dict[str, Any]:
    """`longest_pause_s` is of requests that were retried."""
    retried = [one for one in asked if one.num_attempts > 1]
    num_complete = sum(one.outcome.is_complete for one in asked)
    return {
        "requests": len(asked),
        "complete": num_complete,
        "failed": len(asked) - num_complete,
        "wrong_tokens": sum(one.num_wrong_tokens for one in asked),
        "retried": len(retried),
        "longest_pause_s": quantiles(one.longest_pause_s for one in retried),
    }


def _back(troubles: Iterable[Trouble]) -> dict[str, Any]:
    return {"back_s": quantiles(each.back_s for each in troubles)}


def run(
    model: str, num_hosts: int, seconds: float, rate_per_s: float, seed: int
) -> tuple[list[Asked], list[Trouble], int]:
    """A cluster from its start to its end: requests, troubles, and the blocks that are held at the end.

    Raises BenchmarkFailed where hosts can't be made, ClusterError or TimeoutError when it does not get ready.
    """
    with tempfile.TemporaryDirectory(prefix="flowkv-hosts-") as folder, Hosts(num_hosts) as hosts:
        with started(Path(folder), model, hosts, num_hosts) as system:
            return asyncio.run(measure(system, seconds, rate_per_s, seed))


@dataclass
class System:
    """The cluster, and the processes of its hosts."""

    cluster: Cluster
    hosts: Hosts
    num_hosts: int
    words: Sequence[int]

    @property
    def num_nodes(self) -> int:
        return self.num_hosts * sum(NODES_PER_HOST.values())

    def nodes_of(self, host: int) -> set[str]:
        return {f"host-{host}-{role}-{i}" for role, count in NODES_PER_HOST.items() for i in range(count)}

    def start_host(self, host: int) -> None:
        """All its processes: there is one."""
        folder = self.cluster.run_dir / f"host-{host}"
        folder.mkdir(exist_ok=True)
        address = self.hosts.address_of(host)
        where = ["--host", "0.0.0.0", "--advertise-host", address, "--socket-dir", str(folder)]
        command = nodes_command(NODES_PER_HOST, FIT, "--prefix", f"host-{host}-", *where)
        self.cluster.start_process(f"nodes-{host}", self.hosts.command(host, folder, command))

    def kill_host(self, host: int) -> None:
        self.cluster.processes[f"nodes-{host}"].kill()


@contextmanager
def started(folder: Path, model: str, hosts: Hosts, num_hosts: int) -> Iterator[System]:
    """A cluster that is ready, its nodes linked with each other."""
    settings = paced_settings(NUM_BLOCKS, **PACED_LIMITS)
    with services(folder, model, settings, num_schedulers=2, nats_host=hosts.address) as cluster:
        system = System(cluster, hosts, num_hosts, pace_of(model, FIT).words)
        for host in range(num_hosts):
            system.start_host(host)
        cluster.wait_ready(READY_TIMEOUT_S)
        asyncio.run(wait_linked(cluster.nats_url, system.num_nodes))
        yield system


async def measure(
    system: System, seconds: float, rate_per_s: float, seed: int
) -> tuple[list[Asked], list[Trouble], int]:
    rng = random.Random(seed)
    arrivals = list(poisson([Phase("chat", rate_per_s, seconds, CHATS)], rng))
    began = time.monotonic()
    async with (
        connect(system.cluster.nats_url, name="bench-hosts") as bus,
        standing(bus) as nodes,
        listening(system.cluster, "request_finished", RequestFinished) as finished,
    ):
        async with asyncio.TaskGroup() as tasks:
            making = tasks.create_task(make_trouble(system, nodes, random.Random(seed), began, seconds))
            asked = await ask_all(system, arrivals, rng, began)
        by_id = {one.outcome.request_id: one for one in asked}
        while not finished.empty():
            event = finished.get_nowait()
            if one := by_id.get(event.request_id):
                one.num_attempts = event.attempts
        return asked, making.result(), await blocks_held(system, bus)


async def ask_all(
    system: System, arrivals: Iterable[Arrival], rng: random.Random, began: float
) -> list[Asked]:
    """Each request when it is due, whatever became of others."""
    asked = []
    async with asyncio.TaskGroup() as tasks:
        for arrival in arrivals:
            prompt_ids = rng.choices(TOKEN_IDS, k=arrival.num_prompt_tokens)
            expected = paced_tokens(prompt_ids, arrival.num_output_tokens, system.words)
            await asyncio.sleep(began + arrival.at_s - time.monotonic())
            outcome = Outcome(arrival, time.monotonic() - began)
            asked.append(Asked(outcome, expected))
            tasks.create_task(stream(system.cluster.url, prompt_ids, outcome, timeout_s=TIMEOUT_S))
    return asked


async def make_trouble(
    system: System, nodes: Standing, rng: random.Random, began: float, seconds: float
) -> list[Trouble]:
    """One host after the other, at random, until so many seconds are over."""
    troubles: list[Trouble] = []
    while True:
        await asyncio.sleep(rng.uniform(*CALM_S))
        at_s, outage_s = time.monotonic() - began, rng.uniform(*OUTAGE_S)
        if at_s + outage_s > seconds:
            return troubles
        blow, host = BLOWS[len(troubles) % len(BLOWS)], rng.randrange(system.num_hosts)
        if blow == "host killed":
            await asyncio.to_thread(system.kill_host, host)
        else:
            await asyncio.to_thread(system.hosts.cut, host)
        await asyncio.sleep(outage_s)
        mended_at = time.monotonic()
        if blow == "host killed":
            await asyncio.to_thread(system.start_host, host)
        else:
            await asyncio.to_thread(system.hosts.mend, host)
        await nodes.wait_linked(system.nodes_of(host), system.num_nodes - 1, since=mended_at)
        troubles.append(Trouble(blow, host, at_s, outage_s, time.monotonic() - mended_at))


@dataclass
class Standing:
    """The last report of each node, and when it came (monotonic)."""

    reports: dict[str, tuple[float, LoadReport]] = field(default_factory=dict)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def hear(self, report: LoadReport) -> None:
        self.reports[report.node.node_id] = time.monotonic(), report
        self.news.set()

    async def wait_linked(self, node_ids: Iterable[str], num_peers: int, since: float) -> None:
        """Until each has reported since then that it is ready and has all links. Raises TimeoutError."""
        left = set(node_ids)
        async with asyncio.timeout(BACK_TIMEOUT_S):
            while left:
                for node_id in list(left):
                    heard_at, report = self.reports.get(node_id, (0.0, None))
                    if report and heard_at > since and report.ready and report.num_links >= num_peers:
                        left.remove(node_id)
                if left:
                    self.news.clear()
                    await self.news.wait()


@asynccontextmanager
async def standing(bus: Bus) -> AsyncIterator[Standing]:
    nodes = Standing()
    async with await bus.subscribe(subjects.LOAD_ALL, LoadReport, nodes.hear):
        yield nodes


async def blocks_held(system: System, bus: Bus) -> int:
    """By all nodes together, once they have had the time to let go. Each checks that it has lost none."""
    deadline = time.monotonic() + IDLE_TIMEOUT_S
    node_ids = [node_id for host in range(system.num_hosts) for node_id in system.nodes_of(host)]
    while True:
        checked = [
            await bus.request(subjects.at(subjects.NODE_CHECK, node_id), Check(), Checked, timeout_s=5)
            for node_id in node_ids
        ]
        num_held = sum(one.blocks.leased + one.blocks.quarantined for one in checked)
        if not num_held or time.monotonic() > deadline:
            return num_held
        await asyncio.sleep(0.5)
