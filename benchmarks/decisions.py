"""What a scheduling decision costs, by the number of nodes.

One planner, fed with the reports of many nodes and asked for pairs, as the scheduler's process does it, but
without NATS. Half of the nodes prefill, half decode; a third of each is three times slower. Requests end
after a while, so that a steady number of them is in flight. Nodes tell what is in their prefix caches.

With `--waiting` all decode nodes are full, so many requests wait and ask in turn, and one sequence ends per
ten asks. Who gets its place is replaced by a newcomer.

Then what an ask takes over the bus: nats-server, the scheduler, and the nodes that report are processes. Each
node reports and renews its record on a clock of its own, as real ones do: seldom two at once.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count, islice
from multiprocessing import get_context
from typing import Any

import msgspec
import psutil
from nats.aio.msg import Msg

from benchmarks.report import Report, make_parser, quantiles, time_s, transposed
from benchmarks.simulator.batch import slowed
from flowkv_common.aio import freeze_objects, running
from flowkv_common.bus.connection import Bus, connect
from flowkv_common.bus.registry import keep_announced, watch_nodes
from flowkv_common.errors import FlowKVError, Full
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Assignment, NodeRef, ScheduleRequest, Wait
from flowkv_common.wire.nodes import (
    BlockList,
    BlocksChanged,
    LoadReport,
    NodeDescriptor,
    OutputForecast,
    StepFit,
)
from flowkv_scheduler.cluster import Goals
from flowkv_scheduler.planner import Planner
from flowkv_scheduler.policy import Choice
from flowkv_scheduler.slices import Sliced
from tests import described_nodes
from tests.described_nodes import BLOCK_SIZE, INCARNATION, MODEL, schedule, until_answer
from tests.nats_server import NatsServer
from tests.scheduler_process import scheduler_process

PERIOD_S = 0.5
DECISIONS_PER_S = 5000
NUM_BLOCKS = 20_000
BLOCKS_PER_SEQUENCE = 70
MAX_NUM_SEQS = 256
# Of a full node: half of an answer.
TOKENS_LEFT = 128
ASKS_PER_END = 10
TOKEN_BUDGET = 2048
PROMPTS_CACHED = 10  # by each node: the last ones
# Over the bus.
ASKS_PER_S = 1000
REPORTS_PER_S = 4  # of each node: twice a second, and when it accepts something
RENEWAL_S = 2.0  # of each node's record in the registry
IDLE_S = 3.0  # that the processes are watched before the first ask
READY_TIMEOUT_S = 60.0
FIT = StepFit(
    base_s=0.008, prefill_token_s=4e-5, attended_token_s=1e-9, sequence_s=2e-5, context_token_s=1e-8
)


class Node:
    """What a node would report: counts of what it was given and has not finished, and its prefix cache."""

    def __init__(self, number: int) -> None:
        self.node_id, self.role = f"node-{number:04}", "decode" if number % 2 else "prefill"
        self.num_sequences = 0
        self.num_prompts_accepted = 0
        self.num_handed_over = 0
        self._fit = slowed(FIT, 1.0 if number % 3 else 3.0)
        self._cap = TOKEN_BUDGET if self.role == "prefill" else BLOCK_SIZE
        self._seq = self._news_seq = 0
        self._prompts: deque[list[str]] = deque()
        self._uses: Counter[str] = Counter()
        self._touched: set[str] = set()  # hashes that may have come or gone since the last news

    def descriptor(self) -> NodeDescriptor:
        shape = described_nodes.descriptor(
            self.node_id,
            self.role,
            num_blocks=NUM_BLOCKS,
            num_layers=32,
            num_kv_heads=8,
            head_dim=128,
            dtype="bfloat16",
        )
        return msgspec.structs.replace(
            shape, token_budget=TOKEN_BUDGET, max_prefill_tokens_per_step=self._cap
        )

    def report(self) -> LoadReport:
        self._seq += 1
        return described_nodes.report(
            self.node_id,
            self.role,
            num_blocks=NUM_BLOCKS,
            free=NUM_BLOCKS - self.num_sequences * BLOCKS_PER_SEQUENCE,
            seq=self._seq,
            max_prefill_tokens_per_step=self._cap,
            num_running=self.num_sequences,
            max_num_seqs=MAX_NUM_SEQS,
            num_context_tokens=self.num_sequences * 1100,
            num_prompts_accepted=self.num_prompts_accepted,
            num_rooms_given=self.num_handed_over,
            num_sequences_accepted=self.num_handed_over,
            step=self._fit,
            forecast=OutputForecast(
                tokens_left=self.num_sequences * TOKENS_LEFT, first_ends_in=1.0, stop_rate=0.5 / TOKENS_LEFT
            ),
        )

    def cache_prompt(self, hashes: list[str]) -> None:
        self._use(hashes, 1)
        self._prompts.append(hashes)
        if len(self._prompts) > PROMPTS_CACHED:
            self._use(self._prompts.popleft(), -1)

    def news(self) -> BlocksChanged:
        stored = [block_hash for block_hash in self._touched if self._uses[block_hash]]
        removed = [block_hash for block_hash in self._touched if not self._uses[block_hash]]
        for block_hash in removed:
            del self._uses[block_hash]
        self._touched.clear()
        self._news_seq += 1
        ref = NodeRef(node_id=self.node_id, incarnation=INCARNATION)
        return BlocksChanged(node=ref, seq=self._news_seq, stored=stored, removed=removed)

    def _use(self, hashes: list[str], sign: int) -> None:
        for block_hash in hashes:
            self._uses[block_hash] += sign
        self._touched.update(hashes)


def requests(seed: int) -> Iterator[ScheduleRequest]:
    """Prompts of about 1,000 tokens; every second one begins like one of 200 others."""
    draw = random.Random(seed)
    number = 0
    while True:
        number += 1
        num_tokens = max(16, round(draw.lognormvariate(6.9, 0.8)))
        chain = draw.randrange(200) if draw.random() < 0.5 else 1000 + number
        hashes = [f"{chain:08x}{place:08x}" * 2 for place in range(num_tokens // 16)]
        yield ScheduleRequest(
            request_id=f"r{number}",
            attempt=0,
            fingerprint=MODEL.fingerprint,
            num_prompt_tokens=num_tokens,
            max_new_tokens=300,
            block_hashes=hashes,
        )


def measure(num_nodes: int, num_in_flight: int, num_waiting: int, num_decisions: int) -> dict[str, Any]:
    """Asks `num_decisions` times, 5,000 a second; reports come in between as they would in that time."""
    freeze_objects()  # as the scheduler does when it starts
    planner = Planner(Goals(max_wait_s=1e9))
    nodes = [Node(number) for number in range(num_nodes)]
    by_id = {node.node_id: node for node in nodes}
    running: deque[Node] = deque()  # by its decode node; the scheduler keeps no choices either
    waiting: deque[tuple[float, ScheduleRequest]] = deque()  # since when
    if num_waiting:
        running.extend(node for node in nodes if node.role == "decode" for _ in range(MAX_NUM_SEQS))
        random.Random(0).shuffle(running)
        for node in running:
            node.num_sequences += 1
    planner.set_descriptors({node.node_id: node.descriptor() for node in nodes})
    for node in nodes:
        planner.add_report(node.report(), 0.0)
    process = psutil.Process()
    decisions_s: list[float] = []
    reports_s: list[float] = []
    news_s: list[float] = []
    ticks_s: list[float] = []
    slices_s: list[float] = []  # of ticks
    num_others, num_due, now = 0, 0.0, 0.0
    rss_before = 0
    newcomers = requests(0)
    for place in range(num_decisions):
        if place == num_decisions // 10:
            rss_before = process.memory_info().rss
        now += 1 / DECISIONS_PER_S
        num_due += num_nodes / PERIOD_S / DECISIONS_PER_S
        while num_due >= 1:
            num_due -= 1
            node = nodes[len(reports_s) % num_nodes]
            reports_s.append(time_s(partial(planner.add_report, node.report(), now)))
            news_s.append(time_s(partial(planner.state.prefixes.apply_change, node.news())))
        if place % (DECISIONS_PER_S * PERIOD_S) == 0:
            num_slices = len(slices_s)
            slices_s += slice_times_s(planner.tick(now))
            ticks_s.append(sum(slices_s[num_slices:]))
        if num_waiting and len(waiting) == num_waiting:
            since, request = waiting.popleft()
        else:
            since, request = now, next(newcomers)
        request = msgspec.structs.replace(request, age_s=now - since)
        began = time.perf_counter()
        try:
            decision = planner.schedule(request, now)
        except Full:
            decision = None
        decisions_s.append(time.perf_counter() - began)
        if num_waiting and place % ASKS_PER_END == 0:
            running.popleft().num_sequences -= 1
        if isinstance(decision, Wait):
            waiting.append((since, request))
        if not isinstance(decision, Choice):
            num_others += 1
            continue
        prefill, decode = by_id[decision.prefill.node_id], by_id[decision.decode.node_id]
        for node in {prefill, decode}:
            node.cache_prompt(request.block_hashes)
        prefill.num_prompts_accepted += 1
        decode.num_handed_over += 1
        decode.num_sequences += 1
        running.append(decode)
        if not num_waiting and len(running) > num_in_flight:
            running.popleft().num_sequences -= 1
    return {
        "num_nodes": num_nodes,
        "num_waiting": len(waiting),
        "num_in_flight": len(running),
        "num_decisions": num_decisions,
        "decisions_per_s": num_decisions / sum(decisions_s),
        "decision_us": quantiles(1e6 * each for each in decisions_s),
        "report_us": quantiles(1e6 * each for each in reports_s),
        "news_us": quantiles(1e6 * each for each in news_s),
        "tick_ms": quantiles(1e3 * each for each in ticks_s),
        "slice_us": quantiles(1e6 * each for each in slices_s),
        "longest_slice_us": 1e6 * max(slices_s),
        "rss_mb_before": rss_before / 1e6,
        "rss_mb_after": process.memory_info().rss / 1e6,
        "num_waits_and_refusals": num_others,
    }


def slice_times_s(work: Sliced[object]) -> Iterator[float]:
    """Of each slice, in seconds."""
    end = object()
    is_last = False
    while not is_last:
        began = time.perf_counter()
        is_last = next(work, end) is end
        yield time.perf_counter() - began


async def ask_over_bus(num_nodes: int, num_asks: int) -> dict[str, Any]:
    """Asks a scheduler that has its settings' defaults `num_asks` times, 1,000 a second; the first tenth does
    not count. The nodes report that they are idle: what they are given counts until it should have shown.

    Raises TimeoutError when the scheduler does not get to know the nodes.
    """
    asks_ms: list[float] = []
    answers: Counter[str] = Counter()

    async def ask(bus: Bus, request: ScheduleRequest) -> None:
        began = time.perf_counter()
        try:
            answer = await schedule(bus, request)
        except FlowKVError as error:
            answers[type(error).__name__] += 1
        else:
            asks_ms.append(1e3 * (time.perf_counter() - began))
            answers[type(answer).__name__] += 1

    known = asyncio.Event()

    def look(nodes: Mapping[str, NodeDescriptor]) -> None:
        if len(nodes) == num_nodes:
            known.set()

    with NatsServer() as server, reporting(server.url, num_nodes) as nodes_pid:
        async with scheduler_process(server) as scheduler, connect(server.url, name="bench") as bus:
            async with running(watch_nodes(bus, look)), asyncio.timeout(READY_TIMEOUT_S):
                await known.wait()
            await until_answer(bus, lambda answer: isinstance(answer, Assignment), READY_TIMEOUT_S)
            shares = CpuShares(nats=server.pid, scheduler=scheduler.pid, nodes=nodes_pid, client=os.getpid())
            await asyncio.sleep(IDLE_S)
            idle_shares = shares.since_last()
            began = time.perf_counter()
            async with asyncio.TaskGroup() as tasks:
                for number, request in enumerate(islice(requests(0), num_asks)):
                    await asyncio.sleep(began + number / ASKS_PER_S - time.perf_counter())
                    tasks.create_task(ask(bus, request))
            seconds = time.perf_counter() - began
            asking_shares = shares.since_last()
    return {
        "bus_ask_ms": quantiles(asks_ms[num_asks // 10 :]),
        "bus_asks_per_s": num_asks / seconds,
        "bus_answers": dict(answers),
        "bus_idle_cores": idle_shares,
        "bus_cores": asking_shares,
    }


class CpuShares:
    """How many cores each of some processes keeps busy, by name."""

    def __init__(self, **pids: int) -> None:
        self._processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        self._last = self._read()

    def since_last(self) -> dict[str, float]:
        """Since the last call, or since it was made."""
        (before_at, before), (now, after) = self._last, self._read()
        self._last = now, after
        return {name: (after[name] - before[name]) / (now - before_at) for name in after}

    def _read(self) -> tuple[float, dict[str, float]]:
        times = {name: process.cpu_times() for name, process in self._processes.items()}
        return time.perf_counter(), {name: each.user + each.system for name, each in times.items()}


@contextmanager
def reporting(url: str, num_nodes: int) -> Iterator[int]:
    """Nodes that report from another process while the context lasts; yields its id."""
    process = get_context("spawn").Process(target=report_nodes, args=(url, num_nodes), daemon=True)
    process.start()
    assert process.pid is not None
    try:
        yield process.pid
    finally:
        process.kill()
        process.join()


def report_nodes(url: str, num_nodes: int) -> None:
    """Until the process ends."""

    async def announce(bus: Bus, node: Node) -> None:
        await asyncio.sleep(random.random() * RENEWAL_S)
        await keep_announced(bus, node.descriptor, 3 * RENEWAL_S)

    async def report(bus: Bus, nodes: Sequence[Node]) -> None:
        began = time.perf_counter()
        phases = sorted(random.random() for _ in nodes)
        for turn in count():
            for phase, node in zip(phases, nodes, strict=True):
                await asyncio.sleep(began + (turn + phase) / REPORTS_PER_S - time.perf_counter())
                await bus.publish(subjects.load(node.node_id), node.report())

    async def report_all() -> None:
        async with connect(url, name="nodes") as bus, asyncio.TaskGroup() as tasks:

            async def list_blocks(msg: Msg) -> None:
                ref = NodeRef(node_id=msg.subject.rpartition(".")[2], incarnation=INCARNATION)
                await bus.publish(msg.reply, BlockList(node=ref, seq=0, num_pages=1, block_hashes=[]))

            nodes = list(map(Node, range(num_nodes)))
            async with await bus.subscribe_raw(subjects.at(subjects.NODE_BLOCKS, "*"), list_blocks):
                for node in nodes:
                    tasks.create_task(announce(bus, node))
                await report(bus, nodes)

    asyncio.run(report_all())


def main(argv: Sequence[str]) -> int:
    parser = make_parser("decisions", __doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[8, 100, 1000])
    parser.add_argument("--in-flight", type=int, default=10_000)
    parser.add_argument(
        "--waiting", type=int, default=0, help="requests that wait: all decode nodes are full"
    )
    parser.add_argument("--decisions", type=int, default=100_000)
    parser.add_argument("--asks", type=int, default=20_000, help="over the bus")
    options = parser.parse_args(argv)
    report = Report(options)
    for num_nodes in options.nodes:
        report.say(f"{num_nodes} nodes")
        row = measure(num_nodes, options.in_flight, options.waiting, options.decisions)
        report.add_row(**row, **asyncio.run(ask_over_bus(num_nodes, options.asks)))
    return report.finish(shown=transposed(report.rows, "num_nodes"))
