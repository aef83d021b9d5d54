"""Tells schedulers which prefixes a node has: once per period what has changed, and all of it on request."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable

from flowkv_common.bus.connection import Bus
from flowkv_common.errors import BadRequest, FlowKVError
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import NodeRef
from flowkv_common.wire.nodes import BlockList, BlocksChanged, LoadReport, OutputForecast, expected_tokens
from flowkv_engine.kv.blocks import Blocks
from flowkv_node.node import Node
from flowkv_node.steps import Steps

# In hashes of 35 bytes: far below the 1 MiB of a NATS message, and made in a few milliseconds. What is more
# waits for the next period; at 16 tokens per block no node computes more than 100,000 tokens per second.
MAX_CHANGES = 4096
PAGE_SIZE = 4096


class BlockNews:
    """What listeners have been told of the cache. A page lists just that, so that it fits to the changes."""

    def __init__(self, ref: NodeRef, blocks: Blocks, max_hashes: int = 2 * PAGE_SIZE) -> None:
        """`max_hashes` is what one message can carry."""
        self._ref = ref
        self._blocks = blocks
        self._seq = 0
        self._is_gap_untold = False
        # By hash, not by block: between two pages a hash may move to another block, but to no other page.
        # Pages differ in size: twice the mean is far beyond what chance makes of one.
        page_size = min(PAGE_SIZE, max(1, max_hashes // 2))
        self._max_changes = min(MAX_CHANGES, max(1, max_hashes))
        self._pages: list[set[str]] = [set() for _ in range(max(1, -(-blocks.num_blocks // page_size)))]

    async def tell(self, bus: Bus, period_s: float) -> None:
        """Until cancelled. While cut off from NATS nothing is said, and what cancels out is never said."""
        forget_callback = bus.on_reconnect(self.skip)
        try:
            while True:
                if bus.is_connected and (change := self.next_change()):
                    try:
                        await bus.publish(subjects.blocks(self._ref.node_id), change)
                    except FlowKVError:
                        self.skip()
                await asyncio.sleep(period_s)
        finally:
            forget_callback()

    def next_change(self) -> BlocksChanged | None:
        """What is to be told now; None if nothing is."""
        stored, removed = self._blocks.prefix_cache.take_changes(self._max_changes)
        if not (stored or removed or self._is_gap_untold):
            return None
        for block_hash in stored:
            self._page_of(block_hash).add(block_hash)
        for block_hash in removed:
            self._page_of(block_hash).discard(block_hash)
        self._seq += 1
        self._is_gap_untold = False
        return BlocksChanged(node=self._ref, seq=self._seq, stored=stored, removed=removed)

    def skip(self) -> None:
        """Messages may have been lost: listeners are to notice a gap, even if nothing changes any more."""
        self._seq += 1
        self._is_gap_untold = True

    def page(self, number: int) -> BlockList:
        """Raises `BadRequest` if there is no such page."""
        if not 0 <= number < len(self._pages):
            raise BadRequest(f"there are {len(self._pages)} pages, counted from 0", field="page")
        hashes = list(self._pages[number])
        return BlockList(node=self._ref, seq=self._seq, num_pages=len(self._pages), block_hashes=hashes)

    def _page_of(self, block_hash: str) -> set[str]:
        return self._pages[hash(block_hash) % len(self._pages)]


# Of ended outputs about so many tokens count, the latest ones.
MEMORY_TOKENS = 20_000
# Before anything was seen: one end of itself in so many tokens, a chat answer's usual length.
PRIOR_TOKENS = 256


class OutputLengths:
    """Learns from outputs that have ended; tells of those that run."""

    def __init__(self) -> None:
        self._num_tokens = 0.0
        self._num_stops = 0.0

    def see(self, num_tokens: int, *, stopped: bool) -> None:
        """An output has ended: `stopped` if not by its `max_tokens`. One that was cut off has not ended."""
        keep = max(0.0, 1.0 - num_tokens / MEMORY_TOKENS)
        self._num_tokens = keep * self._num_tokens + num_tokens
        self._num_stops = keep * self._num_stops + stopped

    def forecast(self, running: Iterable[tuple[int, int]]) -> OutputForecast:
        """Of sequences that have produced so many tokens and may produce so many more."""
        sequences = list(running)
        num_tokens = PRIOR_TOKENS + self._num_tokens + sum(produced for produced, _ in sequences)
        stop_rate = (1.0 + self._num_stops) / num_tokens
        first = min((left for _, left in sequences), default=0)
        return OutputForecast(
            tokens_left=round(sum(expected_tokens(left, stop_rate) for _, left in sequences), 1),
            # All of them together stop so many times as often.
            first_ends_in=round(expected_tokens(first, stop_rate * len(sequences)), 1),
            stop_rate=round(stop_rate, 8),
        )


def snapshot(node: Node, steps: Steps, seq: int) -> LoadReport:
    """The node's load right now. `seq` grows by one per report of an incarnation."""
    guests = node.guests.values()
    return LoadReport(
        node=node.ref,
        seq=seq,
        period_s=node.settings.load_period_s,
        ready=node.why_not_ready() is None,
        draining=node.draining,
        max_prefill_tokens_per_step=steps.max_prefill_tokens_per_step,
        queued_prefill_tokens=sum(guest.queued_prefill_tokens() for guest in guests),
        num_waiting=sum(guest.num_waiting() for guest in guests),
        num_running=sum(guest.num_running() for guest in guests),
        max_num_seqs=node.settings.max_num_seqs,
        blocks=node.blocks.counts(),
        prefill_tokens_per_s=node.instruments.prefill_tokens_per_s,
        decode_step_s=node.instruments.decode_step_s,
        num_handoffs=node.budget.num_in_flight,
        handoff_bytes=node.budget.bytes_in_flight,
        links=node.links.connectors_in_use(),
        num_prompts=sum(guest.num_prompts() for guest in guests),
        num_prompts_accepted=node.guests["prefill"].num_accepted,
        num_rooms_given=node.num_rooms_given,
        num_sequences_accepted=node.guests["decode"].num_accepted,
        num_context_tokens=sum(guest.num_context_tokens() for guest in guests),
        step=node.instruments.step_fitter.fit(),
        epoch=node.epoch,
        forecast=node.guests["decode"].forecast(),
    )


async def report_load(node: Node, steps: Steps) -> None:
    """Until cancelled. While cut off from NATS nothing is said: an old report is worse than none."""
    seq = 0
    forget_callback = node.bus.on_reconnect(node.changed.set)
    try:
        while True:
            node.changed.clear()
            if node.bus.is_connected:
                seq += 1
                with contextlib.suppress(FlowKVError):  # the next one says it all again
                    await node.bus.publish(subjects.load(node.ref.node_id), snapshot(node, steps, seq))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(node.settings.load_period_s):
                    await node.changed.wait()
    finally:
        forget_callback()
