"""The life of a prompt on its prefill node: it is queued, computed in chunks, and handed to a decode node."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from dataclasses import dataclass, field
from operator import attrgetter

import msgspec

from flowkv_common.aio import FairQueue, Phases, running
from flowkv_common.bus.service import Endpoint
from flowkv_common.errors import BadRequest, DeadlineExceeded, FlowKVError, Internal, TransferFailed
from flowkv_common.timeline import at_most, phase_of
from flowkv_common.tracing import NO_SPAN, Span
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Accepted, NodeTimes, Phase, PrefillRun, TokenChunk, TokenLogprob
from flowkv_engine.engine.batch import Sequence
from flowkv_engine.engine.sampler import Sampled
from flowkv_node.attempts import Attempt
from flowkv_node.handoffs import Stage
from flowkv_node.node import Node, RoleLoad, new_sequence
from flowkv_prefill.handoff import Handoff

log = logging.getLogger(__name__)

# Some blocks are freed without a word: look again after so long.
ROOM_RETRY_S = 0.1
# After this long without local blocks a prompt releases its remote reservation and begins again; longer each
# time, and never as long as a reservation lives.
FIRST_PATIENCE_S = 1.0
LONGEST_PATIENCE_S = 8.0
# Of a prompt's log probabilities, so that a chunk fits into any message: each has up to 800 bytes.
MAX_LOGPROBS_PER_CHUNK = 32


@dataclass(slots=True, eq=False)
class Prompt:
    """A prompt and what its task waits for."""

    run: PrefillRun
    due: float  # its first token, on the monotonic clock: its place among the prompts of this node
    interruptible_until: float  # on the same clock: prompts in time that come by then are due before it
    sequence: Sequence
    task: asyncio.Task[None] = field(init=False)
    progress: asyncio.Event = field(default_factory=asyncio.Event)  # set after each chunk
    computed: asyncio.Event = field(default_factory=asyncio.Event)  # set after the last one
    computed_at: float = 0.0  # on the monotonic clock
    first: Sampled | None = None  # what the last chunk gives: an output token
    phases: Phases = field(default_factory=Phases)
    chunks: list[Phase] = field(default_factory=list)
    came_at: float = field(default_factory=time.monotonic)
    span: Span = NO_SPAN  # from its arrival to the end of its handoff

    def times(self, node_id: str) -> NodeTimes:
        """Of all until its first token, which is now."""
        waits = [phase_of(*span, self.came_at) for span in self.phases.spans if span[0] != "prefill"]
        return NodeTimes(
            node_id=node_id,
            part="prefill",
            total_s=round(time.monotonic() - self.came_at, 6),
            phases=at_most([*waits, *self.chunks]),
        )


class PrefillRole:
    """Queues prompts, computes them in chunks, hands their KV cache to a decode node.

    The prompt that is due first comes first, whether it waits for its part of the handoff budget, for blocks
    or for its next chunk. So a late prompt is interrupted by those in time, until it is due itself; it shares
    no step with them.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._num_accepted = 0
        self._tasks = asyncio.TaskGroup()  # open while `run` runs: one task per prompt
        self._prompts: dict[str, Prompt] = {}  # transfer_id -> prompt, in order of arrival
        self._computing: dict[str, Prompt] = {}  # those with blocks
        # Blocks are given out to one prompt after the other.
        self._block_queue = FairQueue(max_holders=1)

    def endpoints(self) -> list[Endpoint]:
        return [self._node.endpoint(subjects.PREFILL_RUN, PrefillRun, self.accept)]

    async def run(self) -> None:
        async with self._tasks:
            await asyncio.Event().wait()

    async def accept(self, run: PrefillRun) -> Accepted:
        """Take a prompt on.

        Raises Stale for another incarnation or an ended attempt, WrongModel, Unavailable.
        """
        self._node.refuse_misdirected(run.node, run.fingerprint)
        self._node.refuse_while_unready()
        # Heard, but never refused for being old: the assignment was a promise to a client.
        self._node.hear_epoch(run.epoch)
        now = time.monotonic()
        prompt = Prompt(run, now + run.due_in_s, now + run.interruptible_for_s, new_sequence(run))
        tid = prompt.sequence.transfer_id
        if tid not in self._prompts:
            self._node.attempts.begin(Attempt(tid, run.gateway_id, "queued", lambda _: self._stop(prompt)))
            self._prompts[tid] = prompt
            self._num_accepted += 1
            prompt.span = self._node.begin_span("prefill", prompt.sequence, prompt.came_at)
            prompt.task = self._tasks.create_task(self._serve(prompt))
            self._node.changed.set()
        return Accepted(node_id=self._node.ref.node_id)

    # --- the life of a prompt ---------------------------------------------------------------------

    async def _serve(self, prompt: Prompt) -> None:
        """From the queue to the decode node. Whatever happens, blocks come back and the gateway is told."""
        tid, node = prompt.sequence.transfer_id, self._node
        num_tokens = prompt.sequence.num_tokens
        num_blocks = node.layout.blocks_for_prompt(num_tokens)
        try:
            if num_blocks > node.blocks.num_blocks:  # it would wait for ever
                raise BadRequest(
                    f"A prompt of {num_tokens} tokens needs {num_blocks} blocks of KV cache, "
                    f"{node.ref.node_id} has {node.blocks.num_blocks}.",
                    field="prompt",
                )
            async with asyncio.timeout(prompt.run.deadline_in_s):
                await node.prepare(prompt.run.sampling)
                if prompt.run.decode == node.ref:
                    await self._serve_here(prompt)
                else:
                    await self._hand_off(prompt, num_blocks * node.layout.block_bytes)
        except BadRequest as error:
            self._give_up(prompt, error)
        except FlowKVError as error:
            # All that is asked of others here is asked of the decode node: the code tells whom to avoid.
            self._give_up(prompt, TransferFailed(f"{prompt.run.decode.node_id}: {error.message}"))
        except TimeoutError:
            self._give_up(prompt, DeadlineExceeded("out of time in prefill"))
        except Exception as error:
            log.exception("prefill of %s failed", tid)
            self._give_up(prompt, Internal(f"prefill failed: {error}"))
        finally:
            self._prompts.pop(tid, None)
            self._computing.pop(tid, None)
            node.free_blocks(prompt.sequence)
            node.wake.set()
            prompt.span.end()
            await node.outbox.flush()

    async def _hand_off(self, prompt: Prompt, num_bytes: int) -> None:
        """To another node. The metric says how it ended; one that is out of time is cancelled, too."""
        tid, node = prompt.sequence.transfer_id, self._node
        async with contextlib.AsyncExitStack() as held:
            with prompt.phases.phase("queue"):
                is_late = time.monotonic() < prompt.interruptible_until
                place = node.handoffs.hold(
                    tid, prompt.run.decode.node_id, num_bytes, due=prompt.due, is_late=is_late
                )
                in_flight = await held.enter_async_context(place)
            result = "failed"  # one of `HANDOFF_RESULTS`, as far as it has come
            try:
                handoff = Handoff(node, prompt.run, prompt.sequence, in_flight, prompt.came_at)
                await self._reserve_and_take_blocks(prompt, handoff)
                async with running(handoff.keep_reserved(), self._send_early(prompt, handoff)):
                    in_flight.enter(Stage.COMPUTING)
                    is_whole = await self._compute_first_token(prompt)
                    in_flight.enter(Stage.SENDING)
                    if is_whole:
                        result = "unneeded"  # also if a copy under way fails now
                        node.attempts.end(tid)
                        await handoff.release()
                        return
                    node.attempts.set_state(tid, "handoff")
                    with prompt.phases.phase("handoff"):
                        await handoff.send_computed(prompt_done=True)
                    prompt.span.add_phases(await handoff.commit(), prompt.came_at)
                    node.attempts.end(tid)  # the decode node has it now
                    await handoff.report(prompt.computed_at)
                    result = "done"
            except asyncio.CancelledError:
                result = "cancelled"
                raise
            finally:
                node.instruments.handoffs[result].inc()

    async def _serve_here(self, prompt: Prompt) -> None:
        """Prefill and decode are the same node: the handoff moves no bytes."""
        await self._take_blocks(prompt)
        self._node.num_rooms_given += 1
        if await self._compute_first_token(prompt):
            self._node.attempts.end(prompt.sequence.transfer_id)
        else:
            self._node.decode.adopt(prompt.sequence)
            prompt.sequence = new_sequence(prompt.run)  # the blocks are decode's now: none to free here

    async def _reserve_and_take_blocks(self, prompt: Prompt, handoff: Handoff) -> None:
        """Room at the decode node, then blocks here: in that order everywhere.

        Nodes that prefill for each other could still wait in a circle, each for blocks that are reserved for
        a prompt of the next. So a prompt that has waited for a while gives its reservation back and begins
        again.
        """
        patience_s = FIRST_PATIENCE_S
        while True:
            with prompt.phases.phase("reserve"):
                await handoff.reserve()
            handoff.in_flight.enter(Stage.WAITING)
            try:
                # Drawn anew each time, so that two that wait for each other don't give way at once.
                async with asyncio.timeout(patience_s * random.uniform(1.0, 1.5)):
                    await self._take_blocks(prompt)
                return
            except TimeoutError:
                if not self._node.reservations.num_open:
                    continue  # no circle: what holds the blocks here waits for no other node
            log.info("%s lets others go first: no blocks here", prompt.sequence.transfer_id)
            await handoff.release()
            handoff.in_flight.enter(Stage.RESERVING)
            patience_s = min(2 * patience_s, LONGEST_PATIENCE_S)

    async def _take_blocks(self, prompt: Prompt) -> None:
        """Wait for blocks for the whole prompt and one token more, those of a cached prefix among them."""
        sequence, node, queue = prompt.sequence, self._node, self._block_queue
        num_blocks = node.layout.blocks_for_prompt(sequence.num_tokens)
        has_blocks = False
        with prompt.phases.phase("queue"):
            while not has_blocks:
                node.look_for_room()  # one that waits there gives way if it is due later
                async with queue.hold(place=prompt.due):
                    while not queue.is_overtaken(prompt.due):
                        if has_blocks := node.take_blocks(sequence, num_blocks):
                            break
                        await node.wait_for_room(ROOM_RETRY_S)
        sequence.num_cached_tokens = sequence.num_computed_tokens

    async def _compute_first_token(self, prompt: Prompt) -> bool:
        """Wait for all chunks, then send output token 0 to the gateway; True when it ends the request."""
        tid = prompt.sequence.transfer_id
        self._node.attempts.set_state(tid, "prefill")
        self._computing[tid] = prompt
        self._node.wake.set()
        with prompt.phases.phase("prefill"):
            await prompt.computed.wait()
        assert prompt.first is not None
        times = prompt.times(self._node.ref.node_id)
        prompt.span.add_phases(times, prompt.came_at)
        prompt.span.add_event("first token", prompt.came_at + times.total_s)
        chunk = self._node.add_token(
            prompt.sequence,
            prompt.first,
            num_cached_tokens=prompt.sequence.num_cached_tokens,
            phases_s=prompt.phases.seconds,
            times=[times],
        )
        await self._node.outbox.flush()
        return chunk.finish_reason is not None

    async def _send_early(self, prompt: Prompt, handoff: Handoff) -> None:
        """After each chunk but the last: send the blocks that are complete, while the next one computes.

        It runs beside the prompt, so that the first token never waits for a copy.
        """
        if not self._node.settings.overlap_transfer:
            return
        while True:
            await prompt.progress.wait()
            prompt.progress.clear()
            if prompt.computed.is_set():
                return
            await handoff.send_computed(prompt_done=False)

    def _stop(self, prompt: Prompt) -> None:
        """Cancelled from outside. A task that has not begun would end without cleaning up."""
        self._prompts.pop(prompt.sequence.transfer_id, None)
        prompt.span.end()
        prompt.task.cancel()

    def _give_up(self, prompt: Prompt, error: FlowKVError) -> None:
        tid = prompt.sequence.transfer_id
        prompt.span.fail(error)
        self._node.outbox.add_failure(prompt.run.gateway_id, tid, error)
        self._node.attempts.end(tid)
        log.warning("gave up %s: %s", tid, error.message)

    # --- between steps ----------------------------------------------------------------------------

    def sequences_to_prefill(self) -> list[Sequence]:
        """As they are due. Interruptible ones only while there is no other: each would make the other's steps
        longer, for which its first token waits."""
        waiting = [prompt for prompt in self._computing.values() if prompt.first is None]
        now = time.monotonic()
        others = [prompt for prompt in waiting if now >= prompt.interruptible_until]
        return [prompt.sequence for prompt in sorted(others or waiting, key=attrgetter("due"))]

    def not_computed(self) -> list[Sequence]:
        return [prompt.sequence for prompt in self._computing.values() if prompt.first is None]

    def apply(self, sequence: Sequence, sampled: Sampled | None) -> None:
        """One more chunk is computed; the last one comes with a token."""
        prompt, now = self._computing[sequence.transfer_id], time.monotonic()
        num_before = sequence.num_cached_tokens + sum(chunk.num_tokens for chunk in prompt.chunks)
        chunk = phase_of("chunk", self._node.step_began_at, now, prompt.came_at)
        num_tokens = sequence.num_computed_tokens - num_before
        prompt.chunks.append(msgspec.structs.replace(chunk, num_tokens=num_tokens))
        if sampled is not None:
            prompt.first, prompt.computed_at = sampled, now
            prompt.computed.set()
        prompt.progress.set()

    def add_prompt_logprobs(self, sequence: Sequence, logprobs: list[TokenLogprob]) -> None:
        """To the gateway, before the prompt's first token. Those of a cancelled prompt are dropped."""
        if sequence.transfer_id not in self._computing:
            return
        for at in range(0, len(logprobs), MAX_LOGPROBS_PER_CHUNK):
            piece = logprobs[at : at + MAX_LOGPROBS_PER_CHUNK]
            chunk = TokenChunk(
                transfer_id=sequence.transfer_id,
                index=len(sequence.output_ids),
                token_ids=[],
                prompt_logprobs=piece,
                prompt_index=sequence.num_scored_tokens + 1,
            )
            sequence.num_scored_tokens += len(piece)
            self._node.outbox.add_chunk(sequence.gateway_id, chunk)

    def fail(self, sequence: Sequence, error: FlowKVError) -> None:
        if prompt := self._computing.get(sequence.transfer_id):
            self._give_up(prompt, error)
            self._stop(prompt)

    def load(self) -> RoleLoad:
        now = time.monotonic()
        waiting = [prompt for prompt in self._prompts.values() if prompt.first is None]
        queued = [prompt.sequence for prompt in waiting]
        interruptible = [prompt.sequence for prompt in waiting if now < prompt.interruptible_until]
        return RoleLoad(
            num_accepted=self._num_accepted,
            queued_prefill_tokens=sum(one.num_new_tokens for one in queued),
            num_prompts=len(queued),
            interruptible_prefill_tokens=sum(one.num_new_tokens for one in interruptible),
            queued_attended=sum(one.num_new_attended for one in queued),
            interruptible_attended=sum(one.num_new_attended for one in interruptible),
        )
