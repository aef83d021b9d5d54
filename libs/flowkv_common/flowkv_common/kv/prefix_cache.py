"""Which block holds the KV of which prefix, and which of them to give up first. Knows no reference counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

from flowkv_common.kv.alignment import runs_of
from flowkv_common.kv.integrity import expect_equal
from flowkv_common.kv.stretches import Stretches
from flowkv_common.wire.parts import Run

# States of a block. Bytes, so that those of a whole run are looked at or changed in one go.
_UNKNOWN, _BUSY, _WARM, _COLD, _STALE = range(5)
_OVERWRITE = bytes.maketrans(bytes([_COLD]), bytes([_STALE]))


class PrefixCache:
    """Chains of blocks by hash. A block in it is busy until `retire`, then idle: it may be overwritten.

    Idle blocks are warm until `cool` picks them: cold ones may be overwritten in any order, and are found
    until they are. Order of cooling: least recently used first, ends of chains before what they build on; a
    block that a busy one builds on goes last. Cooling and overwriting are O(1) per run of blocks: the hash
    of an overwritten block stays in the indexes, but is not found, until another one takes its place.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_cold = 0
        self._states = bytearray(num_blocks)
        self._hash_of: list[str | None] = [None] * num_blocks
        self._parent_of: list[str | None] = [None] * num_blocks
        self._block_of: dict[str, int] = {}
        self._num_busy_children: dict[str, int] = {}
        # A hash that comes and goes between two looks is not in it: no more than what was known, and is.
        self._changed: dict[str, None] = {}
        # Whoever holds a block holds its parent. So parents are warm no earlier than their children, except
        # where two sequences computed the same block: `_builds_on` and `_end_use` see to those.
        self._warm = Stretches(num_blocks)

    @property
    def num_warm(self) -> int:
        return self._warm.num_idle

    def find(self, block_hash: str) -> int | None:
        block_id = self._block_of.get(block_hash)
        return None if block_id is None or self._states[block_id] == _STALE else block_id

    def match(self, hashes: Iterable[str]) -> list[int]:
        """The blocks of the longest known prefix of a chain."""
        matched: list[int] = []
        for block_hash in hashes:
            block_id = self._block_of.get(block_hash)
            if block_id is None or self._states[block_id] == _STALE:
                break
            matched.append(block_id)
        return matched

    def hash_of(self, block_id: int) -> str | None:
        return None if self._states[block_id] == _STALE else self._hash_of[block_id]

    def split(self, block_ids: Iterable[int]) -> tuple[list[int], list[int]]:
        """Of blocks in use: those that are in the cache, and the others; each in order."""
        known: list[int] = []
        anonymous: list[int] = []
        for block_id in block_ids:
            (known if self._states[block_id] == _BUSY else anonymous).append(block_id)
        return known, anonymous

    def insert(self, block_id: int, block_hash: str, parent_hash: str | None) -> None:
        """Makes a busy block findable. `block_hash` must not be known, nor the block have another."""
        self._clean(block_id)
        if (overwritten := self._block_of.get(block_hash)) is not None:
            self._clean(overwritten)
        self._states[block_id] = _BUSY
        self._hash_of[block_id] = block_hash
        self._parent_of[block_id] = parent_hash
        self._block_of[block_hash] = block_id
        self._toggle(block_hash)
        if parent_hash is not None:
            self._builds_on(parent_hash)

    def retire(self, block_ids: Sequence[int]) -> None:
        """These blocks, of one chain in its order, are not in use any more."""
        self._put_in_order(self._end_use(block_ids))

    def forget(self, block_ids: Sequence[int]) -> None:
        """These blocks, of one chain in its order and in use, leave the cache."""
        chain = self._end_use(block_ids)
        for block_id in block_ids:
            self._clean(block_id)
        self._put_in_order([block_id for block_id in chain if self._hash_of[block_id] is not None])

    def revive(self, block_ids: Iterable[int]) -> list[int]:
        """These blocks, of one chain from its beginning, are in use (again); returns those that were cold."""
        states, parent_of, num_busy_children = self._states, self._parent_of, self._num_busy_children
        cold: list[int] = []
        for block_id in block_ids:
            state = states[block_id]
            if state == _BUSY:
                continue
            if state == _WARM:
                self._warm.remove(block_id)
            else:
                cold.append(block_id)
            states[block_id] = _BUSY
            if (parent_hash := parent_of[block_id]) is not None:
                num_busy_children[parent_hash] = num_busy_children.get(parent_hash, 0) + 1
        self.num_cold -= len(cold)
        return cold

    def cool(self, n: int) -> list[Run]:
        """Makes `n` warm blocks cold, fewer if there are fewer, and returns them in the order of cooling,
        though each run from its beginning."""
        cooled: list[Run] = []
        while n > 0 and self._warm.num_idle:
            run = self._warm.pop(n) or self._pop_held_back()
            self._states[run.start : run.start + run.length] = bytes([_COLD]) * run.length
            self.num_cold += run.length
            n -= run.length
            cooled.append(run)
        return cooled

    def overwrite(self, run: Run) -> None:
        """Blocks that are cold or unknown get other contents: they are not found any more."""
        start, end = run.start, run.start + run.length
        states = self._states[start:end]
        self.num_cold -= states.count(_COLD)
        self._states[start:end] = states.translate(_OVERWRITE)

    def take_changes(self, at_most: int) -> tuple[list[str], list[str]]:
        """Hashes that are known now and were not when last asked, and the reverse; more than `at_most` in all
        are told the next time. Takes about a microsecond for each."""
        place = 0
        for _ in range(at_most):
            if (place := self._states.find(_STALE, place)) < 0:
                break
            self._clean(place)
        stored: list[str] = []
        removed: list[str] = []
        for block_hash in list(islice(self._changed, at_most)):
            del self._changed[block_hash]
            (stored if block_hash in self._block_of else removed).append(block_hash)
        return stored, removed

    def warm_blocks(self) -> set[int]:
        return self._blocks_in(_WARM)

    def idle_blocks(self) -> set[int]:
        return self._blocks_in(_WARM) | self._blocks_in(_COLD)

    def check_integrity(self) -> None:
        """Raises `IntegrityError` if its indexes disagree."""
        self._warm.check_integrity()
        by_hash = {known: block_id for block_id, known in enumerate(self._hash_of) if known is not None}
        expect_equal("blocks by hash", by_hash, self._block_of)
        with_state = {block_id for block_id, state in enumerate(self._states) if state != _UNKNOWN}
        expect_equal("blocks with a hash and with a state", set(by_hash.values()), with_state)
        expect_equal("warm blocks", sorted(self._warm.idle_blocks()), sorted(self.warm_blocks()))
        expect_equal("cold blocks", self.num_cold, self._states.count(_COLD))
        parents = Counter(self._parent_of[block_id] for block_id in self._blocks_in(_BUSY))
        del parents[None]
        expect_equal("busy children per hash", dict(parents), self._num_busy_children)
        in_use = [block_id for block_id in self._warm.ready_blocks() if self._hash_of[block_id] in parents]
        expect_equal("blocks to be cooled that busy ones build on", in_use, [])

    def _blocks_in(self, state: int) -> set[int]:
        return {block_id for block_id, its_state in enumerate(self._states) if its_state == state}

    def _clean(self, block_id: int) -> None:
        """The block and its hash, if it has one, leave the indexes."""
        if (block_hash := self._hash_of[block_id]) is not None:
            del self._block_of[block_hash]
            self._toggle(block_hash)
            self._hash_of[block_id] = self._parent_of[block_id] = None
            self._states[block_id] = _UNKNOWN

    def _toggle(self, block_hash: str) -> None:
        if block_hash in self._changed:
            del self._changed[block_hash]
        else:
            self._changed[block_hash] = None

    def _builds_on(self, parent_hash: str) -> None:
        """Another busy block has this parent, which goes last from now on, and its own parents with it."""
        self._num_busy_children[parent_hash] = self._num_busy_children.get(parent_hash, 0) + 1
        if chain := self._take_chain(self._block_of.get(parent_hash)):
            self._put_in_order(chain)

    def _end_use(self, block_ids: Sequence[int]) -> list[int]:
        """Returns the chain of these blocks, with those in front of it that are warm already. They are taken
        out of their order: a parent is as young as what builds on it."""
        num_busy_children, parent_of = self._num_busy_children, self._parent_of
        chain: list[int] = []
        for block_id in block_ids:
            parent_hash = parent_of[block_id]
            if parent_hash is not None:
                if num_others := num_busy_children[parent_hash] - 1:
                    num_busy_children[parent_hash] = num_others
                else:
                    del num_busy_children[parent_hash]
                    if not chain or self._hash_of[chain[-1]] != parent_hash:
                        chain += self._take_chain(self._block_of.get(parent_hash))
            chain.append(block_id)
        return chain

    def _take_chain(self, last: int | None) -> list[int]:
        """Takes the block `last` and those in front of it, as far as they are warm, out of their order."""
        chain: list[int] = []
        block_id = last
        while block_id is not None and self._states[block_id] == _WARM:
            self._states[block_id] = _BUSY  # until it is in order again
            chain.append(block_id)
            parent_hash = self._parent_of[block_id]
            block_id = None if parent_hash is None else self._block_of.get(parent_hash)
        chain.reverse()
        for block_id in chain:
            self._warm.remove(block_id)
        return chain

    def _put_in_order(self, chain: list[int], *, is_oldest: bool = False) -> None:
        """The blocks are warm from now on; held back are those up to the last that a busy one builds on."""
        hashes = [self._hash_of[block_id] for block_id in chain]
        num_held_back = 0
        if not self._num_busy_children.keys().isdisjoint(hashes):
            num_held_back = 1 + max(i for i, own in enumerate(hashes) if own in self._num_busy_children)
        for part, is_held_back in ((chain[:num_held_back], True), (chain[num_held_back:], False)):
            runs = runs_of(part)
            for start, length in runs:
                self._states[start : start + length] = bytes([_WARM]) * length
            self._warm.append(runs, is_held_back=is_held_back, is_oldest=is_oldest)

    def _pop_held_back(self) -> Run:
        """The last block of the oldest chain that is held back; what is in front of it may now be ready."""
        block_ids = self._warm.pop_held_back()
        self._put_in_order(block_ids[:-1], is_oldest=True)
        return Run(block_ids[-1], 1)
