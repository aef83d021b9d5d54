"""Who has which prefix in its cache, as the nodes tell it. Pure: no clock, no I/O.

What it says is a hint: a node may have evicted a block since. A wrong hint costs time, never a wrong answer.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence

from flowkv_common.errors import BadRequest
from flowkv_common.wire.nodes import BlockList, BlocksChanged
from flowkv_common.wire.parts import NodeRef
from flowkv_scheduler.expected import Expected, set_bits
from flowkv_scheduler.hits import Hits

# Changes that are kept while a node's list is on its way: minutes of them.
MAX_WAITING = 256
# Work on nodes that have left is done on the side, so much per call.
KEYS_PER_CALL = 1024
# Blocks. A block's hash covers all tokens before it: who has the last of a part very likely has the others.
PART_SIZE = 8


Keys = list[int]


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

    Times are seconds of any one clock. Events with hashes that are none raise `BadRequest`.
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

    @property
    def num_hashes(self) -> int:
        return len(self._masks)

    def knows(self, node: NodeRef) -> bool:
        """Whether this life of the node was heard of, and nothing of it was missed."""
        holder = self._holders.get(node.node_id)
        return holder is not None and holder.ref == node and holder.waiting is None

    def apply(self, event: BlocksChanged) -> bool:
        """Takes a change in. False if one was missed: load the node's whole list, meanwhile changes wait."""
        self._clear_those_who_left()
        holder = self._holder(event.node)
        if holder.waiting is not None:
            del holder.waiting[: max(0, len(holder.waiting) - MAX_WAITING + 1)]
            holder.waiting.append(event)
            return False
        return self._follow(holder, event)

    def load(self, page: BlockList, number: int) -> bool:
        """Takes in one page of a node's list: all of them, in order from 0.

        False if it must be begun again: the node was dropped in between, a change was missed again, or one
        that came after the first page was made has been taken in before it.
        """
        self._clear_those_who_left()
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
        self._add(holder, keys)
        if number < page.num_pages - 1:
            return True
        self._remove(holder, holder.cached - holder.listed)
        waiting, holder.waiting, holder.listed = holder.waiting, None, set()
        holder.seq = holder.listed_seq
        for event in waiting:
            self._follow(holder, event)
        return holder.waiting is None

    def drop(self, node_id: str) -> None:
        """The node has left."""
        if holder := self._holders.pop(node_id, None):
            del self._bits[node_id]
            self._present ^= holder.bit
            self._left.append(holder)

    def expect(self, nodes: Iterable[NodeRef], hashes: Sequence[str], until: float) -> None:
        """The nodes will soon have these: a prompt was sent to them. Forgotten within a second after `until`
        unless they say so. Only whole parts count."""
        self._clear_those_who_left()
        holders = [self._holder(node) for node in nodes]
        keys = keys_of(hashes[PART_SIZE - 1 :: PART_SIZE])
        second = self._expected.add(keys, sum(holder.bit for holder in holders), until)
        for holder in holders:
            holder.expected_until = max(holder.expected_until, second)

    def hits(self, keys: Keys, now: float) -> Hits:
        """How many blocks from the front of the chain each node has.

        By parts: who has the last block of one is taken to have all of it, the others are gone through.
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

    # --- bookkeeping -----------------------------------------------------------------------------

    def _ends_within(self, part: Keys, num_before: int, having: int) -> Iterator[tuple[int, int]]:
        """Where in the part the chain ends for those who don't have all of it, as in `Hits`."""
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
        self.drop(ref.node_id)
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
        self._remove(holder, removed)
        self._add(holder, stored)
        return True

    def _add(self, holder: _Holder, keys: Sequence[int]) -> None:
        set_bits(self._masks, keys, holder.bit)
        holder.cached.update(keys)

    def _remove(self, holder: _Holder, keys: Iterable[int]) -> None:
        for key in keys:
            if key in holder.cached:
                holder.cached.remove(key)
                self._clear(key, holder.bit)

    def _clear(self, key: int, bit: int) -> None:
        if left := self._masks[key] & ~bit:
            self._masks[key] = left
        else:
            del self._masks[key]

    def _clear_those_who_left(self) -> None:
        """Some of the bits of nodes that have left; it would take too long at once."""
        num_left = KEYS_PER_CALL
        for holder in list(self._left):
            while num_left and holder.cached:
                self._clear(holder.cached.pop(), holder.bit)
                num_left -= 1
            if not holder.cached and holder.expected_until <= self._now:
                self._left.remove(holder)
                self._free_slots.append(holder.slot)


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
