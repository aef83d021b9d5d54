"""Idle blocks in the order in which a cache gives them up, many at a time. Knows no hashes."""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from itertools import islice

from flowkv_common.wire.messages import Run
from flowkv_common.wire.nodes import BlockCounts
from flowkv_engine.kv.segments import IntegrityError, Segments, expect_equal, runs_of

# Whole runs: to touch the 5,000 blocks of a long prompt one by one would take milliseconds.
_Spans = deque[tuple[int, int]]  # (start, end) of runs of consecutive blocks


class _Stretch:
    """Blocks of one chain that became idle together, in its order."""

    __slots__ = ("order", "spans")

    def __init__(self, spans: _Spans, order: OrderedDict[_Stretch, None]) -> None:
        self.spans = spans
        self.order = order  # the one that it stands in
        order[self] = None


class Stretches:
    """The oldest stretch goes first, from its back; those held back go when there are no others."""

    def __init__(self, num_blocks: int) -> None:
        self.num_idle = 0
        self._ready: OrderedDict[_Stretch, None] = OrderedDict()
        self._held_back: OrderedDict[_Stretch, None] = OrderedDict()
        self._stretch_of: list[_Stretch | None] = [None] * num_blocks  # of idle blocks; others' are leftovers

    def append(self, runs: Sequence[Run], *, is_held_back: bool, is_oldest: bool = False) -> None:
        """These blocks, of one chain in its order, have become idle; they are the youngest, or the oldest."""
        if not runs:
            return
        spans = deque((start, start + length) for start, length in runs)
        order = self._held_back if is_held_back else self._ready
        stretch = _Stretch(spans, order)
        if is_oldest:
            order.move_to_end(stretch, last=False)
        for start, end in spans:
            self._stretch_of[start:end] = [stretch] * (end - start)
            self.num_idle += end - start

    def remove(self, block_id: int) -> None:
        """An idle block is in use again. O(1) at the front of its stretch, where a chain is found again."""
        stretch = self._stretch_of[block_id]
        assert stretch is not None
        spans = stretch.spans
        start, end = spans[0]
        if start != block_id:
            _remove_within(spans, block_id)
        elif end - start > 1:
            spans[0] = (start + 1, end)
        else:
            spans.popleft()
        self._close_if_empty(stretch)
        self.num_idle -= 1

    def pop(self, n: int) -> Run | None:
        """The next run to give up, of at most `n` blocks; None if all that is left is held back."""
        if not self._ready:
            return None
        stretch = next(iter(self._ready))
        start, end = stretch.spans.pop()
        if end - start > n:
            stretch.spans.append((start, end - n))
            start = end - n
        self._close_if_empty(stretch)
        self.num_idle -= end - start
        return Run(start, end - start)

    def pop_held_back(self) -> list[int]:
        """All blocks of the oldest stretch that is held back, in order. Raises `KeyError` without one."""
        stretch, _ = self._held_back.popitem(last=False)
        block_ids = _ids(stretch)
        self.num_idle -= len(block_ids)
        return block_ids

    def ready_blocks(self) -> list[int]:
        return [block_id for stretch in self._ready for block_id in _ids(stretch)]

    def idle_blocks(self) -> list[int]:
        held_back = [block_id for stretch in self._held_back for block_id in _ids(stretch)]
        return self.ready_blocks() + held_back

    def check_integrity(self) -> None:
        """Raises `IntegrityError` if its indexes disagree."""
        found = {
            block_id: stretch
            for order in (self._ready, self._held_back)
            for stretch in order
            for block_id in _ids(stretch)
        }
        expect_equal("idle blocks, each in one stretch", len(self.idle_blocks()), len(found))
        expect_equal("idle blocks counted", self.num_idle, len(found))
        expect_equal("stretches by block", {b: self._stretch_of[b] for b in found}, found)
        expect_equal("empty stretches", [s for s in found.values() if not s.spans], [])

    def _close_if_empty(self, stretch: _Stretch) -> None:
        if not stretch.spans:
            del stretch.order[stretch]


def _ids(stretch: _Stretch) -> list[int]:
    return [block_id for start, end in stretch.spans for block_id in range(start, end)]


def _remove_within(spans: _Spans, block_id: int) -> None:
    """O(runs)."""
    place = next(i for i, (start, end) in enumerate(spans) if start <= block_id < end)
    start, end = spans[place]
    del spans[place]
    if block_id + 1 < end:
        spans.insert(place, (block_id + 1, end))
    if start < block_id:
        spans.insert(place, (start, block_id))


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
