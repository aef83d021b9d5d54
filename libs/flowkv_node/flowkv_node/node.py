"""What a guest is, and what its node lends it. A guest brings one side of the work: prefill or decode.

Who starts a node names its guests (`flowkv/roles.py`), so that services never import each other.
Every node hosts both: the paper's hybrid scheduler, two sub-schedulers over one block manager (section 8).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from flowkv_common.bus.connection import Bus
from flowkv_common.bus.service import Endpoint
from flowkv_common.config import NodeSettings
from flowkv_common.errors import FlowKVError, Stale, Unavailable, WrongModel
from flowkv_common.wire.messages import ModelCard, NodeRef, PoolLayout
from flowkv_common.wire.nodes import OutputForecast
from flowkv_engine.engine.batch import WorkItem
from flowkv_engine.engine.sampler import Sampled
from flowkv_engine.engine.sequence import Sequence
from flowkv_engine.kv.blocks import Blocks, OutOfBlocks
from flowkv_engine.kv.reservations import Reservations
from flowkv_node.attempts import Attempt, Attempts, Cause
from flowkv_node.budget import HandoffBudget
from flowkv_node.links import Links
from flowkv_node.outbox import Outbox
from flowkv_node.steps import Instruments, Retire


@dataclass(slots=True)
class Node:
    """Everything that guests share. Lives on the asyncio loop; only that loop takes and frees blocks."""

    ref: NodeRef
    settings: NodeSettings
    card: ModelCard
    layout: PoolLayout
    bus: Bus
    blocks: Blocks
    reservations: Reservations
    attempts: Attempts
    outbox: Outbox
    links: Links
    budget: HandoffBudget
    instruments: Instruments
    retire: Retire
    wake: asyncio.Event  # set when there is work for the engine
    changed: asyncio.Event  # set when the next load report should not wait
    stop: asyncio.Event  # set when the node is to drain and leave
    guests: dict[str, Guest] = field(default_factory=dict)
    drains_until: float | None = None  # monotonic; while it is set the node takes nothing new
    wedged: bool = False
    stuck: str | None = None  # which handoffs make no progress
    epoch: int = 0  # the highest of a leading scheduler that this node has heard of
    num_rooms_given: int = 0  # to sequences that will decode here, in this life; each counts once

    @property
    def draining(self) -> bool:
        return self.drains_until is not None

    def drain(self) -> None:
        """Take nothing new. What is here has `drain_timeout_s` to finish, counted from the first call."""
        if self.drains_until is None:
            self.drains_until = time.monotonic() + self.settings.drain_timeout_s
            self.changed.set()

    def resume(self) -> None:
        """Take new work again. Raises Unavailable when the node is leaving for good."""
        if self.stop.is_set():
            raise Unavailable(f"{self.ref.node_id} leaves")
        self.drains_until = None
        self.changed.set()

    def why_not_ready(self) -> str | None:
        if self.draining:
            return "draining"
        if self.wedged:
            return "the engine makes no progress"
        if self.stuck:
            return self.stuck
        if not self.bus.is_connected:
            return "not connected to NATS"
        return None

    def refuse_other_life(self, ref: NodeRef) -> None:
        """Raises Stale for a message to a former life of this node."""
        if ref != self.ref:
            raise Stale(f"meant for {ref.node_id}/{ref.incarnation}, this is {self.ref.incarnation}")

    def refuse_other_model(self, fingerprint: str) -> None:
        """Raises WrongModel for work of another model than this node's."""
        if fingerprint != self.card.fingerprint:
            raise WrongModel(
                f"{self.ref.node_id} serves {self.card.name} ({self.card.fingerprint}), not {fingerprint}"
            )

    def refuse_new_work(self, ref: NodeRef, fingerprint: str) -> None:
        """Raises Stale, WrongModel, or Unavailable while this node takes nothing new."""
        self.refuse_other_life(ref)
        self.refuse_other_model(fingerprint)
        if reason := self.why_not_ready():
            raise Unavailable(f"{self.ref.node_id}: {reason}")

    def hear_epoch(self, epoch: int) -> None:
        """A scheduler of this epoch has led: an older one is refused when it wants to change this node."""
        self.epoch = max(self.epoch, epoch)

    def take_blocks(self, sequence: Sequence, num_blocks: int) -> bool:
        """`num_blocks` blocks for a sequence without any, its cached prefix among them; False if full."""
        block_size = self.settings.block_size
        hashes = sequence.full_block_hashes(self.card.fingerprint, block_size)
        # The last token is always computed: its logits give the next one.
        cached = self.blocks.match_prefix(hashes[: (sequence.num_tokens - 1) // block_size])
        try:
            fresh = self.blocks.allocate(num_blocks - len(cached))
        except OutOfBlocks:
            self.blocks.release(cached)
            return False
        sequence.block_table = cached + fresh
        sequence.num_committed_blocks = len(cached)
        sequence.num_computed_tokens = len(cached) * block_size
        return True

    def commit_computed(self, sequence: Sequence) -> None:
        """Let the prefix cache find the blocks that the sequence has filled since the last call."""
        block_size = self.settings.block_size
        num_full = sequence.num_computed_tokens // block_size
        if num_full == sequence.num_committed_blocks:
            return
        hashes = sequence.full_block_hashes(self.card.fingerprint, block_size)
        for i in range(sequence.num_committed_blocks, num_full):
            parent = hashes[i - 1] if i else None
            self.blocks.commit(sequence.block_table[i], hashes[i], parent)
        sequence.num_committed_blocks = num_full

    async def fail(self, attempts: Iterable[Attempt], error: FlowKVError) -> None:
        """End these attempts here; gateways will try elsewhere."""
        for attempt in attempts:
            self.outbox.fail(attempt.gateway_id, attempt.transfer_id, error)
            self.attempts.cancel(attempt.transfer_id, Cause.GIVEN_BACK)
        await self.outbox.flush()

    async def fail_all(self, error: FlowKVError) -> None:
        """End every attempt here."""
        await self.fail(self.attempts, error)


class Guest(Protocol):
    """One side of the work. The node calls `decode_work`, `prefill_work` and `apply` between steps."""

    name: str
    num_accepted: int  # requests taken on in this life of the node

    def endpoints(self) -> list[Endpoint]:
        """The NATS endpoints of this guest, each with this node's id last."""

    async def run(self) -> None:
        """Background work, until cancelled."""

    def decode_work(self) -> list[WorkItem]:
        """One token for each running sequence: all of these are in the next step."""

    def prefill_work(self, max_tokens: int) -> list[WorkItem]:
        """At most `max_tokens` tokens of prompts."""

    def apply(self, sequence: Sequence, sampled: Sampled | None) -> None:
        """A step has computed tokens of a sequence that is this guest's; `sampled` is its new token."""

    def fail(self, sequence: Sequence, error: FlowKVError) -> None:
        """The attempt of this sequence has failed here: free it, tell its gateway."""

    def adopt(self, sequence: Sequence) -> None:
        """Take over a sequence, with its blocks, from the other guest of the same node."""

    def num_prompts(self) -> int:
        """Prompts that are not computed yet."""

    def num_waiting(self) -> int:
        """Sequences to decode that have no place or no blocks."""

    def num_running(self) -> int:
        """Sequences in the decode batch."""

    def num_context_tokens(self) -> int:
        """Tokens in the KV caches of the sequences that decode here."""

    def queued_prefill_tokens(self) -> int: ...

    def forecast(self) -> OutputForecast | None:
        """How much longer the outputs of those that decode here are expected to become."""


class GuestFactory(Protocol):
    def __call__(self, node: Node) -> Guest: ...
