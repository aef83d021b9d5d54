"""The states of a node's KV blocks, and the prefix cache with its LRU queue."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice

from flowkv_common.wire.messages import Run
from flowkv_common.wire.nodes import BlockCounts
from flowkv_engine.kv.segments import Segments, expect_equal, runs_of

# Blocks to leave free behind a sequence that will grow, where there are, so that it grows in place.
GROWTH_ROOM = 8
# This part of the blocks without a holder is evicted ahead of need: evicted one by one, they would lie
# scattered. A sequence that grows needs some behind it. A prompt needs one run, and what it overwrites is
# somebody's prefix: with half of them its node computed 1.7 times the tokens of one that evicts none.
FREE_TO_GROW = 1 / 2
FREE_FOR_PROMPTS = 1 / 8

# States of a block in the prefix cache. Bytes, so that those of a whole run change in one assignment.
_UNKNOWN, _LEASED, _QUEUED, _EVICTABLE, _OVERWRITTEN = range(5)
_OVERWRITE = bytes.maketrans(bytes([_EVICTABLE]), bytes([_OVERWRITTEN]))


class OutOfBlocks(Exception):
    """Not even evicting all that is cached frees that many blocks."""


class Blocks:
    """The blocks `0 ... num_blocks - 1`. Not thread-safe: the event loop alone uses it.

    | state       | meaning                                                                    |
    | ----------- | -------------------------------------------------------------------------- |
    | free        | without a holder; in a free segment                                        |
    | cached      | without a holder, found by its hash; in a free segment once it is evictable |
    | leased      | held by `ref >= 1` sequences or reservations                               |
    | quarantined | without a holder, but a copy or a step may still write it                  |
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_leased = 0
        self.prefix_cache = PrefixCache(num_blocks)
        self._segments = Segments(num_blocks)
        self._refs = [0] * num_blocks
        self._quarantined: set[int] = set()

    def can_allocate(self, n: int) -> bool:
        return self._segments.num_free + self.prefix_cache.num_queued >= n

    def allocate(self, n: int, *, like: Sequence[int] = (), room: int = 0) -> list[int]:
        """Leases `n` blocks, in as few runs as possible; evicts cached blocks if it must.

        `like` and `room` are those of `Segments.take_runs`. Raises `OutOfBlocks`; then nothing has changed.
        """
        self._check_can_allocate(n)
        num_free = self._segments.num_free
        num_unheld = num_free + self.prefix_cache.num_queued
        ahead = int(num_unheld * (FREE_TO_GROW if room else FREE_FOR_PROMPTS)) - num_free
        self._evict(max(n - num_free, min(ahead, 2 * n)))  # in steps that no caller has to wait for
        if self._segments.longest_run < n:
            self._evict(n)  # a few more evictions are worth one run
        block_ids: list[int] = []
        for run in self._segments.take_runs(n, like, room=room):
            block_ids += self._lease(run)
        return block_ids

    def grow(self, last_block: int | None) -> int:
        """Leases one more block for a sequence that ends in `last_block`: the next one if it is free.

        Raises `OutOfBlocks`.
        """
        following = None if last_block is None else self._segments.take_after(last_block)
        if following is None:
            # A sequence that has to move on will grow again.
            return self.allocate(1, room=GROWTH_ROOM)[0]
        return self._lease(Run(following, 1))[0]

    def plan_runs(self, n: int) -> list[int]:
        """Lengths of the runs that `allocate(n)` would give now: exact while nothing is cached, else a hint.

        Raises `OutOfBlocks`.
        """
        self._check_can_allocate(n)
        num_free = min(n, self._segments.num_free)
        num_to_evict = n - num_free
        return self._segments.plan_runs(num_free) + ([num_to_evict] if num_to_evict else [])

    def match_prefix(self, hashes: Sequence[str]) -> list[int]:
        """Leases the blocks of the longest cached prefix of the chain `hashes`.

        A caller that must compute the last token of a prompt leaves out the hash of the block it ends.
        """
        matched = self.prefix_cache.match(hashes)
        for run in runs_of(sorted(self.prefix_cache.lease(matched))):
            self._segments.take_run(run)
        refs = self._refs
        for block_id in matched:
            self.num_leased += not refs[block_id]
            refs[block_id] += 1
        return matched

    def commit(self, block_id: int, block_hash: str, parent_hash: str | None) -> None:
        """The leased block is full and its KV is there: from now on `match_prefix` finds it.

        If another block has that hash already, that one stays in the cache and this one stays out of it.
        Raises `ValueError` if the block is not leased or was committed under another hash.
        """
        if not 0 <= block_id < self.num_blocks or not self._refs[block_id]:
            raise ValueError(f"block {block_id} is not leased")
        known = self.prefix_cache.hash_of(block_id)
        if known is not None and known != block_hash:
            raise ValueError(f"block {block_id} is committed as {known}, not as {block_hash}")
        if self.prefix_cache.find(block_hash) is None:
            self.prefix_cache.insert(block_id, block_hash, parent_hash)

    def release(self, block_ids: Iterable[int]) -> None:
        """Takes one holder off each. A committed block without holders is cached, another one free.

        Blocks of a chain come in its order, so that it is evicted from its end. Raises `ValueError` if one
        is not leased that often; then nothing has changed.
        """
        unheld = self._drop_holders(list(block_ids))
        self._free(self.prefix_cache.queue(unheld))

    def quarantine(self, block_ids: Iterable[int]) -> None:
        """As `release`, but blocks without holders are set aside until `settle`.

        They lose their hash: something may still write them. Raises `ValueError` as `release` does.
        """
        unheld = self._drop_holders(list(block_ids))
        self.prefix_cache.forget(unheld)
        self._quarantined.update(unheld)

    def settle(self, block_ids: Iterable[int]) -> None:
        """Nothing writes these quarantined blocks any more: they are free. Raises `ValueError` for others."""
        settled = set(block_ids)
        if others := settled - self._quarantined:
            raise ValueError(f"blocks {sorted(others)} are not quarantined")
        self._quarantined -= settled
        self._free(settled)

    def counts(self) -> BlockCounts:
        return BlockCounts(
            total=self.num_blocks,
            free=self._segments.num_free - self.prefix_cache.num_evictable,
            cached=self.prefix_cache.num_queued + self.prefix_cache.num_evictable,
            leased=self.num_leased,
            quarantined=len(self._quarantined),
            longest_free_run=self._segments.longest_run,
        )

    def strip(self, num_cells: int) -> str:
        """The pool from its first block to its last, in at most so many equal cells: `LoadReport.pool`.

        Counts bytes: less than 0.1 ms for the pool of a small host, 0.5 ms for 100,000 blocks.
        """
        num_cells = min(num_cells, self.num_blocks)
        cells: list[int] = []
        for cell in range(num_cells):
            start, end = (self.num_blocks * edge // num_cells for edge in (cell, cell + 1))
            queued, evictable = self.prefix_cache.num_unheld_in(start, end)
            num_taken = end - start - self._segments.num_free_in(start, end) - queued
            # Rounded up: one leased block in a thousand free ones is to be seen.
            cells += (-(-9 * count // (end - start)) for count in (num_taken, queued + evictable))
        return "".join(map(str, cells))

    def check_integrity(self) -> None:
        """Raises `IntegrityError` if a block is lost, is in two states, or an index disagrees. O(blocks)."""
        self._segments.check_integrity()
        self.prefix_cache.check_integrity()
        counts = self.counts()
        in_states = counts.free + counts.cached + counts.leased + counts.quarantined
        expect_equal(f"blocks in all states ({counts}) and in the pool", in_states, self.num_blocks)
        leased = {block_id for block_id, ref in enumerate(self._refs) if ref}
        queued, evictable = self.prefix_cache.blocks_without_holder()
        taken = leased | self._quarantined | queued
        num_not_free = counts.leased + counts.quarantined + counts.cached
        expect_equal("blocks not free, each in one state only", len(taken | evictable), num_not_free)
        free = [block_id for block_id in range(self.num_blocks) if block_id not in taken]
        expect_equal("free and evictable blocks", free, self._segments.free_blocks())
        expect_equal("leased blocks", len(leased), counts.leased)

    def _check_can_allocate(self, n: int) -> None:
        if not self.can_allocate(n):
            counts = self.counts()
            raise OutOfBlocks(f"{n} blocks wanted, {counts.free} are free, {counts.cached} evictable")

    def _evict(self, n: int) -> None:
        if n > 0:
            self._free(self.prefix_cache.evict(n))

    def _lease(self, run: Run) -> range:
        """Leases blocks that have just been taken; what was cached in them is lost."""
        start, end = run.start, run.start + run.length
        if self.prefix_cache.num_evictable:
            self.prefix_cache.overwrite(run)
        self._refs[start:end] = [1] * run.length
        self.num_leased += run.length
        return range(start, end)

    def _drop_holders(self, block_ids: list[int]) -> list[int]:
        """Takes one holder off each and returns the blocks that have none left, in order."""
        refs, num_blocks, unheld = self._refs, self.num_blocks, []
        for place, block_id in enumerate(block_ids):
            if not 0 <= block_id < num_blocks or not refs[block_id]:
                for dropped in block_ids[:place]:
                    refs[dropped] += 1
                raise ValueError(f"block {block_id} is not leased, or not that often")
            refs[block_id] = left = refs[block_id] - 1
            if not left:
                unheld.append(block_id)
        self.num_leased -= len(unheld)
        return unheld

    def _free(self, block_ids: Iterable[int]) -> None:
        for run in runs_of(sorted(block_ids)):
            self._segments.free_run(run)


class PrefixCache:
    """Full blocks by the hash of their chain, and the order in which they are evicted.

    A block in the cache is leased, or queued once it has no holder, or evictable. The LRU queue gives up the
    least recently used chain first, from its end. A block that a leased block builds on is evicted last.
    Evictable blocks may be overwritten in any order and are found until they are.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_evictable = 0
        self._states = bytearray(num_blocks)
        self._hash_of: list[str | None] = [None] * num_blocks
        self._parent_of: list[str | None] = [None] * num_blocks
        # An overwritten block stays in these indexes until it or its hash gets a new entry, or until
        # `take_changes` passes: to overwrite a run takes one step, however long it is.
        self._block_of: dict[str | None, int] = {}  # never of None, the parent of the first in a chain
        self._num_children: dict[str, int] = {}  # by the parent's hash: leased and queued ones; no zeros
        self._queue: OrderedDict[int, None] = OrderedDict()  # a parent stands behind all its children
        self._changed: dict[str, None] = {}  # a hash that was added and evicted again is not in it

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    def find(self, block_hash: str) -> int | None:
        block_id = self._block_of.get(block_hash)
        return None if block_id is None or self._states[block_id] == _OVERWRITTEN else block_id

    def match(self, hashes: Iterable[str]) -> list[int]:
        """The blocks of the longest cached prefix of a chain."""
        matched: list[int] = []
        for block_hash in hashes:
            if (block_id := self.find(block_hash)) is None:
                break
            matched.append(block_id)
        return matched

    def hash_of(self, block_id: int) -> str | None:
        return None if self._states[block_id] == _OVERWRITTEN else self._hash_of[block_id]

    def insert(self, block_id: int, block_hash: str, parent_hash: str | None) -> None:
        """Adds a leased block. `block_hash` must not be known, nor the block have another."""
        self._clean(block_id)
        if (overwritten := self._block_of.get(block_hash)) is not None:
            self._clean(overwritten)
        self._states[block_id] = _LEASED
        self._hash_of[block_id] = block_hash
        self._parent_of[block_id] = parent_hash
        self._block_of[block_hash] = block_id
        self._add_child(block_id)
        self._note_change(block_hash)

    def lease(self, block_ids: Iterable[int]) -> list[int]:
        """These blocks, of one chain from its beginning, have a holder; returns those that were evictable."""
        states, queue = self._states, self._queue
        evictable: list[int] = []
        for block_id in block_ids:
            if states[block_id] == _QUEUED:
                del queue[block_id]
            elif states[block_id] == _EVICTABLE:
                self._add_child(block_id)
                evictable.append(block_id)
            states[block_id] = _LEASED
        self.num_evictable -= len(evictable)
        return evictable

    def queue(self, block_ids: Sequence[int]) -> list[int]:
        """These blocks, of one chain in its order, have no holder left; returns those not in the cache, the
        last first."""
        states, queue, hash_of, parent_of = self._states, self._queue, self._hash_of, self._parent_of
        uncached: list[int] = []
        for block_id, previous in zip(reversed(block_ids), [*block_ids[-2::-1], None], strict=False):
            if states[block_id] != _LEASED:
                uncached.append(block_id)
            elif previous is not None and hash_of[previous] is parent_of[block_id]:
                states[block_id] = _QUEUED  # its parent comes next: no need to look it up by hash
                queue[block_id] = None
            else:
                self._enqueue(block_id)
        return uncached

    def forget(self, block_ids: Iterable[int]) -> None:
        """These blocks have no holder left and leave the cache."""
        for block_id in block_ids:
            if self._states[block_id] == _LEASED:
                self._remove_child(block_id)
            self._clean(block_id)

    def evict(self, n: int) -> list[int]:
        """Makes up to `n` queued blocks evictable and returns them in the order of the queue."""
        states, queue, hash_of, num_children = self._states, self._queue, self._hash_of, self._num_children
        evicted: list[int] = []
        passed_over: int | None = None  # the first; all that is queued is built on when it comes again
        is_last_resort = False
        childless: str | None = None  # the parent of the last one evicted: most often the next one
        num_evicted = min(n, len(queue))
        while len(evicted) < num_evicted:
            block_id, _ = queue.popitem(last=False)
            block_hash = hash_of[block_id]
            if block_hash is not childless and block_hash in num_children and not is_last_resort:
                # Leased blocks build on it, since queued ones would stand in front of it: two sequences have
                # computed it, and one builds on its own copy, which is not in the cache.
                is_last_resort = block_id == passed_over
                if not is_last_resort:
                    passed_over = block_id if passed_over is None else passed_over
                    self._enqueue(block_id)
                    continue
            states[block_id] = _EVICTABLE
            childless = self._remove_child(block_id)
            evicted.append(block_id)
        self.num_evictable += len(evicted)
        return evicted

    def overwrite(self, run: Run) -> None:
        """Blocks that are evictable or unknown get other contents: they are not found any more."""
        start, end = run.start, run.start + run.length
        states = self._states[start:end]
        self.num_evictable -= states.count(_EVICTABLE)
        self._states[start:end] = states.translate(_OVERWRITE)

    def take_changes(self, at_most: int) -> tuple[list[str], list[str]]:
        """Hashes that were added and hashes that were removed since the last call, `at_most` in all; the
        next calls return the others. What was added and removed in between is in neither list, and a call
        looks at `at_most` overwritten blocks only: it may return nothing though a next one returns some."""
        block_id = 0
        for _ in range(at_most):  # about a microsecond each
            if (block_id := self._states.find(_OVERWRITTEN, block_id)) < 0:
                break
            self._clean(block_id)
        added: list[str] = []
        removed: list[str] = []
        for block_hash in list(islice(self._changed, at_most)):
            del self._changed[block_hash]
            (added if block_hash in self._block_of else removed).append(block_hash)
        return added, removed

    def num_unheld_in(self, start: int, end: int) -> tuple[int, int]:
        """Queued and evictable blocks among `start ... end - 1`."""
        return self._states.count(_QUEUED, start, end), self._states.count(_EVICTABLE, start, end)

    def blocks_without_holder(self) -> tuple[set[int], set[int]]:
        """The queued ones, and the evictable ones. O(blocks): for checks."""
        evictable = {block_id for block_id, state in enumerate(self._states) if state == _EVICTABLE}
        return set(self._queue), evictable

    def check_integrity(self) -> None:
        """Raises `IntegrityError` if its indexes disagree. O(blocks)."""
        by_hash = {known: block_id for block_id, known in enumerate(self._hash_of) if known is not None}
        expect_equal("blocks by hash", by_hash, self._block_of)
        in_state: list[list[int]] = [[] for _ in range(_OVERWRITTEN + 1)]
        for block_id, state in enumerate(self._states):
            in_state[state].append(block_id)
        expect_equal("blocks with a hash and with a state", len(by_hash), sum(map(len, in_state[_LEASED:])))
        expect_equal("queued blocks", sorted(self._queue), in_state[_QUEUED])
        expect_equal("evictable blocks", self.num_evictable, len(in_state[_EVICTABLE]))
        num_children = Counter(
            self._parent_of[block_id] for block_id in in_state[_LEASED] + in_state[_QUEUED]
        )
        del num_children[None]
        expect_equal("children by hash", dict(num_children), self._num_children)
        seen: set[str | None] = set()
        for block_id in self._queue:
            seen.add(self._hash_of[block_id])
            expect_equal("parents in front of their children", self._parent_of[block_id] in seen, False)

    def _enqueue(self, block_id: int) -> None:
        """Puts a block at the end of the queue, and the queued blocks it builds on behind it."""
        states, queue = self._states, self._queue
        states[block_id] = _QUEUED
        queue[block_id] = None
        parent = self._block_of.get(self._parent_of[block_id])
        while parent is not None and states[parent] == _QUEUED:
            queue.move_to_end(parent)
            parent = self._block_of.get(self._parent_of[parent])

    def _add_child(self, block_id: int) -> None:
        if (parent_hash := self._parent_of[block_id]) is not None:
            self._num_children[parent_hash] = self._num_children.get(parent_hash, 0) + 1

    def _remove_child(self, block_id: int) -> str | None:
        """Returns the hash of its parent if that has no other children."""
        parent_hash = self._parent_of[block_id]
        if parent_hash is not None and (num_children := self._num_children.pop(parent_hash)) > 1:
            self._num_children[parent_hash] = num_children - 1
            return None
        return parent_hash

    def _clean(self, block_id: int) -> None:
        """The block and its hash, if it has one, leave the indexes."""
        if (block_hash := self._hash_of[block_id]) is not None:
            del self._block_of[block_hash]
            self._note_change(block_hash)
            self._hash_of[block_id] = self._parent_of[block_id] = None
            self._states[block_id] = _UNKNOWN

    def _note_change(self, block_hash: str) -> None:
        if block_hash in self._changed:
            del self._changed[block_hash]
        else:
            self._changed[block_hash] = None
