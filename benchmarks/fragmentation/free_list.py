"""The baseline: blocks handed out from a stack of free ones, last freed first, wherever they lie."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flowkv_common.wire.messages import Run
from flowkv_engine.kv.blocks import OutOfBlocks, PrefixCache
from flowkv_engine.kv.segments import runs_of


class FreeList:
    """As `Blocks` where it has the same methods, with the same prefix cache, but with a free list in place
    of segments."""

    def __init__(self, num_blocks: int) -> None:
        self.num_leased = 0
        self._free = list(range(num_blocks))[::-1]
        self._refs = [0] * num_blocks
        self._cache = PrefixCache(num_blocks)

    def longest_free_run(self) -> int:
        """O(n log n): a free list does not know."""
        return max((run.length for run in runs_of(sorted(self._free))), default=0)

    def allocate(self, n: int, *, like: Sequence[int] = (), room: int = 0) -> list[int]:
        for block_id in self._cache.evict(n - len(self._free)):
            self._cache.overwrite(Run(block_id, 1))
            self._free.append(block_id)
        if len(self._free) < n:
            raise OutOfBlocks(f"{n} blocks wanted, {len(self._free)} are free")
        taken = self._free[len(self._free) - n :][::-1]
        del self._free[len(self._free) - n :]
        for block_id in taken:
            self._refs[block_id] = 1
        self.num_leased += n
        return taken

    def grow(self, last_block: int | None) -> int:
        return self.allocate(1)[0]

    def match_prefix(self, hashes: Sequence[str]) -> list[int]:
        matched = self._cache.match(hashes)
        self._cache.lease(matched)
        for block_id in matched:
            self.num_leased += not self._refs[block_id]
            self._refs[block_id] += 1
        return matched

    def commit(self, block_id: int, block_hash: str, parent_hash: str | None) -> None:
        if self._cache.find(block_hash) is None:
            self._cache.insert(block_id, block_hash, parent_hash)

    def release(self, block_ids: Iterable[int]) -> None:
        unheld = []
        for block_id in block_ids:
            self._refs[block_id] -= 1
            if not self._refs[block_id]:
                unheld.append(block_id)
        self.num_leased -= len(unheld)
        self._free += self._cache.queue(unheld)
