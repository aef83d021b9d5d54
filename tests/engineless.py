"""A prefill and a decode node whose steps the test computes: all is real but the engine.

They talk over a NATS server and move blocks with the in-process connector. "Computing" a token writes a
number of its own into its slot of the pool, so that what has landed can be told from what has not.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from flowkv.roles import ROLES
from flowkv_common.aio import running
from flowkv_common.bus.connection import Bus, connect
from flowkv_common.bus.service import Service
from flowkv_common.config import NodeSettings
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import (
    ModelCard,
    NodeRef,
    PoolLayout,
    PrefillRun,
    SamplingParams,
    StepTokens,
    TokenChunk,
)
from flowkv_decode.sequences import DecodeRole
from flowkv_engine.engine.sampler import Sampled
from flowkv_engine.kv.pool import KVPool
from flowkv_engine.kv.segments import Copy
from flowkv_engine.transport.base import KVLink, TransferStats
from flowkv_node.endpoints import node_endpoints, watch_cancels
from flowkv_node.handoffs import HandoffBudget, handoff_bytes
from flowkv_node.node import Node
from flowkv_node.reporting import BlockNews
from flowkv_node.steps import plan_chunks
from flowkv_prefill.prompts import PrefillRole
from tests.described_nodes import descriptor
from tests.inprocess_connector import InProcessConnector, Switchboard
from tests.nats_server import NatsServer
from tests.node_messages import FINGERPRINT, prefill_run
from tests.waiting import until
from tests.wrapped_links import WrappedConnector, WrappedLink

BLOCK_SIZE = 4
NUM_BLOCKS = 24
LAYOUT = PoolLayout(num_layers=2, block_size=BLOCK_SIZE, num_kv_heads=1, head_dim=2, dtype="float32")
EOS = 2
CARD = ModelCard(name="m", fingerprint=FINGERPRINT, max_model_len=512, vocab_size=999, eos_token_ids=[EOS])
FIRST_TOKEN = 77  # what each prompt's last chunk "samples"


class Clock:
    """The monotonic clock of a node's budget, and how far the test has put it forward."""

    def __init__(self) -> None:
        self.forward_s = 0.0
        self.step_ended_at = self()

    def __call__(self) -> float:
        return time.monotonic() + self.forward_s

    def end_step(self) -> None:
        self.step_ended_at = self()


class WatchedLink(WrappedLink):
    """A link that notes what it sends. A send lands at once and is confirmed while `may_confirm` is set."""

    def __init__(self, link: KVLink) -> None:
        super().__init__(link)
        self.sends: list[list[Copy]] = []
        self.may_confirm = asyncio.Event()
        self.may_confirm.set()
        self.landed = asyncio.Event()
        self.hears_cancel = True

    async def send_blocks(self, transfer_id: str, token: str, copies: Sequence[Copy]) -> TransferStats:
        sent = await super().send_blocks(transfer_id, token, copies)
        self.sends.append(list(copies))
        self.landed.set()
        while not self.may_confirm.is_set():
            try:
                await self.may_confirm.wait()
            except asyncio.CancelledError:
                if self.hears_cancel:
                    raise
        return sent

    def times_sent(self) -> Counter[int]:
        """How often each block of the sender was sent."""
        copies = itertools.chain.from_iterable(self.sends)
        return Counter(itertools.chain.from_iterable(range(c.src, c.src + c.length) for c in copies))


@dataclass
class Side:
    """One node, its pool and its two roles."""

    node: Node
    pool: KVPool
    connector: WrappedConnector
    clock: Clock

    @property
    def prefill(self) -> PrefillRole:
        assert isinstance(self.node.prefill, PrefillRole)
        return self.node.prefill

    @property
    def decode(self) -> DecodeRole:
        assert isinstance(self.node.decode, DecodeRole)
        return self.node.decode

    @property
    def num_sequences_accepted(self) -> int:
        return self.decode.load().num_accepted

    @property
    def slots(self) -> torch.Tensor:
        """[num_blocks, layers times keys and values, BLOCK_SIZE, head_dim]"""
        return self.pool.tensor.view(self.pool.num_blocks, -1, BLOCK_SIZE, self.pool.layout.head_dim)

    def kv(self, block_table: Sequence[int], num_tokens: int) -> list[float]:
        """What lies in the slots of the first tokens."""
        slots = self.slots[list(block_table)]
        per_token = slots.transpose(1, 2).reshape(-1, 8)[:num_tokens]
        assert torch.equal(per_token, per_token[:, :1].expand(-1, 8)), "layers or halves differ"
        return [float(value) for value in per_token[:, 0]]

    def idle_counts(self) -> dict[str, int]:
        """All that must be 0 when nothing is left to do."""
        self.node.blocks.check_integrity()
        counts = self.node.blocks.counts()
        return {
            "attempts": len(self.node.attempts),
            "reservations": self.node.reservations.num_open,
            "leased": counts.leased,
            "quarantined": counts.quarantined,
            "handoffs": self.node.handoffs.num_in_flight,
            "bytes": self.node.handoffs.bytes_in_flight,
            "waiting for the budget": self.node.handoffs.queue.num_waiting,
            "prompts": self.prefill.load().num_prompts,
            "waiting": self.decode.load().num_waiting,
            "running": self.decode.load().num_running,
        }

    async def wait_accepted(self, num_sequences: int) -> None:
        """Until so many have been handed over to it."""
        await until(lambda: self.num_sequences_accepted == num_sequences)

    async def wait_idle(self) -> None:
        """Raises AssertionError with what is still held in time."""
        with contextlib.suppress(TimeoutError):
            await until(lambda: not any(self.idle_counts().values()))
        held = {name: count for name, count in self.idle_counts().items() if count}
        assert not held, f"{self.node.ref.node_id} still holds {held}"


