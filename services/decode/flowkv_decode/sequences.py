"""The output of recent sequences, kept so that a gateway that lost a message can ask again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from functools import partial

from flowkv_common.bus.service import Endpoint
from flowkv_common.errors import DeadlineExceeded, FlowKVError, Full, NotFound
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
    TokenLogprob,
)
from flowkv_common.wire.nodes import OutputForecast
from flowkv_decode import accept as intake
from flowkv_engine.engine.batch import WorkItem
from flowkv_engine.engine.sampler import Sampled
from flowkv_engine.engine.sequence import Sequence
from flowkv_engine.kv.blocks import OutOfBlocks
from flowkv_node.attempts import Attempt, Cause
from flowkv_node.node import Node
from flowkv_node.reporting import OutputLengths

KEEP_S = 30.0
# At most so many in one chunk, so that it fits into a message: 8 bytes each, or with log probabilities 800.
MAX_TOKENS = 1024
MAX_TOKENS_WITH_LOGPROBS = 16


@dataclass(slots=True)
class _Output:
    first_index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None


class Outputs:
    """By transfer id, from the first token that this node answers for."""

    def __init__(self) -> None:
        self._outputs: dict[str, _Output] = {}
        self._ended: deque[tuple[float, str]] = deque()  # when, and which; oldest first

    def open(self, sequence: Sequence) -> None:
        """A sequence begins here; the last of its `output_ids` came without log probabilities."""
        first = sequence.next_output_index - 1
        self._outputs[sequence.transfer_id] = _Output(first, [sequence.output_ids[-1]])

    def add(self, chunk: TokenChunk) -> None:
        output = self._outputs[chunk.transfer_id]
        output.token_ids += chunk.token_ids
        output.logprobs += chunk.logprobs
        output.finish_reason = chunk.finish_reason

    def end(self, transfer_id: str) -> None:
        """The sequence has left, for whatever reason; what it said is kept for a while."""
        self._ended.append((time.monotonic(), transfer_id))

    def since(self, transfer_id: str, from_index: int) -> TokenChunk | None:
        """One chunk with the tokens from `from_index` on, not all if they are many.

        None when unknown or out of reach.
        """
        output = self._outputs.get(transfer_id)
        if output is None or from_index < output.first_index:
            return None
        start = from_index - output.first_index
        if start == 0 and output.logprobs:
            return None  # prefill did not pass on the log probabilities of its own token
        end = start + (MAX_TOKENS_WITH_LOGPROBS if output.logprobs else MAX_TOKENS)
        return TokenChunk(
            transfer_id=transfer_id,
            index=from_index,
            token_ids=output.token_ids[start:end],
            logprobs=output.logprobs[start - 1 : end - 1] if start else [],
            finish_reason=output.finish_reason if end >= len(output.token_ids) else None,
        )

    def forget_old(self, now: float) -> None:
        """Drop the output of those that left a while ago."""
        while self._ended and now - self._ended[0][0] > KEEP_S:
            _, transfer_id = self._ended.popleft()
            self._outputs.pop(transfer_id, None)  # a sequence may have ended twice: failed, and cancelled


def num_missing_blocks(sequence: Sequence, block_size: int) -> int:
    """Blocks that the sequence lacks for all the tokens it has, the newest included."""
    return max(0, -(-sequence.num_tokens // block_size) - len(sequence.block_table))


def pick_victim(running: Ordered[Sequence]) -> Sequence:
    """Who is preempted: the one that came last, so that the oldest always proceed."""
    return running[-1]


def decode_items(running: Ordered[Sequence]) -> list[WorkItem]:
    """One token for each sequence that has only its newest token to compute."""
    return [WorkItem(sequence, 1) for sequence in running if not sequence.is_prefilling]


def recompute_items(running: Ordered[Sequence], max_tokens: int) -> list[WorkItem]:
    """Chunks of the sequences that lost their KV to a preemption, oldest first."""
    items = []
    for sequence in running:
        if sequence.is_prefilling and max_tokens > 0:
            num_tokens = min(sequence.num_new_tokens, max_tokens)
            items.append(WorkItem(sequence, num_tokens))
            max_tokens -= num_tokens
    return items


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
