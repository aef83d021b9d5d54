"""What a node shares with the two roles it hosts, and what a role must offer.

Every node hosts prefill and decode: the paper's hybrid scheduler, two sub-schedulers over one block manager
(section 8). `flowkv/roles.py` names the two classes, so that services never import each other.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Container, Iterable
from typing import NamedTuple, Protocol

from flowkv_common.aio import wait_event
from flowkv_common.bus.connection import Bus
from flowkv_common.bus.service import Endpoint
from flowkv_common.config import NodeSettings
from flowkv_common.errors import FlowKVError, Stale, Unavailable, WrongModel
from flowkv_common.grammar import Grammars
from flowkv_common.tracing import Attributes, Span
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import (
    DecodeRun,
    M,
    Message,
    ModelCard,
    NodeRef,
    NodeTimes,
    PrefillRun,
    SamplingParams,
    TokenChunk,
    TokenLogprob,
    transfer_id,
)
from flowkv_common.wire.nodes import OutputForecast, starting_chunk_budget
from flowkv_engine.engine.batch import Sequence, WorkItem
from flowkv_engine.engine.sampler import Sampled
from flowkv_engine.kv.blocks import Blocks, OutOfBlocks
from flowkv_engine.kv.pool import Pool
from flowkv_engine.kv.reservations import Reservations
from flowkv_node.attempts import Attempts, Outbox
from flowkv_node.handoffs import HandoffBudget, handoff_bytes
from flowkv_node.instruments import Instruments
from flowkv_node.links import Links


class RoleLoad(NamedTuple):
    """A role's part of the load report."""

    num_accepted: int  # requests taken on by this incarnation of the node
    queued_prefill_tokens: int
    num_prompts: int = 0  # that are not computed yet
    interruptible_prefill_tokens: int = 0  # of those queued
    queued_attended: int = 0  # pairs of such a token and one that it attends to
    interruptible_attended: int = 0
    num_waiting: int = 0  # sequences to decode without a place or without blocks
    num_running: int = 0  # sequences in the decode batch
    num_context_tokens: int = 0  # in the KV caches of those
    forecast: OutputForecast | None = None


class Role(Protocol):
    """One side of the work on a node: prefill or decode."""

    def endpoints(self) -> list[Endpoint]:
        """The role's NATS endpoints, each with this node's id last."""

    async def run(self) -> None:
        """Background work, until cancelled."""

    def sequences_to_prefill(self) -> list[Sequence]:
        """Those of which the next step may compute more than the newest token, the next one first."""

    def apply(self, sequence: Sequence, sampled: Sampled | None) -> None:
        """A step has computed tokens of this role's sequence; `sampled` is its new token."""

    def fail(self, sequence: Sequence, error: FlowKVError) -> None:
        """The attempt of this sequence has failed here: free it, tell its gateway."""

    def load(self) -> RoleLoad: ...


class PrefillingRole(Role, Protocol):
    """The role that computes prompts."""

    def add_prompt_logprobs(self, sequence: Sequence, logprobs: list[TokenLogprob]) -> None:
        """A step has found those of the next tokens of this prompt."""

    def not_computed(self) -> list[Sequence]:
        """The prompts that have blocks, those that are interrupted among them, in order of their blocks."""


class DecodingRole(Role, Protocol):
    """The role that runs sequences."""

    def sequences_to_decode(self) -> list[Sequence]:
        """Those that get a token in the next step, with a block for it."""

    def drafts(self, sequences: list[Sequence]) -> list[tuple[int, ...]]:
        """What the next step guesses of each of these, within its blocks."""

    def adopt(self, sequence: Sequence) -> None:
        """Run a sequence that comes with its blocks, from the other role of this node."""


class Roles(NamedTuple):
    """How a node makes its two roles."""

    prefill: Callable[[Node], PrefillingRole]
    decode: Callable[[Node], DecodingRole]


