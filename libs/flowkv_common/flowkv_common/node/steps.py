"""The step loop: ask every guest for work, run one packed batch, hand the results back.

This is the paper's hybrid scheduler (section 8) as chunked prefill: all decode tokens of the step, then
prompt tokens up to the node's cap. One number, `max_prefill_tokens_per_step`, says what the node is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from flowkv_common.engine.batch import PackedBatch, WorkItem, pack
from flowkv_common.engine.engine import DeviceLost, Engine, Result
from flowkv_common.engine.sequence import Sequence
from flowkv_common.errors import Internal
from flowkv_common.kv.blocks import Blocks
from flowkv_common.node.instruments import Instruments
from flowkv_common.node.outbox import Outbox
from flowkv_common.node.step_fit import StepCounts

if TYPE_CHECKING:
    from flowkv_common.node.guest import Guest

log = logging.getLogger(__name__)


class Retire:
    """Frees blocks of sequences, never while a step may still write them (docs/architecture.md, rule 3).

    `moved_at` is when a step last ended or room last came back, on the monotonic clock.
    """

    def __init__(self, blocks: Blocks) -> None:
        self.moved_at = time.monotonic()
        self._blocks = blocks
        self._in_step: set[int] = set()
        self._after_step: list[list[int]] = []
        self._freed = asyncio.Event()

    def __call__(self, sequence: Sequence) -> None:
        """The sequence gives its blocks back: now, or when the step that holds it has ended."""
        block_ids, sequence.block_table = sequence.block_table, []
        sequence.num_computed_tokens = sequence.num_committed_blocks = 0
        if id(sequence) in self._in_step:
            self._after_step.append(block_ids)
        else:
            self._release(block_ids)

    def notice_room(self) -> None:
        """Somebody else has freed blocks: who waits for room looks again."""
        self.moved_at = time.monotonic()
        self._freed.set()

    async def wait_for_room(self, timeout_s: float) -> None:
        """Until some blocks were freed, or `timeout_s`: others than sequences free blocks too."""
        self._freed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._freed.wait()

    def step_begins(self, sequences: Iterable[Sequence]) -> None:
        self._in_step = {id(sequence) for sequence in sequences}

    def step_ended(self) -> None:
        self.moved_at = time.monotonic()
        self._in_step = set()
        held, self._after_step = self._after_step, []
        for block_ids in held:
            self._release(block_ids)

    def _release(self, block_ids: list[int]) -> None:
        self._blocks.release(block_ids)
        self.notice_room()


class Steps:
    """Runs the engine for the guests, in the order decode first, then prefill under the cap."""

    def __init__(
        self,
        engine: Engine,
        guests: Callable[[], Iterable[Guest]],
        outbox: Outbox,
        retire: Retire,
        instruments: Instruments,
        *,
        block_size: int,
        token_budget: int,
        max_prefill_tokens_per_step: int,
        wake: asyncio.Event,
    ) -> None:
        self.max_prefill_tokens_per_step = max_prefill_tokens_per_step
        self._engine = engine
        self._guests = guests
        self._outbox = outbox
        self._retire = retire
        self._instruments = instruments
        self._block_size = block_size
        self._token_budget = token_budget
        self._wake = wake

    async def run(self) -> None:
        """Step after step, until cancelled; sleeps while no guest wants anything. Raises `DeviceLost`."""
        while True:
            self._wake.clear()
            work = self._plan()
            if not work:
                await self._outbox.flush()
                await self._wake.wait()
                continue
            await self._step(work)

    def _plan(self) -> list[tuple[Guest, WorkItem]]:
        guests = list(self._guests())
        work = [(guest, item) for guest in guests for item in guest.decode_work()]
        room = min(self._token_budget - len(work), self.max_prefill_tokens_per_step)
        # The floor of one block: waiting prompts, such as a preempted sequence, always proceed.
        room = max(room, self._block_size)
        for guest in guests:
            items = guest.prefill_work(room)
            work += [(guest, item) for item in items]
            room -= sum(item.num_tokens for item in items)
        return work

    async def _step(self, work: list[tuple[Guest, WorkItem]]) -> None:
        items = [item for _, item in work]
        batch = pack(items, self._block_size)
        counts = StepCounts.of(items)  # before the step: a cancel during it makes a sequence forget
        self._retire.step_begins(item.sequence for item in items)
        began = time.monotonic()
        try:
            sampled = await self._compute(batch)
        except DeviceLost:
            raise
        except Exception as error:
            # A step that fails costs the requests in it their attempt, never the process.
            log.exception("an engine step failed")
            self._retire.step_ended()
            for guest, item in work:
                guest.fail(item.sequence, Internal(f"the engine step failed: {error}"))
            return
        self._retire.step_ended()
        self._instruments.observe_step(counts, time.monotonic() - began)
        for (guest, item), token in zip(work, sampled, strict=True):
            if item.sequence.block_table:  # else it was cancelled during the step
                item.sequence.num_computed_tokens += item.num_tokens
                guest.apply(item.sequence, token)

    async def _compute(self, batch: PackedBatch) -> Result:
        """Runs the batch; meanwhile what the last step gave goes out. Raises what the step raises."""
        failed: Exception | None = None
        sampled: Result = []
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._outbox.flush())  # begins when the batch has been handed over
            try:
                sampled = await self._engine.step(batch)
            except Exception as error:  # not as a group: it is one step's error
                failed = error
        if failed:
            raise failed
        return sampled
