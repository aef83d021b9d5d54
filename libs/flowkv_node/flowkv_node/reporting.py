"""What a node tells schedulers: its load, and which prefixes its cache has."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from itertools import islice

from flowkv_common.aio import jittered, wait_event
from flowkv_common.bus.connection import Bus
from flowkv_common.errors import BadRequest, FlowKVError
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import NodeRef
from flowkv_common.wire.nodes import BlockList, BlocksChanged, LoadReport
from flowkv_engine.kv.blocks import Blocks
from flowkv_node.node import Node

# In hashes of 35 bytes: far below the 1 MiB of a NATS message, and made in a few milliseconds. What is more
# waits for the next period; at 16 tokens per block no node computes more than 100,000 tokens per second.
MAX_CHANGES = 4096
PAGE_SIZE = 4096
# A host has fewer nodes, and only peers on one host are likely to have another connector than most. What is
# more passes for usual: a report stays short, however many peers there are.
MAX_UNUSUAL_LINKS = 64
POOL_CELLS = 64  # of two characters each


async def report_load(node: Node) -> None:
    """Until cancelled. While cut off from NATS nothing is said: an old report is worse than none."""
    seq = 0  # grows by one per report of an incarnation
    strip_due_at = 0.0  # monotonic: not in every report, since one may follow each prompt
    forget_callback = node.bus.on_reconnect(node.changed.set)
    try:
        while True:
            node.changed.clear()
            if node.bus.is_connected:
                seq += 1
                pool, now = "", time.monotonic()
                if now >= strip_due_at:
                    pool = node.blocks.strip(POOL_CELLS)
                    strip_due_at = now + node.settings.load_period_s / 2
                with contextlib.suppress(FlowKVError):  # the next one says it all again
                    await node.bus.publish(subjects.load(node.ref.node_id), load_report(node, seq, pool))
            # A reconnect wakes all nodes at once: a thousand reports in one go delay a scheduler's answers.
            await wait_event(node.changed, jittered(node.settings.load_period_s))
    finally:
        forget_callback()


def load_report(node: Node, seq: int, pool: str = "") -> LoadReport:
    """The node's load right now, with this picture of its pool."""
    prefill, decode = node.prefill.load(), node.decode.load()
    connectors = node.links.connectors_in_use()
    [(usual, _)] = Counter(connectors.values()).most_common(1) or [("", 0)]
    unusual = ((node_id, name) for node_id, name in connectors.items() if name != usual)
    return LoadReport(
        node=node.ref,
        seq=seq,
        period_s=node.settings.load_period_s,
        ready=node.why_not_ready() is None,
        draining=node.drains_until is not None,
        max_prefill_tokens_per_step=node.max_prefill_tokens_per_step,
        queued_prefill_tokens=prefill.queued_prefill_tokens + decode.queued_prefill_tokens,
        num_waiting=decode.num_waiting,
        num_running=decode.num_running,
        max_num_seqs=node.settings.max_num_seqs,
        blocks=node.blocks.counts(),
        prefill_tokens_per_s=node.instruments.prefill_tokens_per_s,
        decode_step_s=node.instruments.decode_step_s,
        num_handoffs=node.handoffs.num_in_flight,
        handoff_bytes=node.handoffs.bytes_in_flight,
        links=dict(islice(unusual, MAX_UNUSUAL_LINKS)),
        num_prompts=prefill.num_prompts,
        num_prompts_accepted=prefill.num_accepted,
        num_rooms_given=node.num_rooms_given,
        num_sequences_accepted=decode.num_accepted,
        num_context_tokens=decode.num_context_tokens,
        step=node.instruments.step_fitter.fit(),
        epoch=node.epoch,
        forecast=decode.forecast,
        num_links=len(connectors),
        usual_connector=usual,
        interruptible_prefill_tokens=prefill.interruptible_prefill_tokens,
        queued_attended=prefill.queued_attended + decode.queued_attended,
        interruptible_attended=prefill.interruptible_attended,
        pool=pool,
        is_cordoned=node.is_cordoned,
    )


class BlockNews:
    """What schedulers have been told of the cache. A page lists just that, so that it fits to the changes."""

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

    async def publish(self, bus: Bus, period_s: float) -> None:
        """Until cancelled: per period what has changed. While cut off from NATS nothing is said."""
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
        """What is to be told now; None if nothing is. Hashes that were added and evicted since cancel out."""
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
