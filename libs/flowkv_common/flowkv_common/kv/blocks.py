"""The only owner of block states: who holds which block, what is cached, what must not be touched yet.

Used from the asyncio loop alone (DESIGN 7.3). Knows no bytes and no sequences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from flowkv_common.kv.alignment import ids_of, runs_of
from flowkv_common.kv.integrity import IntegrityError, expect_equal
from flowkv_common.kv.prefix_cache import PrefixCache
from flowkv_common.kv.segments import Segments
from flowkv_common.wire.messages import BlockCounts

__all__ = ["Blocks", "IntegrityError", "OutOfBlocks"]

# A sequence that had to move on once will grow again: as many blocks should be free behind its new place.
GROWTH_ROOM = 8


class OutOfBlocks(Exception):
    """Not even evicting all that is cached frees that many blocks."""


class Blocks:
    """States of the blocks `0 ... num_blocks - 1`; a block holds `block_size` tokens.

    | state       | meaning                                                              |
    | ----------- | -------------------------------------------------------------------- |
    | free        | in a segment                                                         |
    | cached      | nobody holds it, its KV is findable by hash, it may be evicted       |
    | leased      | held by `ref >= 1` holders                                           |
    | quarantined | nobody holds it, but a copy or a step may still write it             |
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self._segments = Segments(num_blocks)
        self._cache = PrefixCache()
        self._refs: dict[int, int] = {}
        self._quarantined: set[int] = set()

    # --- taking ----------------------------------------------------------------------------------

    def can_take(self, n: int) -> bool:
        return self._segments.num_free + self._cache.num_idle >= n

    def take(self, n: int, *, like: Sequence[int] = (), room: int = 0) -> list[int]:
        """`n` blocks, leased once each, in as few runs as possible; evicts cached blocks if it must.

        `like` and `room` are those of `Segments.take`. Raises `OutOfBlocks`; then nothing has changed.
        """
        self._make_room(n)
        block_ids = ids_of(self._segments.take(n, like, room=room))
        self._refs.update(dict.fromkeys(block_ids, 1))
        return block_ids

    def grow(self, last_block: int | None) -> int:
        """One more block for a sequence that ends in `last_block`: the next one if it is free.

        Raises `OutOfBlocks`.
        """
        following = None if last_block is None else self._segments.take_after(last_block)
        if following is None:
            return self.take(1, room=GROWTH_ROOM)[0]
        self._refs[following] = 1
        return following

    def plan_runs(self, n: int) -> list[int]:
        """Lengths of the runs that `take(n)` would give now: a hint when it must evict, else exact.

        Raises `OutOfBlocks`.
        """
        if not self.can_take(n):
            raise OutOfBlocks(self._shortage(n))
        num_free = min(n, self._segments.num_free)
        to_evict = [n - num_free] if n > num_free else []
        return self._segments.plan(num_free) + to_evict

    # --- the prefix cache ------------------------------------------------------------------------

    def match_prefix(self, hashes: Sequence[str]) -> list[int]:
        """Leases the blocks of the longest known prefix of the chain `hashes`; each gets one more holder.

        A caller that must compute the last token of a prompt leaves out the hash of the block it ends.
        """
        matched: list[int] = []
        for block_hash in hashes:
            block_id = self._cache.find(block_hash)
            if block_id is None:
                break
            self._cache.revive(block_id)
            self._refs[block_id] = self._refs.get(block_id, 0) + 1
            matched.append(block_id)
        self.num_queried_tokens += len(hashes) * self.block_size
        self.num_hit_tokens += len(matched) * self.block_size
        return matched

    def commit(self, block_id: int, block_hash: str, parent_hash: str | None) -> None:
        """The leased block is full and its KV is there: from now on `match_prefix` finds it.

        If another block is known by that hash already, that one stays and this one remains anonymous.
        Raises `ValueError` if the block is not leased or was committed under another hash.
        """
        self._check_leased([block_id])
        known = self._cache.hash_of(block_id)
        if known is not None and known != block_hash:
            raise ValueError(f"block {block_id} is committed as {known}, not as {block_hash}")
        if self._cache.find(block_hash) is None:
            self._cache.insert(block_id, block_hash, parent_hash)

    # --- giving back -----------------------------------------------------------------------------

    def release(self, block_ids: Iterable[int]) -> None:
        """One holder less for each; without holders a committed block is cached, another is free.

        Raises `ValueError` if one is not leased that often; then nothing has changed.
        """
        unheld = self._drop_holders(list(block_ids))
        self._cache.retire([block_id for block_id in unheld if self._cache.hash_of(block_id)])
        self._free(block_id for block_id in unheld if not self._cache.hash_of(block_id))

    def quarantine(self, block_ids: Iterable[int]) -> list[int]:
        """As `release`, but blocks without holders left are set aside until `settle`; returns those.

        They lose their hash: something may still write them. Raises `ValueError` as `release` does.
        """
        unheld = self._drop_holders(list(block_ids))
        for block_id in unheld:
            self._cache.forget(block_id)
        self._quarantined.update(unheld)
        return unheld

    def settle(self, block_ids: Iterable[int]) -> None:
        """Nothing writes these quarantined blocks any more: they are free. Raises `ValueError` for others."""
        settled = set(block_ids)
        if strangers := settled - self._quarantined:
            raise ValueError(f"blocks {sorted(strangers)} are not quarantined")
        self._quarantined -= settled
        self._free(settled)

    # --- looking ---------------------------------------------------------------------------------

    def counts(self) -> BlockCounts:
        return BlockCounts(
            total=self.num_blocks,
            free=self._segments.num_free,
            cached=self._cache.num_idle,
            leased=len(self._refs),
            quarantined=len(self._quarantined),
            longest_free_run=self._segments.longest_run,
        )

    def check_integrity(self) -> None:
        """Raises `IntegrityError` if a block is lost, is in two states, or an index disagrees."""
        self._segments.check_integrity()
        self._cache.check_integrity()
        idle = self._cache.idle_blocks()
        counts = self.counts()
        in_states = counts.free + counts.cached + counts.leased + counts.quarantined
        expect_equal(f"blocks in all states ({counts}) and in the pool", in_states, self.num_blocks)
        held = self._refs.keys() | self._quarantined | idle
        num_held = counts.leased + counts.quarantined + counts.cached
        expect_equal("blocks not free, each in one state only", len(held), num_held)
        free = set(range(self.num_blocks)) - held
        expect_equal("free blocks", sorted(free), self._segments.free_blocks())
        expect_equal("leased blocks without a holder", [b for b, ref in self._refs.items() if ref < 1], [])

    # --- bookkeeping -----------------------------------------------------------------------------

    def _make_room(self, n: int) -> None:
        """Evicts until `n` blocks are free, and then on, if a few more make one run of them."""
        if not self.can_take(n):
            raise OutOfBlocks(self._shortage(n))
        evicted: int | None = None
        while self._segments.num_free < n:
            evicted = self._evict_next()
        if evicted is not None and self._can_lengthen(evicted, n):
            while self._segments.longest_run < n and self._cache.next_victim() == evicted - 1:
                evicted = self._evict_next()

    def _evict_next(self) -> int:
        victim = self._cache.next_victim()
        assert victim is not None  # `can_take` has counted them
        self._cache.forget(victim)
        self._free([victim])
        return victim

    def _can_lengthen(self, free_block: int, n: int) -> bool:
        """Whether all blocks are free or evictable that would complete the segment in front to `n` blocks."""
        segment = self._segments.segment_of(free_block)
        start = segment.start + segment.length - n
        missing = range(start, segment.start)
        return start >= 0 and not any(block in self._refs or block in self._quarantined for block in missing)

    def _drop_holders(self, block_ids: list[int]) -> list[int]:
        """Takes one holder off each and returns the blocks that have none left, in order."""
        self._check_leased(block_ids)
        unheld = []
        for block_id in block_ids:
            self._refs[block_id] -= 1
            if not self._refs[block_id]:
                del self._refs[block_id]
                unheld.append(block_id)
        return unheld

    def _check_leased(self, block_ids: Iterable[int]) -> None:
        for block_id, times in Counter(block_ids).items():
            if self._refs.get(block_id, 0) < times:
                raise ValueError(f"block {block_id} is not leased {times} times")

    def _free(self, block_ids: Iterable[int]) -> None:
        for run in runs_of(sorted(block_ids)):
            self._segments.give(run)

    def _shortage(self, n: int) -> str:
        return f"{n} blocks wanted, {self._segments.num_free} are free, {self._cache.num_idle} evictable"
