"""Which block holds the KV of which prefix, and which of them to give up first. Knows no reference counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from sortedcontainers import SortedList

from flowkv_common.kv.integrity import expect_equal


class _Entry(NamedTuple):
    block_hash: str
    parent_hash: str | None


class PrefixCache:
    """Chains of blocks by hash. A block in it is busy until `retire`, then idle: it may be overwritten.

    Idle blocks are warm until `cool` picks them: cold ones may be overwritten in any order, and are found
    until they are. Order of cooling: ends of chains before blocks that others build on, least recently used
    first. Since all blocks of one chain are retired together, a chain cools from its tail.
    """

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}
        self._block_of: dict[str, int] = {}
        self._num_children: dict[str, int] = {}  # that are not cold
        self._retired_at: dict[int, int] = {}  # of warm blocks, in the order of retirement
        self._cold: set[int] = set()
        # Only ends of chains are kept sorted: retiring a chain of any length costs one insertion.
        self._warm_ends = SortedList()  # (retired at, block id) of warm blocks that nothing builds on
        self._now = 0

    @property
    def num_warm(self) -> int:
        return len(self._retired_at)

    @property
    def num_cold(self) -> int:
        return len(self._cold)

    def find(self, block_hash: str) -> int | None:
        return self._block_of.get(block_hash)

    def hash_of(self, block_id: int) -> str | None:
        entry = self._entries.get(block_id)
        return entry.block_hash if entry else None

    def known(self, block_ids: Iterable[int]) -> set[int]:
        """Those of `block_ids` that are in the cache."""
        return self._entries.keys() & block_ids

    def insert(self, block_id: int, block_hash: str, parent_hash: str | None) -> None:
        """Makes a busy block findable. `block_hash` must not be known, nor the block have another."""
        self._entries[block_id] = _Entry(block_hash, parent_hash)
        self._block_of[block_hash] = block_id
        if parent_hash is not None:
            self._add_child(parent_hash)

    def retire(self, block_ids: list[int]) -> None:
        """These blocks, of one chain, are not in use any more."""
        self._now += 1
        for block_id in block_ids:
            self._retired_at[block_id] = self._now
            if self._is_end(block_id):
                self._warm_ends.add((self._now, block_id))

    def revive(self, block_id: int) -> bool:
        """The block is in use (again); returns whether it was cold until now."""
        if block_id in self._cold:
            self._cold.remove(block_id)
            if (parent_hash := self._entries[block_id].parent_hash) is not None:
                self._add_child(parent_hash)
            return True
        retired_at = self._retired_at.pop(block_id, None)
        if retired_at is not None and self._is_end(block_id):
            self._warm_ends.remove((retired_at, block_id))
        return False

    def cool(self, n: int) -> list[int]:
        """Makes `n` warm blocks cold, fewer if there are fewer, and returns them in order."""
        cooled: list[int] = []
        while len(cooled) < n and self._retired_at:
            first = self._warm_ends[0][1] if self._warm_ends else next(iter(self._retired_at))
            cooled += self._cool_chain(first, n - len(cooled))
        return cooled

    def forget(self, block_id: int) -> None:
        """The block leaves the cache, if it is in it."""
        if block_id not in self._entries:
            return
        is_counted = block_id not in self._cold
        if is_counted:
            self.revive(block_id)
        self._cold.discard(block_id)
        block_hash, parent_hash = self._entries.pop(block_id)
        del self._block_of[block_hash]
        if is_counted and parent_hash is not None and (parent := self._drop_child(parent_hash)) is not None:
            self._warm_ends.add((self._retired_at[parent], parent))

    def warm_blocks(self) -> set[int]:
        return set(self._retired_at)

    def idle_blocks(self) -> set[int]:
        return self._retired_at.keys() | self._cold

    def check_integrity(self) -> None:
        """Raises `IntegrityError` if its indexes disagree."""
        by_hash = {entry.block_hash: block_id for block_id, entry in self._entries.items()}
        expect_equal("blocks by hash", by_hash, self._block_of)
        warm_or_busy = [entry for block_id, entry in self._entries.items() if block_id not in self._cold]
        children = Counter(entry.parent_hash for entry in warm_or_busy if entry.parent_hash)
        expect_equal("children per hash", dict(children), self._num_children)
        expect_equal("blocks both warm and cold", self._retired_at.keys() & self._cold, set())
        expect_equal("idle blocks without a hash", self.idle_blocks() - self._entries.keys(), set())
        ends = [(at, block_id) for block_id, at in self._retired_at.items() if self._is_end(block_id)]
        expect_equal("warm ends of chains", sorted(ends), list(self._warm_ends))

    def _is_end(self, block_id: int) -> bool:
        return self._entries[block_id].block_hash not in self._num_children

    def _add_child(self, parent_hash: str) -> None:
        num_before = self._num_children.get(parent_hash, 0)
        self._num_children[parent_hash] = num_before + 1
        parent = self._block_of.get(parent_hash)
        if not num_before and parent in self._retired_at:
            self._warm_ends.remove((self._retired_at[parent], parent))

    def _drop_child(self, parent_hash: str) -> int | None:
        """Returns the parent if it is warm and nothing builds on it any more."""
        num_left = self._num_children[parent_hash] - 1
        if num_left:
            self._num_children[parent_hash] = num_left
            return None
        del self._num_children[parent_hash]
        parent = self._block_of.get(parent_hash)
        return parent if parent in self._retired_at else None

    def _cool_chain(self, first: int, n: int) -> list[int]:
        """Cools up to `n` blocks from `first` towards the beginning of its chain, those retired in one go:
        nothing else comes before them."""
        retired_at = self._retired_at[first]
        if self._is_end(first):
            self._warm_ends.remove((retired_at, first))
        cooled: list[int] = []
        block_id: int | None = first
        while block_id is not None and len(cooled) < n and self._retired_at[block_id] == retired_at:
            cooled.append(block_id)
            del self._retired_at[block_id]
            parent_hash = self._entries[block_id].parent_hash
            block_id = None if parent_hash is None else self._drop_child(parent_hash)
        if block_id is not None:
            self._warm_ends.add((self._retired_at[block_id], block_id))
        self._cold.update(cooled)
        return cooled
