"""The only owner of block states: who holds which block, what is cached, what must not be touched yet.

Used from the asyncio loop alone (docs/architecture.md, rule 3). Knows no bytes and no sequences.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence

from flowkv_common.kv.alignment import runs_of
from flowkv_common.kv.integrity import IntegrityError, expect_equal
from flowkv_common.kv.prefix_cache import PrefixCache
from flowkv_common.kv.segments import Segments
from flowkv_common.wire.nodes import BlockCounts
from flowkv_common.wire.parts import Run

__all__ = ["Blocks", "IntegrityError", "OutOfBlocks"]

# A sequence that had to move on once will grow again: as many blocks should be free behind its new place.
GROWTH_ROOM = 8


class OutOfBlocks(Exception):
    """Not even evicting all that is cached frees that many blocks."""


class Blocks:
    """States of the blocks `0 ... num_blocks - 1`; a block holds `block_size` tokens.

    | state       | meaning                                                              |
    | ----------- | -------------------------------------------------------------------- |
    | free        | nobody holds it; in a segment                                        |
    | cached      | nobody holds it, its KV is findable by hash; in a segment once cold  |
    | leased      | held by `ref >= 1` holders                                           |
    | quarantined | nobody holds it, but a copy or a step may still write it             |
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self._segments = Segments(num_blocks)
        self._cache = PrefixCache(num_blocks)
        self._refs = array("i", [0]) * num_blocks
        self._num_leased = 0
        self._quarantined: set[int] = set()
        # To be sliced: a prompt of 85,000 tokens is 5,000 blocks, to be leased in microseconds.
        self._ids = list(range(num_blocks))
        self._ones = array("i", [1]) * num_blocks

    @property
    def num_leased(self) -> int:
        return self._num_leased

    # --- taking ----------------------------------------------------------------------------------

    def can_take(self, n: int) -> bool:
        return self._segments.num_free + self._cache.num_warm >= n

    def take(self, n: int, *, like: Sequence[int] = (), room: int = 0) -> list[int]:
        """`n` blocks, leased once each, in as few runs as possible; evicts cached blocks if it must.

        `like` and `room` are those of `Segments.take`. Raises `OutOfBlocks`; then nothing has changed.
        """
        self._make_room(n)
        leased = [self._lease(run) for run in self._segments.take(n, like, room=room)]
        block_ids = leased[0] if leased else []  # nearly always all of them, and then not copied again
        for more in leased[1:]:
            block_ids += more
        return block_ids

    def grow(self, last_block: int | None) -> int:
        """One more block for a sequence that ends in `last_block`: the next one if it is free.

        Raises `OutOfBlocks`.
        """
        following = None if last_block is None else self._segments.take_after(last_block)
        if following is None:
            return self.take(1, room=GROWTH_ROOM)[0]
        return self._lease(Run(following, 1))[0]

    def plan_runs(self, n: int) -> list[int]:
        """Lengths of the runs that `take(n)` would give now: exact while nothing is cached, else a hint.

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
        matched = self._cache.match(hashes)
        for run in runs_of(sorted(self._cache.revive(matched))):
            self._segments.take_at(run)
        refs = self._refs
        for block_id in matched:
            self._num_leased += not refs[block_id]
            refs[block_id] += 1
        self.num_queried_tokens += len(hashes) * self.block_size
        self.num_hit_tokens += len(matched) * self.block_size
        return matched

    def commit(self, block_id: int, block_hash: str, parent_hash: str | None) -> None:
        """The leased block is full and its KV is there: from now on `match_prefix` finds it.

        If another block is known by that hash already, that one stays and this one remains anonymous.
        Raises `ValueError` if the block is not leased or was committed under another hash.
        """
        if not 0 <= block_id < self.num_blocks or not self._refs[block_id]:
            raise ValueError(f"block {block_id} is not leased")
        known = self._cache.hash_of(block_id)
        if known is not None and known != block_hash:
            raise ValueError(f"block {block_id} is committed as {known}, not as {block_hash}")
        if self._cache.find(block_hash) is None:
            self._cache.insert(block_id, block_hash, parent_hash)

    def take_changes(self, at_most: int) -> tuple[list[str], list[str]]:
        """Hashes that have become known, and those no longer known, since the last call: together `at_most`,
        the others the next time. What came and went in between is in neither."""
        return self._cache.take_changes(at_most)

    # --- giving back -----------------------------------------------------------------------------

    def release(self, block_ids: Iterable[int]) -> None:
        """One holder less for each; without holders a committed block is cached, another is free.

        Blocks of a chain come in its order, so that it is evicted from its end. Raises `ValueError` if one
        is not leased that often; then nothing has changed.
        """
        known, anonymous = self._cache.split(self._drop_holders(list(block_ids)))
        self._cache.retire(known)
        self._free(anonymous)
        self._open_ahead(2 * len(known))

    def quarantine(self, block_ids: Iterable[int]) -> list[int]:
        """As `release`, but blocks without holders left are set aside until `settle`; returns those.

        They lose their hash: something may still write them. Raises `ValueError` as `release` does.
        """
        unheld = self._drop_holders(list(block_ids))
        known, _ = self._cache.split(unheld)
        self._cache.forget(known)
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
            free=self._segments.num_free - self._cache.num_cold,
            cached=self._cache.num_warm + self._cache.num_cold,
            leased=self._num_leased,
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
        leased = {block_id for block_id, ref in enumerate(self._refs) if ref}
        held = leased | self._quarantined | idle
        num_held = counts.leased + counts.quarantined + counts.cached
        expect_equal("blocks not free, each in one state only", len(held), num_held)
        takeable = set(range(self.num_blocks)) - leased - self._quarantined - self._cache.warm_blocks()
        expect_equal("free and cold blocks", sorted(takeable), self._segments.free_blocks())
        expect_equal("leased blocks", len(leased), counts.leased)

    # --- bookkeeping -----------------------------------------------------------------------------

    def _make_room(self, n: int) -> None:
        """Opens cached blocks to be overwritten: enough for `n`, and enough to choose a long run from."""
        if not self.can_take(n):
            raise OutOfBlocks(self._shortage(n))
        self._open_ahead(2 * n)
        if (num_missing := n - self._segments.num_free) > 0:
            self._open(num_missing)
        if self._segments.longest_run < n:
            self._open(n)

    def _open_ahead(self, at_most: int) -> None:
        """Opens cached blocks, towards half of what nobody holds, in steps that no caller has to wait for.

        Taken one by one as they age, they would lie scattered; a growing sequence would find none behind it.
        """
        num_open, num_warm = self._segments.num_free, self._cache.num_warm
        missing = (num_open + num_warm) // 2 - num_open
        if missing > 0:
            self._open(min(missing, at_most))

    def _open(self, n: int) -> None:
        for run in self._cache.cool(n):
            self._segments.give(run)

    def _lease(self, run: Run) -> list[int]:
        """Leases blocks that have just been taken; what was cached in them is lost."""
        block_ids = self._ids[run.start : run.start + run.length]
        if self._cache.num_cold:
            self._cache.overwrite(run)
        self._refs[run.start : run.start + run.length] = self._ones[: run.length]
        self._num_leased += run.length
        return block_ids

    def _drop_holders(self, block_ids: list[int]) -> list[int]:
        """Takes one holder off each and returns the blocks that have none left, in order."""
        self._check_leased(block_ids)
        refs, unheld = self._refs, []
        for block_id in block_ids:
            refs[block_id] -= 1
            if not refs[block_id]:
                unheld.append(block_id)
        self._num_leased -= len(unheld)
        return unheld

    def _check_leased(self, block_ids: Iterable[int]) -> None:
        num_blocks, refs = self.num_blocks, self._refs
        for block_id, times in Counter(block_ids).items():
            if not 0 <= block_id < num_blocks or refs[block_id] < times:
                raise ValueError(f"block {block_id} is not leased {times} times")

    def _free(self, block_ids: Iterable[int]) -> None:
        for run in runs_of(sorted(block_ids)):
            self._segments.give(run)

    def _shortage(self, n: int) -> str:
        counts = self.counts()
        return f"{n} blocks wanted, {counts.free} are free, {counts.cached} evictable"
