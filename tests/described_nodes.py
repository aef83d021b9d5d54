"""Nodes that are no more than what the test says of them: their descriptors and load reports.

They stand before the scheduler as values (`node`, `cluster`), or report over NATS (`ReportingNode`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

import msgspec

from flowkv_common import errors
from flowkv_common.bus.connection import Bus
from flowkv_common.bus.registry import keep_announced
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import (
    Assignment,
    Message,
    ModelCard,
    NodeRef,
    PoolLayout,
    ScheduleRequest,
    Wait,
)
from flowkv_common.wire.nodes import PROTOCOL, BlockCounts, LoadReport, NodeDescriptor, OutputForecast
from flowkv_scheduler import policy
from flowkv_scheduler.cluster import ClusterState, Goals
from flowkv_scheduler.node_view import NodeView, Work
from flowkv_scheduler.policy import Choice, RequestCosts
from flowkv_scheduler.prefixes import Hits, PrefixIndex
from flowkv_scheduler.waiting import Later

BLOCK_SIZE = 16
TOKEN_BUDGET = 512
NUM_BLOCKS = 256  # 4096 tokens
INCARNATION = "i1"
PERIOD_S = 0.5
QUICK_PERIOD_S = 0.1  # of nodes that report over NATS
MODEL = ModelCard(name="m", fingerprint="f", max_model_len=4096, vocab_size=64, eos_token_ids=[0])
NOTHING = Work()
# Sequences that will produce no more: they keep the blocks that they have, and free ones are free for others.
GROWN = OutputForecast(tokens_left=0.0, first_ends_in=0.0, stop_rate=1 / 256)
GOALS = Goals()
CAPS = {"prefill": TOKEN_BUDGET, "decode": BLOCK_SIZE, "mixed": 128}


def descriptor(
    node_id: str,
    role: str,
    *,
    incarnation: str = INCARNATION,
    num_blocks: int = NUM_BLOCKS,
    memory: str = "host",
    model: ModelCard = MODEL,
    protocol: int = PROTOCOL,
    **layout: Any,
) -> NodeDescriptor:
    return NodeDescriptor(
        node=NodeRef(node_id=node_id, incarnation=incarnation),
        role=role,
        model=model,
        layout=PoolLayout(
            **{"num_layers": 2, "block_size": BLOCK_SIZE, "num_kv_heads": 2, "head_dim": 16}
            | {"dtype": "float32"}
            | layout
        ),
        num_blocks=num_blocks,
        token_budget=TOKEN_BUDGET,
        max_prefill_tokens_per_step=CAPS[role],
        hosted_roles=["prefill", "decode"],
        connectors=["shm"],
        host="h",
        pid=1,
        metrics_url="",
        version="0.1.0",
        memory=memory,
        protocol=protocol,
    )


def report(
    node_id: str,
    role: str,
    *,
    incarnation: str = INCARNATION,
    num_blocks: int = NUM_BLOCKS,
    free: int | None = None,
    **changes: Any,
) -> LoadReport:
    """Of an idle node, but for `changes`; all of its blocks are free, but for `free`."""
    free = num_blocks if free is None else free
    idle = LoadReport(
        node=NodeRef(node_id=node_id, incarnation=incarnation),
        seq=1,
        period_s=PERIOD_S,
        ready=True,
        draining=False,
        max_prefill_tokens_per_step=CAPS[role],
        queued_prefill_tokens=0,
        num_waiting=0,
        num_running=0,
        max_num_seqs=16,
        blocks=BlockCounts(
            total=num_blocks,
            free=free,
            cached=0,
            leased=num_blocks - free,
            quarantined=0,
            longest_free_run=free,
        ),
        prefill_tokens_per_s=1000.0,
        decode_step_s=0.03,
        num_handoffs=0,
        handoff_bytes=0,
    )
    return msgspec.structs.replace(idle, **changes)


def request(num_prompt_tokens: int = 100, max_new_tokens: int = 50, **changes: Any) -> ScheduleRequest:
    plain = ScheduleRequest(
        request_id="r",
        attempt=0,
        fingerprint=MODEL.fingerprint,
        num_prompt_tokens=num_prompt_tokens,
        max_new_tokens=max_new_tokens,
    )
    return msgspec.structs.replace(plain, **changes)


class Described(NamedTuple):
    """A node before the scheduler has looked at it: last heard of `age_s` ago, `given` work since."""

    descriptor: NodeDescriptor
    report: LoadReport
    age_s: float
    given: Work

    @property
    def node_id(self) -> str:
        return self.descriptor.node.node_id


def node(
    node_id: str,
    role: str,
    *,
    age_s: float = 0.0,
    given: Work = NOTHING,
    num_blocks: int = NUM_BLOCKS,
    memory: str = "host",
    model: ModelCard = MODEL,
    protocol: int = PROTOCOL,
    layout: dict[str, Any] | None = None,
    **changes: Any,
) -> Described:
    """Its sequences are `GROWN`, but for another `forecast`."""
    record = descriptor(
        node_id,
        role,
        num_blocks=num_blocks,
        memory=memory,
        model=model,
        protocol=protocol,
        **(layout or {}),
    )
    return Described(
        record, report(node_id, role, num_blocks=num_blocks, **({"forecast": GROWN} | changes)), age_s, given
    )


def cluster(*nodes: Described) -> ClusterState:
    """What the scheduler knows of them at time 0."""
    state = ClusterState()
    state.mean_prompt_tokens = 0.0
    state.set_descriptors({node.node_id: node.descriptor for node in nodes})
    for node in nodes:
        state.add_report(node.report, -node.age_s)
        if node.given != NOTHING:
            state.add_sequence(node.descriptor.node, node.given, arrives_in_s=1e9, now=-node.age_s)
    return state


def view(described: Described) -> NodeView:
    """How the policy sees it."""
    (seen,) = cluster(described).views()
    return seen


def knows(index: PrefixIndex, node: NodeRef) -> bool:
    """Whether this life of the node was heard of, and no change of it was missed."""
    holder = index._holders.get(node.node_id)
    return holder is not None and holder.ref == node and holder.waiting is None


def num_hashes(index: PrefixIndex) -> int:
    return len(index._masks)


def blocks_by_node(hits: Hits) -> dict[str, int]:
    return {node_id: hits.num_blocks(node_id) for node_id in hits.longest_first()}


def later(
    node_id: str = "d0",
    need: Work = NOTHING,
    retry_in_s: float = 0.5,
    first_token_in_s: float = 0.0,
    is_late: bool = False,
) -> Later:
    """What a request was told that waits for room at the node."""
    wait = Wait(retry_in_s=retry_in_s, reason="full", first_token_in_s=first_token_in_s)
    return Later(wait, node_id=node_id, need=need, is_late=is_late)


def choose(wanted: ScheduleRequest, nodes: list[Described], goals: Goals = GOALS) -> Choice | None:
    """What the policy chooses for this request at time 0."""
    return policy.choose(RequestCosts(wanted, cluster(*nodes), goals, now=0.0))


def pair(choice: Choice | None) -> tuple[str, str] | None:
    return (choice.prefill.node_id, choice.decode.node_id) if choice else None


class ReportingNode:
    """One on NATS: announces itself and reports every period; `changes` go into each report."""

    def __init__(self, bus: Bus, node_id: str, role: str, **changes: Any) -> None:
        self.bus = bus
        self.node_id = node_id
        self.role = role
        self.changes = changes
        self._seq = 0

    async def report(self) -> None:
        self._seq += 1
        load: LoadReport = report(
            self.node_id, self.role, **({"seq": self._seq, "period_s": QUICK_PERIOD_S} | self.changes)
        )
        await self.bus.publish(subjects.load(self.node_id), load)

    async def live(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(keep_announced(self.bus, lambda: descriptor(self.node_id, self.role)))
            while True:
                await self.report()
                await asyncio.sleep(QUICK_PERIOD_S)


@contextlib.asynccontextmanager
async def reporting(*nodes: ReportingNode) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(node.live()) for node in nodes]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def schedule(bus: Bus, wanted: ScheduleRequest | None = None, timeout_s: float = 5.0) -> Message:
    return await bus.request(subjects.SCHEDULE, wanted or request(), Assignment | Wait, timeout_s=timeout_s)


async def until_answer(bus: Bus, is_met: Callable[[Message], bool], timeout_s: float = 8.0) -> Message:
    """Ask as a gateway does, again when told to, until the answer is as wanted."""
    async with asyncio.timeout(timeout_s):
        while True:
            try:
                answer = await schedule(bus, timeout_s=1.0)
            except (errors.Unavailable, errors.DeadlineExceeded):
                answer = Wait(retry_in_s=0.02, reason="the scheduler is not there")
            if is_met(answer):
                return answer
            await asyncio.sleep(answer.retry_in_s if isinstance(answer, Wait) else QUICK_PERIOD_S)


def is_assigned(*pair: str) -> Callable[[Message], bool]:
    return lambda m: isinstance(m, Assignment) and (m.prefill.node_id, m.decode.node_id) == pair


def is_wait(message: Message) -> bool:
    return isinstance(message, Wait) and "not there" not in message.reason