def kv_of(prompt_ids: Sequence[int]) -> list[float]:
    """What computing these tokens writes, one number each: exact in float32."""
    return [float(1 + position * 1000 + token_id) for position, token_id in enumerate(prompt_ids)]


@dataclass
class Pair:
    """`p` prefills for `d`."""

    bus: Bus
    p: Side
    d: Side
    chunks: list[TokenChunk] = field(default_factory=list)  # what the gateway was told
    told: asyncio.Event = field(default_factory=asyncio.Event)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def link(self) -> WatchedLink:
        assert isinstance(self.p.connector.link, WatchedLink)
        return self.p.connector.link

    def run(self, prompt_ids: list[int], *, max_tokens: int = 8, deadline_in_s: float = 60.0) -> PrefillRun:
        return prefill_run(
            prompt_ids,
            request_id=f"r{next(self._numbers)}",
            sampling=SamplingParams(max_tokens=max_tokens),
            deadline_in_s=deadline_in_s,
        )

    async def compute(self, max_tokens: int = 1000) -> int:
        """One step of `p`, once there is work for it: prompt tokens of the step."""
        await until(self.p.prefill.sequences_to_prefill)
        return self.step(max_tokens)

    def step(self, max_tokens: int = 1000) -> int:
        """One step of `p`, if there is work."""
        items = plan_chunks(self.p.prefill.sequences_to_prefill(), max_tokens, BLOCK_SIZE)
        for sequence, num_tokens, _ in items:
            first, end = sequence.num_computed_tokens, sequence.num_computed_tokens + num_tokens
            for position, number in enumerate(
                kv_of(sequence.prompt_ids + sequence.output_ids)[first:end], first
            ):
                block_id = sequence.block_table[position // BLOCK_SIZE]
                self.p.slots[block_id, :, position % BLOCK_SIZE] = number
            sequence.num_computed_tokens = end
            self.p.node.commit_computed(sequence)
            is_done = end == sequence.num_tokens
            self.p.prefill.apply(sequence, Sampled(FIRST_TOKEN, None) if is_done else None)
        self.p.node.end_step()
        self.p.clock.end_step()
        return sum(item.num_tokens for item in items)

    async def compute_all(self, chunk_tokens: int = 1000) -> None:
        """The whole of one prompt, in chunks; all that can be is sent before the next is computed."""
        await self.compute(chunk_tokens)
        while self.p.prefill.load().num_prompts:
            await self.settle()
            await self.compute(chunk_tokens)

    async def settle(self) -> None:
        """Until all that was published on the way to a node has come, and the answers too."""
        for _ in range(5):
            await self.bus.nc.flush()

    def hear(self, message: StepTokens) -> None:
        self.chunks += message.chunks
        self.told.set()


@contextlib.asynccontextmanager
async def engineless_pair(nats_server: NatsServer, **settings: Any) -> AsyncIterator[Pair]:
    """Both nodes with their roles at work and `p` linked to `d`; no keepalives, sweeps or load reports."""
    switchboard = Switchboard()
    async with contextlib.AsyncExitStack() as opened:
        bus = await opened.enter_async_context(connect(nats_server.url, name="pair"))
        p, d = [
            await opened.enter_async_context(_side(bus, node_id, switchboard, settings))
            for node_id in ("p", "d")
        ]
        pair = Pair(bus, p, d)
        await opened.enter_async_context(await bus.subscribe(subjects.tokens("g"), StepTokens, pair.hear))
        p.node.links.follow({"d": descriptor("d", "decode", incarnation=d.node.ref.incarnation)})
        await until(lambda: "d" in p.node.links.connectors_in_use())
        yield pair


@contextlib.asynccontextmanager
async def _side(
    bus: Bus, node_id: str, switchboard: Switchboard, settings: dict[str, Any]
) -> AsyncIterator[Side]:
    ref = NodeRef(node_id=node_id, incarnation="1")
    own = NodeSettings(model_path="", block_size=BLOCK_SIZE, connectors="inprocess", **settings)
    with KVPool(LAYOUT, NUM_BLOCKS) as pool:
        node = Node(ref, own, "mixed", CARD, pool, ROLES, bus, asyncio.Event())
        clock = Clock()
        max_bytes = handoff_bytes(own, LAYOUT, NUM_BLOCKS)
        node.handoffs = HandoffBudget(
            own.max_handoffs, max_bytes, node_moved_at=lambda: clock.step_ended_at, clock=clock
        )
        engine: Any = None  # nobody asks it
        endpoints = [
            *node.prefill.endpoints(),
            *node.decode.endpoints(),
            *node_endpoints(node, engine, BlockNews(ref, node.blocks)),
        ]
        service = Service(bus, name="node", version="0.1.0", service_id=node_id, endpoints=endpoints)
        real = InProcessConnector(pool, node.reservations, node.links.admits, switchboard)
        async with WrappedConnector(real, WatchedLink) as connector:
            await node.links.listen(connector)
            async with service, running(node.prefill.run(), node.links.run(), watch_cancels(node)):
                yield Side(node, pool, connector, clock)
