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

from flowkv_common.aio import Backoff
from flowkv_common.bus.connection import CONTROL_TIMEOUT_S
from flowkv_common.errors import FlowKVError, Full
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import (
    Accepted,
    DecodeRun,
    KVTransferred,
    PrefillRun,
    Release,
    Reserve,
    Reserved,
    TokenIds,
)
from flowkv_engine.engine.sequence import Sequence
from flowkv_engine.kv.blocks import OutOfBlocks
from flowkv_engine.kv.segments import align, ids_of
from flowkv_engine.transport.base import KVLink, TransferStats
from flowkv_node.handoffs import InFlight
from flowkv_node.node import Node

# A reservation outlives the last renewal by its prefill node by so much.
RESERVATION_S = 30.0
RENEW_S = 10.0
RENEW_RETRY_S = 1.0
FIRST_RETRY_S = 0.02
LONGEST_RETRY_S = 0.5


class Handoff:
    """One attempt's way to one decode node. Made by `reserve()`."""

    def __init__(
        self, node: Node, run: PrefillRun, link: KVLink, request: Reserve, reserved: Reserved
    ) -> None:
        self._node = node
        self._run = run
        self._link = link
        self._request = request
        self._token = reserved.token
        self._target = ids_of(reserved.runs)  # block ids at the decode node, in order
        self._num_landed = reserved.num_cached_blocks
        self._turn = asyncio.Lock()  # one send at a time: each begins where the one before ended
        self._sent: list[TransferStats] = []
        self._spans: list[tuple[float, float]] = []  # when each began and ended, waiting included

    async def keep_reserved(self) -> None:
        """Until cancelled: renew the reservation."""
        pause_s = RENEW_S
        while True:
            await asyncio.sleep(pause_s)
            try:
                await self.renew()
                pause_s = RENEW_S
            except FlowKVError:  # a lost reservation shows in the next copy
                pause_s = RENEW_RETRY_S

    async def renew(self) -> None:
        """Let the reservation stand for longer. Raises FlowKVError if it does not stand any more."""
        renewal = {"token": self._token, "block_hashes": [], "run_lengths": []}
        await _ask_room(self._node, msgspec.structs.replace(self._request, **renewal))

    async def send_computed(self, sequence: Sequence, *, prompt_done: bool) -> None:
        """Send the blocks that are complete and not yet there; with `prompt_done` also the last, partial one.

        Raises TransferFailed.
        """
        async with self._turn:
            block_size = self._node.settings.block_size
            num_ready = sequence.num_computed_tokens // block_size
            if prompt_done:
                num_ready = -(-sequence.num_computed_tokens // block_size)
            if num_ready <= self._num_landed:
                return
            source = sequence.block_table[self._num_landed : num_ready]
            copies = align(source, self._target[self._num_landed : num_ready])
            began = time.monotonic()
            self._sent.append(await self._link.send_blocks(self._request.transfer_id, self._token, copies))
            self._spans.append((began, time.monotonic()))
            self._node.handoffs.confirm_send(self._run.decode.node_id)
            self._num_landed = num_ready

    async def commit(self, sequence: Sequence) -> None:
        """From here on the decode node answers for the request. Raises FlowKVError if it refuses."""
        run = DecodeRun(
            request_id=self._run.request_id,
            attempt=self._run.attempt,
            epoch=self._run.epoch,
            node=self._run.decode,
            fingerprint=self._run.fingerprint,
            prefill=self._node.ref,
            token=self._token,
            gateway_id=self._run.gateway_id,
            prompt_ids=self._run.prompt_ids,
            output_ids=TokenIds.of(sequence.output_ids),
            sampling=self._run.sampling,
            deadline_in_s=sequence.deadline - time.monotonic(),
        )
        subject = subjects.at(subjects.DECODE_RUN, self._run.decode.node_id)
        await self._node.bus.request(subject, run, Accepted, timeout_s=CONTROL_TIMEOUT_S)

    async def release(self) -> None:
        """Give the room back: the request has ended, or begins again at `reserve()`. If lost, it expires."""
        message = Release(transfer_id=self._request.transfer_id, token=self._token)
        subject = subjects.at(subjects.DECODE_RELEASE, self._run.decode.node_id)
        with contextlib.suppress(FlowKVError):
            async with self._turn:  # a copy may still be on its way
                await self._node.bus.request(subject, message, Accepted, timeout_s=CONTROL_TIMEOUT_S)

    async def report(self, computed_at: float) -> None:
        """Publish and measure what was moved; `computed_at` is when the last chunk was done (monotonic)."""
        hidden_s, exposed_s = split_at(computed_at, self._spans)
        event = KVTransferred(
            transfer_id=self._request.transfer_id,
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


async def reserve(
    node: Node, run: PrefillRun, sequence: Sequence, in_flight: InFlight, *, again: bool
) -> Handoff:
    """Room for the prompt and the token after it at the decode node; asks again while that node is full.

    `in_flight` hears of each answer; `again` if such room has been released before.
    Raises FlowKVError when the node refuses for good: without saying when to ask again.
    """
    try:
        # The runs that this node's blocks will lie in.
        run_lengths = node.blocks.plan_runs(node.layout.blocks_for_prompt(sequence.num_tokens))
    except OutOfBlocks:
        run_lengths = []  # they are only a hint
    request = Reserve(
        transfer_id=sequence.transfer_id,
        node=run.decode,
        fingerprint=run.fingerprint,
        prefill=node.ref,
        gateway_id=run.gateway_id,
        num_tokens=sequence.num_tokens + 1,
        block_hashes=sequence.full_block_hashes(node.card.fingerprint, node.settings.block_size),
        run_lengths=run_lengths,
        expires_in_s=RESERVATION_S,
        again=again,
    )
    backoff = Backoff(FIRST_RETRY_S, LONGEST_RETRY_S)
    while True:
        link = await node.links.link_to(run.decode)
        try:
            return Handoff(node, run, link, request, await _ask_room(node, request))
        except FlowKVError as error:
            if error.retry_after_s is None:
                raise
            if isinstance(error, Full):
                in_flight.hear_decode_node()
        await backoff.sleep()


async def _ask_room(node: Node, request: Reserve) -> Reserved:
    subject = subjects.at(subjects.DECODE_RESERVE, request.node.node_id)
    return await node.bus.request(subject, request, Reserved, timeout_s=CONTROL_TIMEOUT_S)


def split_at(instant: float, spans: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Seconds of `spans` before `instant` and after it."""
    before = after = 0.0
    for began, ended in spans:
        middle = min(max(instant, began), ended)
        before += middle - began
        after += ended - middle
    return before, after
