"""Which prefixes the nodes have cached: an index of block hashes, and the follower that keeps it up to date.

Times are seconds of any one clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from array import array
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence

from flowkv_common.aio import Backoff, group
from flowkv_common.bus.connection import Bus
from flowkv_common.errors import BadRequest, FlowKVError, Stale
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import NodeRef
from flowkv_common.wire.nodes import BlockList, BlocksChanged, ListBlocks, NodeDescriptor

log = logging.getLogger(__name__)

# Blocks. A hash covers all tokens before it: a node with the last block of a part likely has the others.
PART_SIZE = 8
# Changes that are kept while a node's list is on its way: minutes of them.
MAX_WAITING = 256
# The keys of nodes that have left are cleared bit by bit, so many per call.
KEYS_PER_CALL = 1024
PAGE_TIMEOUT_S = 2.0
FIRST_RETRY_S = 0.1
MAX_RETRY_S = 5.0
# A scheduler that has just started asks all nodes; their lists must not fill its connection.
MAX_LOADS = 8

Keys = list[int]


def keys_of(hashes: Sequence[str]) -> Keys:
    """The first half of each hash as a number: a quarter of the memory, and made at the speed of C.

    Raises `BadRequest` for what is no hash.
    """
    try:
        digests = bytes.fromhex("".join(hashes))
    except ValueError:
        digests = b""
    if len(digests) != 16 * len(hashes):
        raise BadRequest("a block hash has 32 hex digits", field="block_hashes")
    return array("Q", digests)[::2].tolist()


class Hits:
    """How many blocks from the front of one prompt each node has. False if no node has any.

    Nodes are bits: a prefix that a thousand nodes share costs no more than one of a single node.
    """

    def __init__(
        self, ends: Sequence[tuple[int, int]], names: Sequence[str], bit_of: Mapping[str, int]
    ) -> None:
        """`ends`: so many blocks, and the bits of the nodes that have those and no more; shortest first."""
        self._ends = ends
        self._names = names
        self._bit_of = bit_of

    def __bool__(self) -> bool:
        return bool(self._ends)

    @property
    def longest(self) -> int:
        """Blocks that the node has which has the most."""
        return self._ends[-1][0] if self._ends else 0

    def num_blocks(self, node_id: str) -> int:
        if self._ends:
            bit = self._bit_of.get(node_id, 0)
            for num_blocks, bits in self._ends:
                if bits & bit:
                    return num_blocks
        return 0

    def longest_first(self) -> Iterator[str]:
        """All nodes that have any; equals in the order of their bits."""
        for _, bits in reversed(self._ends):
            while bits:
                lowest = bits & -bits
                yield self._names[lowest.bit_length() - 1]
                bits ^= lowest


NO_HITS = Hits((), (), {})


class Expected:
    """Masks of nodes by key, one dict for each second in which expectations end."""

    def __init__(self) -> None:
        self._masks_until: dict[int, dict[int, int]] = {}
        self._ended: list[dict[int, int]] = []  # emptied bit by bit: all at once would delay a request

    def expect_keys(self, keys: Keys, bits: int, until: float) -> int:
        """The nodes of these bits will have the keys; forgotten within a second after `until`.

        Returns the second in which the bits are free again.
        """
        second = math.ceil(until)
        if keys:
            _set_bits(self._masks_until.setdefault(second, {}), keys, bits)
            self._empty_ended(2 * len(keys))
        return second

    def masks(self, now: float) -> list[dict[int, int]]:
        """Those that still count."""
        while self._masks_until and (first := min(self._masks_until)) <= now:
            self._ended.append(self._masks_until.pop(first))
        return list(self._masks_until.values())

    def _empty_ended(self, num_keys: int) -> None:
        while self._ended and num_keys > 0:
            masks = self._ended[-1]
            num_now = min(num_keys, len(masks))
            for _ in range(num_now):
                masks.popitem()
            num_keys -= num_now
            if not masks:
                self._ended.pop()


def _set_bits(masks: dict[int, int], keys: Iterable[int], bits: int) -> None:
    for key in keys:
        mask = masks.get(key)
        masks[key] = bits if mask is None else mask | bits  # most are of the same nodes: they share an int


class _Holder:
    """A node in one of its lives. Its bit is set in the mask of each key in `cached`."""

    def __init__(self, ref: NodeRef, slot: int) -> None:
        self.ref = ref
        self.slot = slot
        self.bit = 1 << slot
        self.seq = 0
        self.cached: set[int] = set()
        self.expected_until = 0  # the second from which on nothing is expected any more
        # Not None from a gap on, until the node's whole list has come.
        self.waiting: list[BlocksChanged] | None = None
        self.listed: set[int] = set()  # on the pages that have come
        self.listed_seq = 0


class PrefixIndex:
    """The cached prefixes of all nodes, in less than 200 bytes per hash and node.

    Events with malformed hashes raise `BadRequest`.
    """

    def __init__(self) -> None:
        self._holders: dict[str, _Holder] = {}
        self._masks: dict[int, int] = {}  # by key: one bit per slot
        self._bits: dict[str, int] = {}  # by node id, of the nodes that are here
        self._present = 0  # all of them
        self._names: list[str] = []  # by slot
        self._free_slots: list[int] = []
        self._left: list[_Holder] = []  # their slots are free once their bits are cleared
        self._expected = Expected()
        self._now = 0.0  # when last asked

    def apply_change(self, event: BlocksChanged) -> bool:
        """False if a change was missed: load the node's whole list, meanwhile changes wait."""
        self._clear_left()
        holder = self._holder(event.node)
        if holder.waiting is not None:
            del holder.waiting[: max(0, len(holder.waiting) - MAX_WAITING + 1)]
            holder.waiting.append(event)
            return False
        return self._follow(holder, event)

    def load_page(self, page: BlockList, number: int) -> bool:
        """Take in one page of a node's list: all of them, in order from 0.

        False if it must be begun again: the node was dropped in between, a change was missed again, or one
        that came after the first page was made has been taken in before it.
        """
        self._clear_left()
        holder = self._holder(page.node)
        if number == 0:
            if holder.waiting is None and page.seq < holder.seq:
                return False
            holder.waiting = holder.waiting or []
            holder.listed = set()
            holder.listed_seq = page.seq
        if holder.waiting is None:
            return False
        keys = keys_of(page.block_hashes)
        holder.listed.update(keys)
        self._add_keys(holder, keys)
        if number < page.num_pages - 1:
            return True
        self._remove_keys(holder, holder.cached - holder.listed)
        waiting, holder.waiting, holder.listed = holder.waiting, None, set()
        holder.seq = holder.listed_seq
        for event in waiting:
            self._follow(holder, event)
        return holder.waiting is None

    def drop_node(self, node_id: str) -> None:
        if holder := self._holders.pop(node_id, None):
            del self._bits[node_id]
            self._present ^= holder.bit
            self._left.append(holder)

    def expect(self, nodes: Iterable[NodeRef], hashes: Sequence[str], until: float) -> None:
        """The nodes will soon have these: a prompt was sent to them. Forgotten within a second after `until`
        unless they report it. Only whole parts count."""
        self._clear_left()
        holders = [self._holder(node) for node in nodes]
        keys = keys_of(hashes[PART_SIZE - 1 :: PART_SIZE])
        second = self._expected.expect_keys(keys, sum(holder.bit for holder in holders), until)
        for holder in holders:
            holder.expected_until = max(holder.expected_until, second)

    def hits(self, keys: Keys, now: float) -> Hits:
        """How many blocks from the front of the chain each node has.

        A node that has the last block of a part is taken to have all of it; of the others each block counts.
        """
        self._now = now
        ends: list[tuple[int, int]] = []
        having, masks = self._present, self._masks
        expected = self._expected.masks(now)
        for start in range(0, len(keys), PART_SIZE):
            part = keys[start : start + PART_SIZE]
            having_all = 0
            if len(part) == PART_SIZE:
                having_all = masks.get(part[-1], 0)
                for expected_masks in expected:
                    having_all |= expected_masks.get(part[-1], 0)
                having_all &= having
            if having_all != having:
                ends += self._ends_within(part, start, having ^ having_all)
            having = having_all
            if not having:
                break
        if keys and having:
            ends.append((len(keys), having))
        return Hits(ends, self._names, self._bits)

    def _ends_within(self, part: Keys, num_before: int, having: int) -> Iterator[tuple[int, int]]:
        """Where in the part the chain ends for the nodes that don't have all of it, as in `Hits`."""
        for num_blocks, key in enumerate(part, start=num_before):
            still_having = self._masks.get(key, 0) & having
            if num_blocks and still_having != having:
                yield num_blocks, having ^ still_having
            having = still_having
            if not having:
                return
        yield num_before + len(part), having

    def _holder(self, ref: NodeRef) -> _Holder:
        """That life of the node; what another life had is forgotten."""
        holder = self._holders.get(ref.node_id)
        if holder is not None and holder.ref == ref:
            return holder
        self.drop_node(ref.node_id)
        slot = self._free_slots.pop() if self._free_slots else len(self._names)
        self._names[slot : slot + 1] = [ref.node_id]
        self._holders[ref.node_id] = holder = _Holder(ref, slot)
        self._bits[ref.node_id] = holder.bit
        self._present |= holder.bit
        return holder

    def _follow(self, holder: _Holder, event: BlocksChanged) -> bool:
        if event.seq <= holder.seq:
            return True  # known already
        if holder.waiting is not None or event.seq != holder.seq + 1:
            holder.waiting = [*(holder.waiting or []), event]
            return False
        removed, stored = keys_of(event.removed), keys_of(event.stored)
        holder.seq = event.seq
        self._remove_keys(holder, removed)
        self._add_keys(holder, stored)
        return True

    def _add_keys(self, holder: _Holder, keys: Keys) -> None:
        _set_bits(self._masks, keys, holder.bit)
        holder.cached.update(keys)

    def _remove_keys(self, holder: _Holder, keys: Iterable[int]) -> None:
        for key in keys:
            if key in holder.cached:
                holder.cached.remove(key)
                self._clear_bit(key, holder.bit)

    def _clear_bit(self, key: int, bit: int) -> None:
        if left := self._masks[key] & ~bit:
            self._masks[key] = left
        else:
            del self._masks[key]

    def _clear_left(self) -> None:
        """Clear some of the bits of nodes that have left; all at once would take too long."""
        num_left = KEYS_PER_CALL
        for holder in list(self._left):
            while num_left and holder.cached:
                self._clear_bit(holder.cached.pop(), holder.bit)
                num_left -= 1
            if not holder.cached and holder.expected_until <= self._now:
                self._left.remove(holder)
                self._free_slots.append(holder.slot)


