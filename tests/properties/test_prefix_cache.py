"""What the prefix cache evicts first, against a model with one record per prefix that sorts them all."""

from __future__ import annotations

import copy

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flowkv_common.wire.messages import Run
from flowkv_engine.kv.blocks import PrefixCache

NUM_BLOCKS = 24

# Prompts with common beginnings: each hash is its whole prefix.
prompts = st.text("ab", min_size=1, max_size=5).map(
    lambda text: [text[: depth + 1] for depth in range(len(text))]
)


class Holder:
    """Uses one block per hash of a chain; those that it computed itself may be anonymous."""

    def __init__(self, hashes: list[str], block_ids: list[int]) -> None:
        self.hashes = hashes
        self.block_ids = block_ids


class PrefixCacheMachine(RuleBasedStateMachine):
    """Holders compute what they did not find, all at once or in the middle of what others compute."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(NUM_BLOCKS)
        self.open = set(range(NUM_BLOCKS))  # may be overwritten: unknown or evictable
        self.holders: list[Holder] = []
        self.used_at: dict[str, int] = {}  # the last time that a holder of the prefix, or of more, left
        self.now = 0
        self.is_plain = True  # no prefix was ever computed twice, nothing built on was ever evicted

    def leased(self) -> set[str]:
        found = {self.cache.hash_of(block) for holder in self.holders for block in holder.block_ids}
        return {known for known in found if known is not None}

    def queued(self) -> set[str]:
        return {self.cache.hash_of(block) or "" for block in self.cache.blocks_without_holder()[0]}

    def built_on(self) -> set[str]:
        """Queued prefixes that a leased one builds on directly or over others that are queued."""
        leased, queued = self.leased(), self.queued()
        held: set[str] = set()
        for prefix in sorted(queued, key=len, reverse=True):
            if any(prefix + more in leased | held for more in "ab"):
                held.add(prefix)
        return held

    @rule(hashes=prompts, is_late=st.booleans())
    def start(self, hashes: list[str], is_late: bool) -> None:
        matched = self.cache.match(hashes)
        self.open -= set(self.cache.lease(matched))
        missing = hashes[len(matched) :]
        if len(missing) > len(self.open):
            self.cache.queue([block for block in matched if not self.is_held(block)])
            self.touch([h for h in hashes[: len(matched)] if h not in self.leased()])
            return
        holder = Holder(hashes, matched)
        self.holders.append(holder)
        for _ in missing:
            block = min(self.open)
            self.open.remove(block)
            self.cache.overwrite(Run(block, 1))
            holder.block_ids.append(block)
        if not is_late:
            self.commit(holder)

    def is_held(self, block: int) -> bool:
        return any(block in holder.block_ids for holder in self.holders)

    def touch(self, hashes: list[str]) -> None:
        self.now += 1
        self.used_at.update(dict.fromkeys(hashes, self.now))

    def commit(self, holder: Holder) -> None:
        for i, block_hash in enumerate(holder.hashes):
            if self.cache.find(block_hash) is None:
                self.cache.insert(holder.block_ids[i], block_hash, holder.hashes[i - 1] if i else None)
            elif self.cache.hash_of(holder.block_ids[i]) is None:
                self.is_plain = False

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        self.commit(data.draw(st.sampled_from(self.holders)))

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), is_aborted=st.booleans())
    def finish(self, data: st.DataObject, is_aborted: bool) -> None:
        holder = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        unheld = [block for block in holder.block_ids if not self.is_held(block)]
        self.touch([known for block in unheld if (known := self.cache.hash_of(block)) is not None])
        if is_aborted:
            self.is_plain = False  # what builds on it stays
            self.cache.forget(unheld)
            self.open.update(unheld)
        else:
            self.open.update(self.cache.queue(unheld))

    @rule(n=st.integers(1, 6))
    def evict(self, n: int) -> None:
        for _ in range(n):
            queued, built_on, leased = self.queued(), self.built_on(), self.leased()
            evicted_ids = self.cache.evict(1)
            if not evicted_ids:
                assert not queued
                return
            [block] = evicted_ids
            self.open.add(block)
            evicted = self.cache.hash_of(block) or ""
            self.is_plain &= queued != built_on
            assert evicted not in built_on or queued == built_on
            assert not any(evicted + more in queued for more in "ab")
            if self.is_plain:
                assert evicted == min(queued - built_on, key=lambda h: (self.used_at[h], -len(h)))
            assert evicted not in leased

    @rule(n=st.integers(2, 6))
    def evict_at_once(self, n: int) -> None:
        """Gives up the same blocks, in the same order, as one after the other."""
        other, built_on = copy.deepcopy(self.cache), self.built_on()
        evicted = self.cache.evict(n)
        assert evicted == [block for _ in range(n) for block in other.evict(1)]
        self.open.update(evicted)
        self.is_plain &= built_on.isdisjoint(self.cache.hash_of(block) for block in evicted)

    @invariant()
    def indexes_agree(self) -> None:
        self.cache.check_integrity()
        num_without_holder = sum(map(len, self.cache.blocks_without_holder()))
        assert self.cache.num_queued + self.cache.num_evictable == num_without_holder


TestPrefixCache = PrefixCacheMachine.TestCase
TestPrefixCache.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
