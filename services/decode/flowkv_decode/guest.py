"""The decode guest: sequences come in by handoff, run in one continuous batch, and leave as tokens."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from functools import partial

from flowkv_common.bus.service import Endpoint
from flowkv_common.engine.batch import WorkItem
from flowkv_common.engine.sampler import Sampled
from flowkv_common.engine.sequence import Sequence
from flowkv_common.errors import DeadlineExceeded, FlowKVError, Full, NotFound
from flowkv_common.kv.blocks import OutOfBlocks
from flowkv_common.node.attempts import Attempt, Cause
from flowkv_common.node.guest import Node
from flowkv_common.node.output_lengths import OutputLengths
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import (
    Accepted,
    DecodeRun,
    Release,
    Reserve,
    Reserved,
    Resume,
    Resumed,
    TokenChunk,
)
from flowkv_common.wire.nodes import OutputForecast
from flowkv_decode import intake
from flowkv_decode.batching import decode_items, num_missing_blocks, pick_victim, recompute_items
from flowkv_decode.output import Outputs

log = logging.getLogger(__name__)

SWEEP_PERIOD_S = 0.5


class DecodeGuest:
    """`_running` is the batch, oldest first; `_waiting` are those without a place or without blocks."""

    name = "decode"

    def __init__(self, node: Node) -> None:
        self.num_accepted = 0
        self._node = node
        self._running: list[Sequence] = []
        self._waiting: deque[Sequence] = deque()
        self._outputs = Outputs()
        self._lengths = OutputLengths()

    def endpoints(self) -> list[Endpoint]:
        def at(subject: str) -> str:
            return subjects.at(subject, self._node.ref.node_id)

        return [
            Endpoint(at(subjects.DECODE_RESERVE), Reserve, self.reserve),
            Endpoint(at(subjects.DECODE_RELEASE), Release, self.release),
            Endpoint(at(subjects.DECODE_RUN), DecodeRun, self.accept),
            Endpoint(at(subjects.DECODE_RESUME), Resume, self.resume),
        ]

    async def reserve(self, request: Reserve) -> Reserved:
        return intake.reserve(self._node, request, self._num_blocks_owed())

    async def release(self, message: Release) -> Accepted:
        intake.release(self._node, message)
        return Accepted(node_id=self._node.ref.node_id)

    async def accept(self, run: DecodeRun) -> Accepted:
        """The handoff: the sequence runs from the next step on. A drain does not refuse what it reserved."""
        self._node.refuse_other_life(run.node)
        self._node.refuse_other_model(run.fingerprint)
        self._node.hear_epoch(run.epoch)
        self.adopt(intake.claim(self._node, run))
        return Accepted(node_id=self._node.ref.node_id)

    async def resume(self, request: Resume) -> Resumed:
        """The output from an index on, for a gateway that missed a message. Raises NotFound."""
        chunk = self._outputs.since(request.transfer_id, request.from_index)
        if chunk is None:
            raise NotFound(f"no output of {request.transfer_id} here")
        return Resumed(chunk=chunk)

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

    def adopt(self, sequence: Sequence) -> None:
        """Run a sequence that comes with its blocks."""
        stop = partial(self._stop, sequence)
        self._node.attempts.begin(Attempt(sequence.transfer_id, sequence.gateway_id, "decode", stop))
        self._outputs.open(sequence)
        self._waiting.append(sequence)
        self.num_accepted += 1
        self._node.changed.set()
        self._node.wake.set()

    # --- between steps ----------------------------------------------------------------------------

    def decode_work(self) -> list[WorkItem]:
        self._admit()
        for sequence in list(self._running):
            if sequence in self._running:  # else it has given way to an older one
                self._ensure_blocks(sequence)
        return decode_items(self._running)

    def prefill_work(self, max_tokens: int) -> list[WorkItem]:
        return recompute_items(self._running, max_tokens)

    def apply(self, sequence: Sequence, sampled: Sampled | None) -> None:
        """Append the new token, tell the gateway, end the sequence when this was its last."""
        self._node.commit_computed(sequence)
        if sampled is None:
            return
        card = self._node.card
        finish_reason = sequence.finish_reason_after(sampled.token_id, card.eos_token_ids, card.max_model_len)
        chunk = TokenChunk(
            transfer_id=sequence.transfer_id,
            index=sequence.next_output_index,
            token_ids=[sampled.token_id],
            logprobs=[sampled.logprob] if sampled.logprob else [],
            finish_reason=finish_reason,
        )
        sequence.output_ids.append(sampled.token_id)
        self._outputs.add(chunk)
        self._node.outbox.add(sequence.gateway_id, chunk)
        if finish_reason:
            self._lengths.see(len(sequence.output_ids), stopped=finish_reason == "stop")
            self._node.attempts.end(sequence.transfer_id)
            self._drop(sequence)

    def fail(self, sequence: Sequence, error: FlowKVError) -> None:
        self._node.outbox.fail(sequence.gateway_id, sequence.transfer_id, error)
        self._node.attempts.end(sequence.transfer_id)
        self._drop(sequence)

    def _stop(self, sequence: Sequence, cause: Cause) -> None:
        """Cancelled. Its output has ended here only if its gateway says so: else it goes on elsewhere."""
        if cause is Cause.UNWANTED:
            self._lengths.see(len(sequence.output_ids), stopped=True)
        self._drop(sequence)

    # --- the batch --------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Give places in the batch, first come, first served; preempted sequences first need blocks again.

        One that has its blocks does not wait behind one that has none: it may be what holds them.
        """
        has_room = True
        for sequence in list(self._waiting):
            if len(self._running) == self._node.settings.max_num_seqs:
                return
            if not sequence.block_table:
                has_room = has_room and self._take_again(sequence)
                if not has_room:
                    continue
            self._waiting.remove(sequence)
            self._running.append(sequence)
            self._node.attempts.set_state(sequence.transfer_id, "decode")

    def _take_again(self, sequence: Sequence) -> bool:
        """Blocks for a preempted sequence, its own cached ones first; they are computed again as a prompt."""
        return self._node.take_blocks(sequence, num_missing_blocks(sequence, self._node.settings.block_size))

    def _ensure_blocks(self, sequence: Sequence) -> None:
        """Room for the newest token, if need be at the cost of the youngest sequence."""
        while sequence in self._running and num_missing_blocks(sequence, self._node.settings.block_size):
            try:
                sequence.block_table.append(self._node.blocks.grow(sequence.block_table[-1]))
            except OutOfBlocks:
                self._preempt(pick_victim(self._running))

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence out of the batch and recompute it later: cheaper than keeping its blocks idle."""
        self._running.remove(sequence)
        self._node.retire(sequence)
        self._node.instruments.count_preemption()
        if num_missing_blocks(sequence, self._node.settings.block_size) > self._node.blocks.num_blocks:
            self.fail(sequence, Full("the sequence has outgrown this node's KV cache"))
            return
        self._waiting.appendleft(sequence)
        self._node.attempts.set_state(sequence.transfer_id, "preempted")
        log.info("preempted %s at %d tokens", sequence.transfer_id, sequence.num_tokens)

    def _num_blocks_owed(self) -> int:
        """Blocks that those who are here need before anyone new: one to grow each, or all of them again."""
        block_size = self._node.settings.block_size
        preempted = (sequence for sequence in self._waiting if not sequence.block_table)
        return len(self._running) + sum(num_missing_blocks(sequence, block_size) for sequence in preempted)

    def _drop(self, sequence: Sequence) -> None:
        if sequence in self._running:
            self._running.remove(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        self._outputs.end(sequence.transfer_id)
        self._node.retire(sequence)
        self._node.wake.set()

    # --- load -------------------------------------------------------------------------------------

    def num_prompts(self) -> int:
        return 0

    def num_waiting(self) -> int:
        return len(self._waiting)

    def num_running(self) -> int:
        return len(self._running)

    def num_context_tokens(self) -> int:
        return sum(sequence.num_computed_tokens for sequence in self._running)

    def queued_prefill_tokens(self) -> int:
        return sum(s.num_new_tokens for s in [*self._running, *self._waiting] if s.is_prefilling)

    def forecast(self) -> OutputForecast:
        return self._lengths.forecast(
            (len(sequence.output_ids), sequence.sampling.max_tokens - len(sequence.output_ids))
            for sequence in [*self._running, *self._waiting]
        )
