"""A prompt on its prefill node: its sequence, its task, and the news that the task waits for."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import time
from collections.abc import Iterable, Iterator

from flowkv_common.aio import FairQueue, Phases, running
from flowkv_common.bus.service import Endpoint
from flowkv_common.errors import BadRequest, DeadlineExceeded, FlowKVError, Internal, TransferFailed
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Accepted, PrefillRun, TokenChunk, transfer_id
from flowkv_engine.engine.batch import WorkItem
from flowkv_engine.engine.sampler import Sampled
from flowkv_engine.engine.sequence import Sequence
from flowkv_node.attempts import Attempt
from flowkv_node.budget import InFlight, Stage
from flowkv_node.node import Node
from flowkv_prefill.handoff import Handoff, reserve


class Prompt:
    """`progress` is set after each chunk, `computed` after the last, which gives `first`, an output token.

    `number` grows from prompt to prompt: its place where prompts wait.
    """

    def __init__(self, run: PrefillRun, number: int) -> None:
        self.run = run
        self.number = number
        self.sequence = _new_sequence(run)
        self.task: asyncio.Task[None] | None = None
        self.progress = asyncio.Event()
        self.computed = asyncio.Event()
        self.computed_at = 0.0  # on the monotonic clock
        self.first: Sampled | None = None
        self.phases = Phases()

    def advance(self, sampled: Sampled | None) -> None:
        """One more chunk is computed; the last one comes with a token."""
        if sampled is not None:
            self.first, self.computed_at = sampled, time.monotonic()
            self.computed.set()
        self.progress.set()

    def forget_sequence(self) -> None:
        """The sequence has another owner now, its blocks too: an empty one takes its place."""
        self.sequence = _new_sequence(self.run)


def _new_sequence(run: PrefillRun) -> Sequence:
    return Sequence(
        request_id=run.request_id,
        attempt=run.attempt,
        transfer_id=transfer_id(run.request_id, run.attempt),
        gateway_id=run.gateway_id,
        prompt_ids=run.prompt_ids.unpack(),
        output_ids=run.output_ids.unpack(),
        sampling=run.sampling,
        deadline=time.monotonic() + run.deadline_in_s,
    )


def plan_chunks(queue: Iterable[Sequence], max_tokens: int, block_size: int) -> list[WorkItem]:
    """First come, first served, at most `max_tokens` tokens in all.

    A chunk that does not end its prompt ends on a block border, so that only whole blocks are handed off
    while later chunks compute.
    """
    chunks: list[WorkItem] = []
    for sequence in queue:
        num_tokens = min(sequence.num_new_tokens, max_tokens)
        if num_tokens < sequence.num_new_tokens:
            end = sequence.num_computed_tokens + num_tokens
            num_tokens -= end % block_size
        if num_tokens <= 0:
            break
        chunks.append(WorkItem(sequence, num_tokens))
        max_tokens -= num_tokens
    return chunks


log = logging.getLogger(__name__)

# Blocks are also freed by those who don't tell: look again after so long.
ROOM_RETRY_S = 0.1
# Who waits so long for blocks here gives its reservation elsewhere back; longer each time, and never for as
# long as a reservation lives.
FIRST_PATIENCE_S = 1.0
LONGEST_PATIENCE_S = 8.0


class PrefillGuest:
    """Queues prompts, computes them in chunks, hands their KV cache to a decode node."""

    name = "prefill"

    def __init__(self, node: Node) -> None:
        self.num_accepted = 0
        self._node = node
        self._arrived: asyncio.Queue[Prompt] = asyncio.Queue()
        self._prompts: dict[str, Prompt] = {}  # transfer_id -> prompt, in order of arrival
        self._computing: dict[str, Prompt] = {}  # those with blocks, in the order of their chunks
        self._numbers = itertools.count()
        # Blocks are given out to one prompt after the other, in the order of arrival.
        self._turns = FairQueue(max_holders=1)

    def endpoints(self) -> list[Endpoint]:
        return [Endpoint(subjects.at(subjects.PREFILL_RUN, self._node.ref.node_id), PrefillRun, self.accept)]

    async def accept(self, run: PrefillRun) -> Accepted:
        """Take a prompt on. Raises Stale for a former life or an ended attempt, WrongModel, Unavailable."""
        self._node.refuse_new_work(run.node, run.fingerprint)
        # Heard, but never refused for being old: the assignment was a promise to a client.
        self._node.hear_epoch(run.epoch)
        prompt = Prompt(run, next(self._numbers))
        tid = prompt.sequence.transfer_id
        if tid not in self._prompts:
            self._node.attempts.begin(Attempt(tid, run.gateway_id, "queued", lambda _: self._stop(prompt)))
            self._prompts[tid] = prompt
            self.num_accepted += 1
            self._arrived.put_nowait(prompt)
            self._node.changed.set()
        return Accepted(node_id=self._node.ref.node_id)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            while True:
                prompt = await self._arrived.get()
                if prompt.sequence.transfer_id in self._prompts:  # else cancelled before it began
                    prompt.task = tasks.create_task(self._serve(prompt))

    # --- the life of a prompt ---------------------------------------------------------------------

    async def _serve(self, prompt: Prompt) -> None:
        """From the queue to the decode node. Whatever happens, blocks come back and the gateway is told."""
        sequence, node = prompt.sequence, self._node
        try:
            self._refuse_what_never_fits(sequence)
            async with asyncio.timeout(prompt.run.deadline_in_s):
                if prompt.run.decode == node.ref:
                    await self._serve_here(prompt)
                else:
                    await self._serve_and_hand_off(prompt)
        except BadRequest as error:
            self._give_up(prompt, error)
        except FlowKVError as error:
            # All that is asked of others here is asked of the decode node: the code tells whom to avoid.
            node_id = prompt.run.decode.node_id
            self._give_up(prompt, TransferFailed(f"{node_id}: {error.message}"))
        except TimeoutError:
            self._give_up(prompt, DeadlineExceeded("out of time in prefill"))
        except Exception as error:
            log.exception("prefill of %s failed", sequence.transfer_id)
            self._give_up(prompt, Internal(f"prefill failed: {error}"))
        finally:
            self._prompts.pop(sequence.transfer_id, None)
            await node.outbox.flush()

    def _refuse_what_never_fits(self, sequence: Sequence) -> None:
        """Raises BadRequest for a prompt that would wait for more blocks than there are."""
        num_blocks, total = (
            self._node.layout.blocks_for_prompt(sequence.num_tokens),
            self._node.blocks.num_blocks,
        )
        if num_blocks > total:
            raise BadRequest(
                f"A prompt of {sequence.num_tokens} tokens needs {num_blocks} blocks of KV cache, "
                f"{self._node.ref.node_id} has {total}.",
                field="prompt",
            )

    async def _serve_and_hand_off(self, prompt: Prompt) -> None:
        """And count how it ends, once it has begun. One that is out of time is cancelled, too."""
        sequence, node = prompt.sequence, self._node
        num_bytes = node.layout.block_bytes * node.layout.blocks_for_prompt(sequence.num_tokens)
        async with contextlib.AsyncExitStack() as held:
            with prompt.phases.phase("queue"):
                in_flight = await held.enter_async_context(
                    node.budget.hold(sequence.transfer_id, prompt.run.decode.node_id, num_bytes)
                )
            result = "failed"
            try:
                with self._blocks(prompt):
                    handoff = await self._reserve_and_take(prompt, in_flight)
                    async with running(handoff.keep_reserved(), self._send_early(prompt, handoff)):
                        in_flight.enter(Stage.COMPUTING)
                        await self._compute(prompt)
                        in_flight.enter(Stage.SENDING)
                        if await self._emit_first(prompt):
                            result = "unneeded"
                            node.attempts.end(sequence.transfer_id)
                            await handoff.release()
                        else:
                            await self._hand_over(prompt, handoff)
                            result = "done"
            except asyncio.CancelledError:
                result = "cancelled"
                raise
            finally:
                node.instruments.count_handoff(result)

    async def _serve_here(self, prompt: Prompt) -> None:
        """Prefill and decode are the same node: the handoff moves no bytes."""
        with self._blocks(prompt):
            await self._take_in_turn(prompt)
            self._node.num_rooms_given += 1
            await self._compute(prompt)
            if await self._emit_first(prompt):
                self._node.attempts.end(prompt.sequence.transfer_id)
            else:
                self._node.guests["decode"].adopt(prompt.sequence)
                prompt.forget_sequence()

    async def _compute(self, prompt: Prompt) -> None:
        """Wait until all chunks are computed."""
        tid = prompt.sequence.transfer_id
        self._node.attempts.set_state(tid, "prefill")
        self._computing[tid] = prompt
        self._node.wake.set()
        with prompt.phases.phase("prefill"):
            await prompt.computed.wait()

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
            await handoff.send_computed(prompt.sequence, prompt_done=False)

    async def _emit_first(self, prompt: Prompt) -> bool:
        """Send output token 0 to the gateway at once; True when it ends the request."""
        assert prompt.first is not None
        sequence, token = prompt.sequence, prompt.first
        finish_reason = sequence.finish_reason_after(
            token.token_id, self._node.card.eos_token_ids, self._node.card.max_model_len
        )
        chunk = TokenChunk(
            transfer_id=sequence.transfer_id,
            index=sequence.next_output_index,
            token_ids=[token.token_id],
            logprobs=[token.logprob] if token.logprob else [],
            finish_reason=finish_reason,
            num_cached_tokens=sequence.num_cached_tokens,
            phases_s=prompt.phases.seconds,
        )
        sequence.output_ids.append(token.token_id)
        self._node.outbox.add(sequence.gateway_id, chunk)
        await self._node.outbox.flush()
        return finish_reason is not None

    async def _hand_over(self, prompt: Prompt, handoff: Handoff) -> None:
        """Send what is left, then commit: from here on the decode node holds the attempt."""
        tid = prompt.sequence.transfer_id
        self._node.attempts.set_state(tid, "handoff")
        with prompt.phases.phase("handoff"):
            await handoff.send_computed(prompt.sequence, prompt_done=True)
        await handoff.hand_over(prompt.sequence)
        self._node.attempts.end(tid)
        await handoff.report(prompt.computed_at)

    def _stop(self, prompt: Prompt) -> None:
        """Cancelled from outside. A task that has not begun would end without cleaning up."""
        self._prompts.pop(prompt.sequence.transfer_id, None)
        if prompt.task:
            prompt.task.cancel()

    def _give_up(self, prompt: Prompt, error: FlowKVError) -> None:
        tid = prompt.sequence.transfer_id
        self._node.outbox.fail(prompt.run.gateway_id, tid, error)
        self._node.attempts.end(tid)
        log.warning("gave up %s: %s", tid, error.message)

    # --- blocks -----------------------------------------------------------------------------------

    async def _reserve_and_take(self, prompt: Prompt, in_flight: InFlight) -> Handoff:
        """Room at the decode node, then blocks here: in that order everywhere.

        Nodes that prefill for each other could still wait in a circle, each for blocks that are reserved for
        a prompt of the next. So who has waited for a while gives its reservation back and begins again.
        """
        patience_s, has_released = FIRST_PATIENCE_S, False
        handoff: Handoff | None = None
        while True:
            with prompt.phases.phase("reserve"):
                if handoff:
                    await handoff.renew()
                else:
                    handoff = await reserve(
                        self._node, prompt.run, prompt.sequence, in_flight, again=has_released
                    )
            in_flight.enter(Stage.WAITING)
            try:
                # Drawn anew each time, so that two who wait for each other don't give way at once.
                async with asyncio.timeout(patience_s * random.uniform(1.0, 1.5)):
                    await self._take_in_turn(prompt)
                return handoff
            except TimeoutError:
                if not self._node.reservations.num_open:
                    continue  # no circle: what holds the blocks here waits for nobody
            log.info("%s lets others go first: no blocks here", prompt.sequence.transfer_id)
            await handoff.release()
            handoff, has_released = None, True
            in_flight.enter(Stage.RESERVING)
            patience_s = min(2 * patience_s, LONGEST_PATIENCE_S)

    async def _take_in_turn(self, prompt: Prompt) -> None:
        """Wait for blocks for the whole prompt and one token more, those of a cached prefix among them."""
        with prompt.phases.phase("queue"):
            async with self._turns.hold(place=prompt.number):
                while not self._take(prompt.sequence):
                    await self._node.retire.wait_for_room(ROOM_RETRY_S)

    @contextlib.contextmanager
    def _blocks(self, prompt: Prompt) -> Iterator[None]:
        """Gives the blocks back that the prompt has taken in the context, if any."""
        try:
            yield
        finally:
            self._computing.pop(prompt.sequence.transfer_id, None)
            self._node.retire(prompt.sequence)
            self._node.wake.set()

    def _take(self, sequence: Sequence) -> bool:
        """False when there is no room now."""
        if not self._node.take_blocks(sequence, self._node.layout.blocks_for_prompt(sequence.num_tokens)):
            return False
        sequence.num_cached_tokens = sequence.num_computed_tokens
        return True

    # --- between steps ----------------------------------------------------------------------------

    def decode_work(self) -> list[WorkItem]:
        return []

    def prefill_work(self, max_tokens: int) -> list[WorkItem]:
        waiting = (prompt.sequence for prompt in self._computing.values() if prompt.first is None)
        return plan_chunks(waiting, max_tokens, self._node.settings.block_size)

    def apply(self, sequence: Sequence, sampled: Sampled | None) -> None:
        self._node.commit_computed(sequence)
        self._computing[sequence.transfer_id].advance(sampled)

    def fail(self, sequence: Sequence, error: FlowKVError) -> None:
        if prompt := self._computing.get(sequence.transfer_id):
            self._give_up(prompt, error)
            self._stop(prompt)

    def adopt(self, sequence: Sequence) -> None:
        raise Internal("prefill adopts no sequences")

    # --- load -------------------------------------------------------------------------------------

    def num_prompts(self) -> int:
        return sum(prompt.first is None for prompt in self._prompts.values())

    def num_waiting(self) -> int:
        return 0

    def num_running(self) -> int:
        return 0

    def num_context_tokens(self) -> int:
        return 0

    def queued_prefill_tokens(self) -> int:
        return sum(p.sequence.num_new_tokens for p in self._prompts.values() if p.first is None)

    def forecast(self) -> None:
        return None