@contextlib.asynccontextmanager
async def following_prefixes(
    bus: Bus, index: PrefixIndex
) -> AsyncIterator[Callable[[Mapping[str, NodeDescriptor]], None]]:
    """Keep `index` up to date while the context lasts. Tell what is yielded which nodes are registered."""
    async with group() as loads:
        follower = _Follower(bus, index, loads)
        forget_callback = bus.on_reconnect(follower.load_all)
        try:
            # First: what changes while a list is on its way must be heard.
            async with await bus.subscribe(subjects.BLOCKS_ALL, BlocksChanged, follower.hear):
                yield follower.set_nodes
        finally:
            forget_callback()
            follower.set_nodes({})


class _Follower:
    """Loads the list of a node that is new or missed a change; one load per node at a time."""

    def __init__(self, bus: Bus, index: PrefixIndex, tasks: asyncio.TaskGroup) -> None:
        self._bus = bus
        self._index = index
        self._tasks = tasks
        self._nodes: dict[str, NodeRef] = {}
        self._loads: dict[str, tuple[NodeRef, asyncio.Task[None]]] = {}  # by node id
        self._load_slots = asyncio.Semaphore(MAX_LOADS)

    def set_nodes(self, descriptors: Mapping[str, NodeDescriptor]) -> None:
        """The registry has changed."""
        before, self._nodes = self._nodes, {name: found.node for name, found in descriptors.items()}
        for node_id in before.keys() - self._nodes.keys():
            self._stop_load(node_id)
            self._index.drop_node(node_id)
        for node_id, ref in self._nodes.items():
            if ref != before.get(node_id):
                self._start_load(ref)

    def hear(self, event: BlocksChanged) -> None:
        """Changes of a node that the registry doesn't show are ignored: its list is loaded once it does."""
        if self._nodes.get(event.node.node_id) == event.node and not self._index.apply_change(event):
            self._start_load(event.node)

    def load_all(self) -> None:
        """After a reconnect: changes may have been missed, and the nodes may have none to send any more."""
        for ref in self._nodes.values():
            self._stop_load(ref.node_id)
            self._start_load(ref)

    def _start_load(self, ref: NodeRef) -> None:
        """Load the node's list, unless that is under way."""
        loading, task = self._loads.get(ref.node_id, (None, None))
        if task is not None and not task.done() and loading == ref:
            return
        self._stop_load(ref.node_id)
        self._loads[ref.node_id] = ref, self._tasks.create_task(self._load(ref))

    def _stop_load(self, node_id: str) -> None:
        _, task = self._loads.pop(node_id, (None, None))
        if task is not None:
            task.cancel()

    async def _load(self, ref: NodeRef) -> None:
        """Until the node's list is loaded, or its life has ended."""
        retry = Backoff(FIRST_RETRY_S, MAX_RETRY_S)
        while self._nodes.get(ref.node_id) == ref:
            try:
                async with self._load_slots:
                    if await self._load_pages(ref):
                        return
            except Stale:
                return  # another life: the registry will show it
            except BadRequest as error:
                log.warning("the list of prefixes of %s is no such list: %s", ref.node_id, error)
            except FlowKVError as error:
                log.debug("the list of prefixes of %s did not come: %s", ref.node_id, error)
            await retry.sleep()

    async def _load_pages(self, ref: NodeRef) -> bool:
        """False if it must be begun again. Raises FlowKVError."""
        number, num_pages = 0, 1
        subject = subjects.at(subjects.NODE_BLOCKS, ref.node_id)
        while number < num_pages:
            wanted = ListBlocks(node=ref, page=number)
            page = await self._bus.request(subject, wanted, BlockList, timeout_s=PAGE_TIMEOUT_S)
            num_pages = page.num_pages
            if not self._index.load_page(page, number):
                return False
            number += 1
        return True
