"""The life of a running sequence on its decode node: accepted, run in the batch, sent again if need be.

Room is reserved first. KV lands in it, then the commit of the handoff makes a running sequence of it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial

from flowkv_common.bus.service import Endpoint
from flowkv_common.errors import BadRequest, DeadlineExceeded, FlowKVError, Full, NotFound, Stale
from flowkv_common.timeline import phase_of
from flowkv_common.tracing import NO_SPAN, Span
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import (
    Accepted,
    DecodeRun,
    NodeTimes,
    Release,
    Reserve,
    Reserved,
    Resume,
    Resumed,
    TokenChunk,
    TokenLogprob,
    transfer_id,
)
from flowkv_decode.drafts import Drafts
from flowkv_engine.engine.batch import Sequence
from flowkv_engine.engine.sampler import Sampled
from flowkv_engine.kv.blocks import GROWTH_ROOM, OutOfBlocks
from flowkv_engine.kv.segments import runs_of
from flowkv_node.attempts import Attempt
from flowkv_node.measures import OutputLengths
from flowkv_node.node import Node, RoleLoad, new_sequence

log = logging.getLogger(__name__)

# What a prefill node is told to wait before it asks a full node again.
RETRY_S = 0.05
SWEEP_PERIOD_S = 0.5
# Output is kept so long after its sequence has left.
KEEP_S = 30.0
# Tokens in one chunk that is sent again, so that it fits into a message: 8 bytes each, or with log
# probabilities 800.
MAX_TOKENS = 1024
MAX_TOKENS_WITH_LOGPROBS = 16


class DecodeRole:
    """`_running` is the batch, oldest first; `_waiting` are those without a place or without blocks."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._block_size = node.settings.block_size
        self._num_accepted = 0
        self._running: list[Sequence] = []
        self._waiting: deque[Sequence] = deque()
        self._outputs = Outputs()
        self._lengths = OutputLengths()
        self._drafts = Drafts()
        # Without a token from here: when the attempt came (monotonic), and what prefill tells of its handoff.
        self._fresh: dict[str, tuple[float, NodeTimes | None]] = {}
        self._spans: dict[str, Span] = {}  # transfer id -> from its arrival until it leaves

    def endpoints(self) -> list[Endpoint]:
        return [
            self._node.endpoint(subjects.DECODE_RESERVE, Reserve, self.reserve),
            self._node.endpoint(subjects.DECODE_RELEASE, Release, self.release),
            self._node.endpoint(subjects.DECODE_RUN, DecodeRun, self.accept),
            self._node.endpoint(subjects.DECODE_RESUME, Resume, self.resume),
        ]

    async def run(self) -> None:
        """Until cancelled: end what is out of time, forget old output."""
        while True:
            await asyncio.sleep(SWEEP_PERIOD_S)
            now = time.monotonic()
            for sequence in [*self._running, *self._waiting]:
                if now > sequence.deadline:
                    self.fail(sequence, DeadlineExceeded("out of time in decode"))
            self._outputs.forget_old(now)
            await self._node.outbox.flush()

    # --- accept -----------------------------------------------------------------------------------

    async def reserve(self, request: Reserve) -> Reserved:
        """Room for a handoff, with what is cached of the prefix pinned; with its token it is renewed.

        Raises Full while there is no room, BadRequest when there never will be, Stale for an attempt that has
        ended or is here already, for a reservation that has ended and for another incarnation, WrongModel,
        Unavailable when draining; what is reserved already may still be renewed then.
        """
        node, tid = self._node, request.transfer_id
        node.refuse_misdirected(request.node, request.fingerprint)
        node.attempts.refuse_ended(tid)
        if request.token:
            reservation = node.reservations.extend(tid, request.token, request.expires_in_s)
        else:
            if tid in node.attempts:
                raise Stale(f"attempt {tid} is here already")
            node.refuse_while_unready()
            num_blocks = -(-request.num_tokens // self._block_size)
            if num_blocks > node.blocks.num_blocks:
                raise BadRequest(
                    f"{request.num_tokens} tokens never fit into {node.blocks.num_blocks} blocks"
                )
            if node.reservations.num_open >= node.settings.max_handoffs:
                raise Full("too many handoffs in flight", retry_after_s=RETRY_S)
            try:
                # The watermark: else a handoff would preempt running sequences, and starve preempted ones.
                if not node.blocks.can_allocate(num_blocks + self._num_blocks_owed()):
                    raise OutOfBlocks
                reservation = node.reservations.reserve(
                    tid,
                    num_blocks,
                    # The block of the last prompt token is always sent: prefill recomputes that token anyway.
                    request.block_hashes[: (request.num_tokens - 2) // self._block_size],
                    like=request.run_lengths,
                    expires_in_s=request.expires_in_s,
                    room=GROWTH_ROOM,
                )
            except OutOfBlocks:
                raise Full(f"no room for {num_blocks} blocks", retry_after_s=RETRY_S) from None
            node.attempts.begin(
                Attempt(tid, request.gateway_id, "reserved", lambda _: node.reservations.cancel(tid))
            )
            node.num_rooms_given += not request.again
        return Reserved(
            transfer_id=tid,
            token=reservation.token,
            runs=runs_of(reservation.block_ids),
            num_cached_blocks=reservation.num_cached_blocks,
        )

    async def release(self, message: Release) -> Accepted:
        """Prefill does not need the room now: it is free again. Raises Stale for a wrong token."""
        reservation = self._node.reservations.claim(message.transfer_id, message.token)
        self._free_reserved(message.transfer_id, reservation.block_ids)
        self._node.wake.set()  # preempted sequences come before the next reservation
        return Accepted(node_id=self._node.ref.node_id)

    async def accept(self, run: DecodeRun) -> Accepted:
        """The commit of a handoff: all KV stands but the last token's, and the next step has the sequence.

        A drain does not refuse what it has reserved. Raises Stale when the reservation has expired or the
        token is wrong, BadRequest for other tokens than it was made for; then its blocks are free again.
        """
        node, tid = self._node, transfer_id(run.request_id, run.attempt)
        node.refuse_misdirected(run.node, run.fingerprint)
        node.hear_epoch(run.epoch)
        await node.prepare(run.sampling)
        node.attempts.refuse_ended(tid)
        reservation = node.reservations.claim(tid, run.token)
        block_ids = reservation.block_ids
        num_tokens = len(run.prompt_ids) + len(run.output_ids)
        if not run.output_ids or num_tokens > len(block_ids) * self._block_size:
            self._free_reserved(tid, block_ids)
            raise BadRequest(
                f"{len(run.prompt_ids)} tokens of prompt and {len(run.output_ids)} of output are not what "
                f"{len(block_ids)} blocks were reserved for"
            )
        sequence = new_sequence(run)
        sequence.block_table = list(block_ids)
        sequence.num_committed_blocks = reservation.num_cached_blocks
        sequence.num_computed_tokens = num_tokens - 1
        node.commit_computed(sequence)
        self.adopt(sequence, run.handoff)
        return Accepted(node_id=node.ref.node_id)

    def adopt(self, sequence: Sequence, handoff: NodeTimes | None = None) -> None:
        """Run a sequence that comes with its blocks, by this handoff if it has one behind it.

        Raises Stale for an attempt that has ended; then the blocks are still the caller's.
        """
        tid, came_at = sequence.transfer_id, time.monotonic()
        stop = partial(self._stop, sequence)
        self._node.attempts.begin(Attempt(tid, sequence.gateway_id, "decode", stop))
        self._fresh[tid] = came_at, handoff
        self._spans[tid] = self._node.begin_span("decode", sequence, came_at)
        self._outputs.begin(sequence)
        self._waiting.append(sequence)
        self._num_accepted += 1
        self._node.changed.set()
        self._node.wake.set()

    def _free_reserved(self, tid: str, block_ids: list[int]) -> None:
        self._node.blocks.release(block_ids)
        self._node.attempts.end(tid)
        self._node.notice_room()

    def _num_blocks_owed(self) -> int:
        """Blocks that sequences here need before anyone new: one to grow each, or all of them again."""
        preempted = (sequence for sequence in self._waiting if not sequence.block_table)
        return len(self._running) + sum(map(self._num_missing_blocks, preempted))

    # --- batch ------------------------------------------------------------------------------------

    def sequences_to_decode(self) -> list[Sequence]:
        """Gives places and blocks first, if need be at the cost of the youngest sequence."""
        self._admit()
        for sequence in list(self._running):
            # A sequence that is not in the batch any more has given way to an older one.
            while sequence in self._running and self._num_missing_blocks(sequence):
                try:
                    sequence.block_table.append(self._node.blocks.grow(sequence.block_table[-1]))
                except OutOfBlocks:
                    self._preempt(self._running[-1])
        return [sequence for sequence in self._running if not sequence.is_prefilling]

    def drafts(self, sequences: list[Sequence]) -> list[tuple[int, ...]]:
        """What the next step guesses of each of these: to the end of its last block, so none takes blocks.

        A guess takes a place in the batch: a full one has none.
        """
        node, num_sequences = self._node, len(sequences)
        most, fit = node.settings.max_num_seqs - num_sequences, node.instruments.step_fitter.fit()
        if node.settings.speculation == "off" or not sequences or most <= 0 or fit is None:
            return [()] * num_sequences
        mean_context = sum(sequence.num_tokens for sequence in sequences) / num_sequences
        each_s = fit.sequence_s + fit.context_token_s * mean_context

        def cost_s(num_guesses: int) -> float:
            size = num_sequences + num_guesses
            return node.instruments.step_sizes.correct(size, fit.base_s + size * each_s)

        longest = [self._longest_draft(sequence) for sequence in sequences]
        return self._drafts.choose(sequences, longest, most, cost_s)

    def _longest_draft(self, sequence: Sequence) -> int:
        """Tokens that may be guessed: each has a slot, and may still come before the last one."""
        num_tokens, sampling = sequence.num_tokens, sequence.sampling
        return min(
            len(sequence.block_table) * self._block_size - num_tokens,
            sampling.max_tokens - len(sequence.output_ids) - 1,
            self._node.card.max_model_len - num_tokens - 1,
        )

    def sequences_to_prefill(self) -> list[Sequence]:
        """Those that lost their KV to a preemption, oldest first."""
        return [sequence for sequence in self._running if sequence.is_prefilling]

    def apply(self, sequence: Sequence, sampled: Sampled | None) -> None:
        """Append the new token, tell the gateway, end the sequence when this was its last."""
        if sampled is None:
            return
        fresh = self._fresh.pop(sequence.transfer_id, None)
        times = self._first_times(sequence.transfer_id, *fresh) if fresh else None
        chunk = self._node.add_token(sequence, sampled, times=times)
        self._outputs.add_chunk(chunk)
        if chunk.finish_reason:
            self._lengths.observe(
                len(sequence.prompt_ids), len(sequence.output_ids), stopped=chunk.finish_reason == "stop"
            )
            self._node.attempts.end(sequence.transfer_id)
            self._drop(sequence)

    def _first_times(self, tid: str, came_at: float, handoff: NodeTimes | None) -> list[NodeTimes]:
        """Of an attempt that gets its first token here now."""
        now = time.monotonic()
        mine = NodeTimes(
            node_id=self._node.ref.node_id,
            part="decode",
            total_s=round(now - came_at, 6),
            phases=[phase_of("step", max(came_at, self._node.step_began_at), now, came_at)],
        )
        self._spans[tid].add_phases(mine, came_at)
        return [handoff, mine] if handoff else [mine]

    def fail(self, sequence: Sequence, error: FlowKVError) -> None:
        self._spans.get(sequence.transfer_id, NO_SPAN).fail(error)
        self._node.outbox.add_failure(sequence.gateway_id, sequence.transfer_id, error)
        self._node.attempts.end(sequence.transfer_id)
        self._drop(sequence)

    def _num_missing_blocks(self, sequence: Sequence) -> int:
        """Blocks that the sequence lacks for all the tokens it has, the newest included."""
        return max(0, -(-sequence.num_tokens // self._block_size) - len(sequence.block_table))

    def _admit(self) -> None:
        """Give places in the batch, first come, first served; preempted sequences first need blocks again.

        One that has its blocks does not wait behind one that has none: it may be what holds them.
        """
        has_room = True
        for sequence in list(self._waiting):
            if len(self._running) == self._node.settings.max_num_seqs:
                return
            if not sequence.block_table:
                # Its cached blocks first; the rest is computed again as a prompt.
                has_room = has_room and self._node.take_blocks(sequence, self._num_missing_blocks(sequence))
                if not has_room:
                    continue
            self._waiting.remove(sequence)
            self._running.append(sequence)
            self._node.attempts.set_state(sequence.transfer_id, "decode")

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence out of the batch and recompute it later: cheaper than keeping its blocks idle."""
        self._running.remove(sequence)
        self._node.free_blocks(sequence)
        self._node.instruments.preemptions.inc()
        if self._num_missing_blocks(sequence) > self._node.blocks.num_blocks:
            self.fail(sequence, Full("the sequence has outgrown this node's KV cache"))
            return
        self._waiting.appendleft(sequence)
        self._node.attempts.set_state(sequence.transfer_id, "preempted")
        self._spans[sequence.transfer_id].add_event("preempted")
        log.info("preempted %s at %d tokens", sequence.transfer_id, sequence.num_tokens)

    def _stop(self, sequence: Sequence, is_cut_off: bool) -> None:
        """Cancelled. Output that was cut off has not ended: it goes on elsewhere."""
        if not is_cut_off:
            self._lengths.observe(len(sequence.prompt_ids), len(sequence.output_ids), stopped=True)
        self._drop(sequence)

    def _drop(self, sequence: Sequence) -> None:
        if sequence in self._running:
            self._running.remove(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        self._outputs.end(sequence.transfer_id)
        self._drafts.forget(sequence.transfer_id)
        self._fresh.pop(sequence.transfer_id, None)
        span = self._spans.pop(sequence.transfer_id, NO_SPAN)
        span.describe({"flowkv.num_output_tokens": len(sequence.output_ids)})
        span.end()
        self._node.free_blocks(sequence)
        self._node.wake.set()

    def load(self) -> RoleLoad:
        here = [*self._running, *self._waiting]
        return RoleLoad(
            num_accepted=self._num_accepted,
            queued_prefill_tokens=sum(one.num_new_tokens for one in here if one.is_prefilling),
            queued_attended=sum(one.num_new_attended for one in here if one.is_prefilling),
            num_waiting=len(self._waiting),
            num_running=len(self._running),
            num_context_tokens=sum(sequence.num_computed_tokens for sequence in self._running),
            forecast=self._lengths.forecast(
                (len(one.prompt_ids), len(one.output_ids), one.sampling.max_tokens - len(one.output_ids))
                for one in here
            ),
        )

    # --- send again -------------------------------------------------------------------------------

    async def resume(self, request: Resume) -> Resumed:
        """The output from an index on, for a gateway that missed a message. Raises NotFound."""
        chunk = self._outputs.since(request.transfer_id, request.from_index)
        if chunk is None:
            raise NotFound(f"no output of {request.transfer_id} here")
        return Resumed(chunk=chunk)


@dataclass(slots=True)
class _Output:
    first_index: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    left_at: float | None = None  # monotonic; without a `finish_reason` it was cancelled or has failed


class Outputs:
    """The output of recent sequences by transfer id, from the first token that this node answers for."""

    def __init__(self) -> None:
        self._outputs: dict[str, _Output] = {}

    def begin(self, sequence: Sequence) -> None:
        """A sequence begins here; the last of its `output_ids` came without log probabilities."""
        first = len(sequence.output_ids) - 1
        self._outputs[sequence.transfer_id] = _Output(first, [sequence.output_ids[-1]])

    def add_chunk(self, chunk: TokenChunk) -> None:
        output = self._outputs[chunk.transfer_id]
        output.token_ids += chunk.token_ids
        output.logprobs += chunk.logprobs
        output.finish_reason = chunk.finish_reason

    def end(self, transfer_id: str) -> None:
        """The sequence has left, for any reason; its output is kept for `KEEP_S`."""
        if output := self._outputs.get(transfer_id):  # else cancelled, forgotten, and then its step fails
            output.left_at = time.monotonic()

    def since(self, transfer_id: str, from_index: int) -> TokenChunk | None:
        """One chunk with the tokens from `from_index` on, not all if they are many.

        None when unknown, out of reach, or all of it where the sequence has left before its end: the message
        that it has failed was lost, too.
        """
        output = self._outputs.get(transfer_id)
        if output is None or from_index < output.first_index:
            return None
        start = from_index - output.first_index
        if output.left_at is not None and output.finish_reason is None and start >= len(output.token_ids):
            return None
        if start == 0 and output.logprobs:
            return None  # prefill did not pass on the log probabilities of its token
        end = start + (MAX_TOKENS_WITH_LOGPROBS if output.logprobs else MAX_TOKENS)
        return TokenChunk(
            transfer_id=transfer_id,
            index=from_index,
            token_ids=output.token_ids[start:end],
            logprobs=output.logprobs[start - 1 : end - 1] if start else [],
            finish_reason=output.finish_reason if end >= len(output.token_ids) else None,
        )

    def forget_old(self, now: float) -> None:
        self._outputs = {
            transfer_id: output
            for transfer_id, output in self._outputs.items()
            if output.left_at is None or now - output.left_at <= KEEP_S
        }