class Node:
    """Everything that both roles share. Lives on the asyncio loop; only that loop takes and frees blocks."""

    def __init__(
        self,
        ref: NodeRef,
        settings: NodeSettings,
        starts_as: str,
        card: ModelCard,
        pool: Pool,
        roles: Roles,
        bus: Bus,
        stop: asyncio.Event,
        grammars: Grammars | None = None,
    ) -> None:
        """`starts_as`: prefill, decode or mixed. `stop` is set when the node is to drain and leave."""
        self.ref = ref
        self.settings = settings
        self.starts_as = starts_as
        self.card = card
        self.layout = pool.layout
        self.bus = bus
        self.stop = stop
        self._grammars = grammars
        # The prefill chunk budget: the one number that makes it a prefill or a decode node.
        self.max_prefill_tokens_per_step = starting_chunk_budget(
            starts_as, settings.token_budget, settings.block_size
        )
        self.blocks = Blocks(pool.num_blocks)
        self.reservations = Reservations(self.blocks)
        self.attempts = Attempts()
        self.outbox = Outbox(bus, ref, self.attempts)
        self.links = Links(bus, ref, pool.layout, card.fingerprint, pool.num_blocks)
        self.handoffs = HandoffBudget(
            settings.max_handoffs,
            handoff_bytes(settings, pool.layout, pool.num_blocks),
            node_moved_at=lambda: max(self.moved_at, self.reservations.renewed_at),
        )
        self.instruments = Instruments(
            card.name,
            ref.node_id,
            settings.connector_names,
            self.blocks.counts,
            lambda: self.max_prefill_tokens_per_step,
        )
        self.wake = asyncio.Event()  # set when there is work for the engine
        self.changed = asyncio.Event()  # set when the next load report should not wait
        self.drains_until: float | None = None  # monotonic; while it is set the node takes nothing new
        self.is_cordoned = False  # nor then, but what is here has all the time it needs
        self.stalls = False  # a step takes far longer than such steps do
        self.wedged = False  # a step takes longer than any may
        self.stuck: str | None = None  # which handoffs make no progress
        self.epoch = 0  # the highest of a leading scheduler that this node has heard of
        self.num_rooms_given = 0  # to sequences that decode in this incarnation; each counts once
        self.moved_at = time.monotonic()  # when a step last ended or blocks came back
        self.expected_step_s: float | None = None  # of the step that runs; None: unknown
        self.step_began_at = 0.0  # monotonic; the latest one
        self._in_step: set[int] = set()  # ids of `Sequence` objects
        self._freed_in_step: list[list[int]] = []
        self._has_room = asyncio.Event()
        self.prefill, self.decode = prefill, decode = roles.prefill(self), roles.decode(self)
        for name, text, read in (
            (
                "flowkv_queued_prefill_tokens",
                "Not computed yet",
                lambda: prefill.load().queued_prefill_tokens,
            ),
            ("flowkv_running_sequences", "In the decode batch", lambda: decode.load().num_running),
            ("flowkv_waiting_sequences", "Without a place or blocks", lambda: decode.load().num_waiting),
        ):
            self.instruments.add_gauge(name, text, read)

    def endpoint(self, subject: str, kind: type[M], handler: Callable[[M], Awaitable[Message]]) -> Endpoint:
        """An endpoint of this node alone: its id ends the subject."""
        return Endpoint(subjects.at(subject, self.ref.node_id), kind, handler)

    # --- whether it takes work --------------------------------------------------------------------

    def drain(self) -> None:
        """Take nothing new. What is here has `drain_timeout_s` to finish, counted from the first call."""
        if self.drains_until is None:
            self.drains_until = time.monotonic() + self.settings.drain_timeout_s
            self.changed.set()

    def cordon(self) -> None:
        """Take nothing new, until `resume`. What is here is kept, however long it takes."""
        self.is_cordoned = True
        self.changed.set()

    def resume(self) -> None:
        """Take new work again. Raises Unavailable when the node is leaving for good."""
        if self.stop.is_set():
            raise Unavailable(f"{self.ref.node_id} leaves")
        self.drains_until = None
        self.is_cordoned = False
        self.changed.set()

    def why_not_ready(self) -> str | None:
        if self.drains_until is not None:
            return "draining"
        if self.is_cordoned:
            return "cordoned"
        if self.wedged:
            return "the engine makes no progress"
        if self.stalls:
            return "a step takes far longer than it should"
        if self.stuck:
            return self.stuck
        if not self.bus.is_connected:
            return "not connected to NATS"
        return None

    def refuse_misdirected(self, ref: NodeRef, fingerprint: str | None = None) -> None:
        """Raises Stale for a message to another incarnation, WrongModel for work of another model."""
        if ref != self.ref:
            raise Stale(f"meant for {ref.node_id}/{ref.incarnation}, this is {self.ref.incarnation}")
        if fingerprint not in (None, self.card.fingerprint):
            raise WrongModel(
                f"{self.ref.node_id} serves {self.card.name} ({self.card.fingerprint}), not {fingerprint}"
            )

    def refuse_while_unready(self) -> None:
        """Raises Unavailable while this node takes nothing new."""
        if reason := self.why_not_ready():
            raise Unavailable(f"{self.ref.node_id}: {reason}")

    def hear_epoch(self, epoch: int) -> None:
        """A scheduler of this epoch has led: an older one is refused when it wants to change this node."""
        self.epoch = max(self.epoch, epoch)

    async def prepare(self, sampling: SamplingParams) -> None:
        """Compiles its grammar before a step needs it: others are in that step. Raises BadRequest."""
        if sampling.grammar and self._grammars:
            await asyncio.to_thread(self._grammars.matcher, sampling.grammar)

    async def give_back(self, error: FlowKVError, transfer_ids: Container[str] | None = None) -> None:
        """End these attempts here, all if None; gateways will try elsewhere."""
        for attempt in self.attempts:
            if transfer_ids is None or attempt.transfer_id in transfer_ids:
                self.outbox.add_failure(attempt.gateway_id, attempt.transfer_id, error)
                self.attempts.cancel(attempt.transfer_id, is_cut_off=True)
        await self.outbox.flush()

    def prompts_not_begun(self) -> set[str]:
        """Attempts of which nothing was computed here: another node could begin them as well."""
        waiting = {
            sequence.transfer_id
            for sequence in self.prefill.not_computed()
            if sequence.num_computed_tokens == sequence.num_cached_tokens
            and id(sequence) not in self._in_step
        }
        return waiting | {attempt.transfer_id for attempt in self.attempts if attempt.state == "queued"}

    def begin_span(self, name: str, sequence: Sequence, came_at: float) -> Span:
        """What a role does for an attempt that came at `came_at` (monotonic), below its gateway's span."""
        about: Attributes = {
            "flowkv.transfer_id": sequence.transfer_id,
            "flowkv.node_id": self.ref.node_id,
            "flowkv.num_prompt_tokens": len(sequence.prompt_ids),
        }
        return self.bus.tracing.begin(name, about, kind="server", began=came_at)

    def add_token(
        self,
        sequence: Sequence,
        sampled: Sampled,
        *,
        num_cached_tokens: int = 0,
        phases_s: dict[str, float] | None = None,
        times: list[NodeTimes] | None = None,
    ) -> TokenChunk:
        """Append an output token; its gateway is told with the next flush.

        The chunk's `finish_reason` says whether it is the last one.
        """
        finish_reason = sequence.finish_reason_after(
            sampled.token_id, self.card.eos_token_ids, self.card.max_model_len
        )
        chunk = TokenChunk(
            transfer_id=sequence.transfer_id,
            index=len(sequence.output_ids),
            token_ids=[sampled.token_id],
            logprobs=[sampled.logprob] if sampled.logprob else [],
            finish_reason="stop" if sampled.ends_grammar else finish_reason,
            num_cached_tokens=num_cached_tokens,
            phases_s=phases_s or {},
            times=times or [],
        )
        sequence.output_ids.append(sampled.token_id)
        self.outbox.add_chunk(sequence.gateway_id, chunk)
        return chunk

    # --- blocks of sequences ----------------------------------------------------------------------

    def take_blocks(self, sequence: Sequence, num_blocks: int) -> bool:
        """`num_blocks` blocks for a sequence without any, its cached prefix among them; False if full."""
        block_size = self.settings.block_size
        hashes = sequence.full_block_hashes(self.card.fingerprint, block_size)
        # The last token is always computed: its logits give the next one. Those of cached ones are not there.
        num_reusable = sequence.num_tokens - 1
        if sequence.lacks_prompt_logprobs:
            num_reusable = sequence.num_scored_tokens
        cached = self.blocks.match_prefix(hashes[: num_reusable // block_size])
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
            self.blocks.commit(sequence.block_table[i], hashes[i], hashes[i - 1] if i else None)
        sequence.num_committed_blocks = num_full

    def free_blocks(self, sequence: Sequence) -> None:
        """The sequence gives its blocks back: now, or when the step that may write them has ended.

        docs/architecture.md, rule 3.
        """
        block_ids, sequence.block_table = sequence.block_table, []
        sequence.num_computed_tokens = sequence.num_committed_blocks = 0
        if id(sequence) in self._in_step:
            self._freed_in_step.append(block_ids)
        elif block_ids:
            self.blocks.release(block_ids)
            self.notice_room()

    def begin_step(self, items: Iterable[WorkItem], expected_s: float | None) -> None:
        self._in_step = {id(item.sequence) for item in items}
        self.expected_step_s = expected_s
        self.step_began_at = time.monotonic()

    def end_step(self) -> None:
        self._in_step = set()
        self.expected_step_s = None
        self.moved_at = time.monotonic()
        freed, self._freed_in_step = self._freed_in_step, []
        for block_ids in freed:
            self.blocks.release(block_ids)
            self.notice_room()

    def notice_room(self) -> None:
        """Blocks have come back: prompts that wait for room look again."""
        self.moved_at = time.monotonic()
        self.look_for_room()

    def look_for_room(self) -> None:
        """Who waits for room looks again, though no blocks have come back."""
        self._has_room.set()

    async def wait_for_room(self, timeout_s: float) -> None:
        """Until it is worth to look again, at most `timeout_s`: some blocks are freed without a word."""
        self._has_room.clear()
        await wait_event(self._has_room, timeout_s)


def new_sequence(run: PrefillRun | DecodeRun) -> Sequence:
    """The sequence that a message asks for, without blocks; its deadline counts from now."""
    return Sequence(
        transfer_id=transfer_id(run.request_id, run.attempt),
        gateway_id=run.gateway_id,
        prompt_ids=run.prompt_ids.unpack(),
        output_ids=run.output_ids.unpack(),
        sampling=run.sampling,
        deadline=time.monotonic() + run.deadline_in_s,
    )
