"""Which block holds the KV of which prefix, and which of them to give up first. Knows no reference counts."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from sortedcontainers import SortedList

from flowkv_common.kv.integrity import expect_equal


class _Entry(NamedTuple):
    block_hash: str
    parent_hash: str | None


class PrefixCache:
    """Chains of blocks by hash. A block in it is busy until `retire`, and then may be evicted.

    Eviction order: ends of chains before blocks that others build on, least recently used first. Since all
    blocks of one chain are retired together, a chain is given up from its tail.
    """

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}
        self._block_of: dict[str, int] = {}
        self._num_children: Counter[str] = Counter()
        self._retired_at: dict[int, int] = {}
        self._order = SortedList()  # (has children, retired at, block id)
        self._now = 0

    @property
    def num_idle(self) -> int:
        """Blocks that are retired, so evictable."""
        return len(self._retired_at)

    def find(self, block_hash: str) -> int | None:
        return self._block_of.get(block_hash)

    def hash_of(self, block_id: int) -> str | None:
        entry = self._entries.get(block_id)
        return entry.block_hash if entry else None

    def insert(self, block_id: int, block_hash: str, parent_hash: str | None) -> None:
        """Makes a busy block findable. `block_hash` must not be known, nor the block have another."""
        self._entries[block_id] = _Entry(block_hash, parent_hash)
        self._block_of[block_hash] = block_id
        self._count_child(parent_hash, 1)

    def retire(self, block_ids: list[int]) -> None:
        """These blocks, of one chain, are not in use any more."""
        self._now += 1
        for block_id in block_ids:
            self._retired_at[block_id] = self._now
            self._order.add(self._key(block_id))

    def revive(self, block_id: int) -> bool:
        """The block is in use (again); returns whether it was evictable until now."""
        if block_id not in self._retired_at:
            return False
        self._order.remove(self._key(block_id))
        del self._retired_at[block_id]
        return True

    def next_victim(self) -> int | None:
        """The block to evict first, None when none is evictable."""
        return int(self._order[0][2]) if self._order else None

    def forget(self, block_id: int) -> None:
        """The block leaves the cache, if it is in it."""
        entry = self._entries.get(block_id)
        if entry is None:
            return
        self.revive(block_id)
        del self._entries[block_id]
        del self._block_of[entry.block_hash]
        self._count_child(entry.parent_hash, -1)

    def idle_blocks(self) -> set[int]:
        return set(self._retired_at)

    def check_integrity(self) -> None:
        """Raises `IntegrityError` if its indexes disagree."""
        by_hash = {entry.block_hash: block_id for block_id, entry in self._entries.items()}
        expect_equal("blocks by hash", by_hash, self._block_of)
        children = Counter(entry.parent_hash for entry in self._entries.values() if entry.parent_hash)
        expect_equal("children per hash", children, self._num_children)
        expect_equal("eviction order", sorted(map(self._key, self._retired_at)), list(self._order))
        expect_equal("idle blocks without a hash", self._retired_at.keys() - self._entries.keys(), set())

    def _key(self, block_id: int) -> tuple[bool, int, int]:
        has_children = self._entries[block_id].block_hash in self._num_children
        return has_children, self._retired_at[block_id], block_id

    def _count_child(self, parent_hash: str | None, change: int) -> None:
        if parent_hash is None:
            return
        parent = self._block_of.get(parent_hash)
        idle_parent = parent if parent in self._retired_at else None
        if idle_parent is not None:
            self._order.remove(self._key(idle_parent))  # its place depends on the count
        self._num_children[parent_hash] += change
        if not self._num_children[parent_hash]:
            del self._num_children[parent_hash]
        if idle_parent is not None:
            self._order.add(self._key(idle_parent))
