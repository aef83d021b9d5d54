"""Moving one request's KV cache to its decode node: reserve, send what is computed, commit.

The decode node reserves first, before prefill takes blocks here: that keeps a full prefill node and a full
decode node from waiting for each other. `DecodeRun` is the commit: it is sent only after every copy was
confirmed while this node's blocks were held.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable

import msgspec

from flowkv_common.bus.connection import CONTROL_TIMEOUT_S
from flowkv_common.errors import FlowKVError, Full
from flowkv_common.timeline import at_most, phase_of
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import (
    Accepted,
    DecodeRun,
    KVTransferred,
    NodeTimes,
    PrefillRun,
    Release,
    Reserve,
    Reserved,
    TokenIds,
)
from flowkv_engine.engine.batch import Sequence
from flowkv_engine.kv.blocks import OutOfBlocks
from flowkv_engine.kv.segments import align, ids_of
from flowkv_engine.transport.base import KVLink, TransferStats
from flowkv_node.handoffs import InFlight
from flowkv_node.node import Node

# A reservation outlives the last renewal by its prefill node by so much.
RESERVATION_S = 30.0
RENEW_S = 10.0
RENEW_RETRY_S = 1.0
# A handoff asks out of line when the node has answered none for so long: one that stands still must not cost
# each the time-out of those before it. A full node answers ten times as often.
LINE_PATIENCE_S = 0.5


class Handoff:
    """One attempt's way to its decode node. `in_flight` is its place in this node's budget.

    `came_at`: when the attempt came to this node (monotonic).
    """

    _link: KVLink
    _request: Reserve
    _reserved: Reserved

    def __init__(
        self, node: Node, run: PrefillRun, sequence: Sequence, in_flight: InFlight, came_at: float
    ) -> None:
        self.in_flight = in_flight
        self._came_at = came_at
        self._node = node
        self._run = run
        self._sequence = sequence
        self._holds_room = self._has_released = False
        self._num_landed = 0  # blocks at the decode node
        self._turn = asyncio.Lock()  # one send at a time: each begins where the one before ended
        self._sent: list[TransferStats] = []
        self._spans: list[tuple[float, float]] = []  # when each began and ended, waiting included

    async def reserve(self) -> None:
        """Room for the prompt and the token after it at the decode node, or the same room for longer.

        While that node is full, the handoff that is due first asks again, as often as it is told to, and the
        others stand in line behind it. Raises FlowKVError when the node refuses for good: without saying when
        to ask again.
        """
        if self._holds_room:
            await self._renew()
            return
        node, sequence = self._node, self._sequence
        try:
            # The runs that this node's blocks will lie in.
            run_lengths = node.blocks.plan_runs(node.layout.blocks_for_prompt(sequence.num_tokens))
        except OutOfBlocks:
            run_lengths = []  # they are only a hint
        self._request = Reserve(
            transfer_id=sequence.transfer_id,
            node=self._run.decode,
            fingerprint=self._run.fingerprint,
            prefill=node.ref,
            gateway_id=self._run.gateway_id,
            num_tokens=sequence.num_tokens + 1,
            block_hashes=sequence.full_block_hashes(node.card.fingerprint, node.settings.block_size),
            run_lengths=run_lengths,
            expires_in_s=RESERVATION_S,
            again=self._has_released,
        )
        line, due = node.handoffs.line_to(self._run.decode.node_id), self.in_flight.due
        while not self._holds_room:
            # Not in line: each of those that lack a link waits for it as long.
            self._link = await node.links.link_to(self._run.decode)
            async with contextlib.AsyncExitStack() as held:
                try:
                    async with asyncio.timeout(LINE_PATIENCE_S):
                        await held.enter_async_context(line.hold(place=due))
                except TimeoutError:
                    if self.in_flight.still_s() > LINE_PATIENCE_S:
                        await self._take_room()
                    continue
                while not self._holds_room and node.links.is_current(self._run.decode, self._link):
                    if line.is_overtaken(due):
                        break
                    await asyncio.sleep(await self._take_room())
        self._num_landed = self._reserved.num_cached_blocks

    async def _take_room(self) -> float:
        """Ask once. Returns in how many seconds to ask again; 0 if there is room now."""
        pause_s = 0.0
        try:
            self._reserved = await self._ask_room(self._request)
            self._holds_room = True
        except Full as error:
            if error.retry_after_s is None:
                raise
            pause_s = error.retry_after_s
        self._node.handoffs.hear_decode_node(self._run.decode.node_id)
        return pause_s

    async def keep_reserved(self) -> None:
        """Until cancelled: renew the reservation."""
        pause_s = RENEW_S
        while True:
            await asyncio.sleep(pause_s)
            try:
                await self._renew()
                pause_s = RENEW_S
            except FlowKVError:  # a lost reservation shows in the next copy
                pause_s = RENEW_RETRY_S

    async def _renew(self) -> None:
        """Raises FlowKVError if the reservation does not stand any more."""
        renewal = {"token": self._reserved.token, "block_hashes": [], "run_lengths": []}
        await self._ask_room(msgspec.structs.replace(self._request, **renewal))

    async def _ask_room(self, request: Reserve) -> Reserved:
        subject = subjects.at(subjects.DECODE_RESERVE, request.node.node_id)
        return await self._node.bus.request(subject, request, Reserved, timeout_s=CONTROL_TIMEOUT_S)

    async def send_computed(self, *, prompt_done: bool) -> None:
        """Send the blocks that are complete and not yet there; with `prompt_done` also the last, partial one.

        Raises TransferFailed.
        """
        async with self._turn:
            sequence, block_size = self._sequence, self._node.settings.block_size
            num_ready = sequence.num_computed_tokens // block_size
            if prompt_done:
                num_ready = -(-sequence.num_computed_tokens // block_size)
            if num_ready <= self._num_landed:
                return
            new = slice(self._num_landed, num_ready)
            copies = align(sequence.block_table[new], ids_of(self._reserved.runs)[new])
            began = time.monotonic()
            sent = await self._link.send_blocks(sequence.transfer_id, self._reserved.token, copies)
            self._sent.append(sent)
            self._spans.append((began, time.monotonic()))
            self._node.handoffs.confirm_send(self._run.decode.node_id)
            self._num_landed = num_ready

    async def commit(self) -> NodeTimes:
        """From here on the decode node answers for the request. Returns what it was told of the sends.

        Raises FlowKVError if it refuses.
        """
        times = self._times()
        run = DecodeRun(
            request_id=self._run.request_id,
            attempt=self._run.attempt,
            epoch=self._run.epoch,
            node=self._run.decode,
            fingerprint=self._run.fingerprint,
            prefill=self._node.ref,
            token=self._reserved.token,
            gateway_id=self._run.gateway_id,
            prompt_ids=self._run.prompt_ids,
            output_ids=TokenIds.of(self._sequence.output_ids),
            sampling=msgspec.structs.replace(self._run.sampling, num_prompt_logprobs=None),
            deadline_in_s=self._sequence.deadline - time.monotonic(),
            handoff=times,
        )
        subject = subjects.at(subjects.DECODE_RUN, self._run.decode.node_id)
        await self._node.bus.request(subject, run, Accepted, timeout_s=CONTROL_TIMEOUT_S)
        return times

    def _times(self) -> NodeTimes:
        """Of all sends, until the commit, which is now."""
        sends = [
            msgspec.structs.replace(
                phase_of("send", *span, self._came_at),
                num_bytes=sent.num_bytes,
                num_copies=sent.num_copies,
                num_calls=sent.num_calls,
            )
            for span, sent in zip(self._spans, self._sent, strict=True)
        ]
        return NodeTimes(
            node_id=self._node.ref.node_id,
            part="handoff",
            total_s=round(time.monotonic() - self._came_at, 6),
            phases=at_most(sends),
            connector=self._link.name,
        )

    async def release(self) -> None:
        """Give the room back: the request has ended, or begins to reserve again. If lost, it expires."""
        self._holds_room, self._has_released = False, True
        message = Release(transfer_id=self._sequence.transfer_id, token=self._reserved.token)
        subject = subjects.at(subjects.DECODE_RELEASE, self._run.decode.node_id)
        with contextlib.suppress(FlowKVError):
            async with self._turn:  # a copy may still be on its way
                await self._node.bus.request(subject, message, Accepted, timeout_s=CONTROL_TIMEOUT_S)

    async def report(self, computed_at: float) -> None:
        """Publish and measure what was moved; `computed_at` is when the last chunk was done (monotonic)."""
        hidden_s, exposed_s = split_at(computed_at, self._spans)
        event = KVTransferred(
            transfer_id=self._sequence.transfer_id,
            prefill_node=self._node.ref.node_id,
            decode_node=self._run.decode.node_id,
            connector=self._link.name,
            num_bytes=sum(sent.num_bytes for sent in self._sent),
            num_copies=sum(sent.num_copies for sent in self._sent),
            num_calls=sum(sent.num_calls for sent in self._sent),
            total_s=round(hidden_s + exposed_s, 6),
            exposed_s=round(exposed_s, 6),
            hidden_s=round(hidden_s, 6),
        )
        self._node.instruments.observe_transfer(event)
        with contextlib.suppress(FlowKVError):  # the handoff is done, told or not
            await self._node.bus.publish(subjects.event("kv_transferred", event.transfer_id), event)


def split_at(instant: float, spans: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Seconds of `spans` before `instant` and after it."""
    before = after = 0.0
    for began, ended in spans:
        middle = min(max(instant, began), ended)
        before += middle - began
        after += ended - middle
    return before, after
