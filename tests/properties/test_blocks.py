"""Blocks against a model that keeps one record per block and scans for everything."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flowkv_engine.kv.blocks import Blocks, OutOfBlocks

NUM_BLOCKS = 14

# Two families of prompts with common beginnings; a prompt is its chain of hashes.
prompts = st.tuples(st.sampled_from("ab"), st.integers(1, 5), st.booleans()).map(
    lambda made: [f"{made[0]}{depth}{'+' if made[2] and depth > 2 else ''}" for depth in range(made[1])]
)


class Sequence:
    """A holder of blocks; its first `num_committed` ones are in the cache under `hashes`."""

    def __init__(self, hashes: list[str], block_ids: list[int], num_committed: int) -> None:
        self.hashes = hashes
        self.block_ids = block_ids
        self.num_committed = num_committed


class BlocksMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks(NUM_BLOCKS)
        self.sequences: list[Sequence] = []
        self.quarantined: list[int] = []
        self.content: dict[int, str] = {}  # the hash of what was last computed into a block
        self.told: set[str] = set()  # what one who listens to all changes believes to be cached

    def match(self, hashes: list[str]) -> list[int]:
        found = self.blocks.match_prefix(hashes)
        assert [self.content[block] for block in found] == hashes[: len(found)]
        return found

    def refs(self) -> Counter[int]:
        return Counter(block for sequence in self.sequences for block in sequence.block_ids)

    @rule(hashes=prompts, extra=st.integers(0, 3), room=st.integers(0, 2))
    def start(self, hashes: list[str], extra: int, room: int) -> None:
        cached = self.match(hashes)
        missing = len(hashes) - len(cached) + extra
        occupied = set(self.refs()) | set(cached) | set(self.quarantined)
        if NUM_BLOCKS - len(occupied) < missing:
            assert not self.blocks.can_allocate(missing)
            with pytest.raises(OutOfBlocks):
                self.blocks.allocate(missing)
            self.blocks.release(cached)
            return
        fresh = self.blocks.allocate(missing, room=room)
        assert len(set(fresh)) == missing
        assert not occupied & set(fresh)
        for block in fresh:
            self.content.pop(block, None)
        self.sequences.append(Sequence(hashes, cached + fresh, len(cached)))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        for i in range(sequence.num_committed, len(sequence.hashes)):
            parent = sequence.hashes[i - 1] if i else None
            self.content[sequence.block_ids[i]] = sequence.hashes[i]
            self.blocks.commit(sequence.block_ids[i], sequence.hashes[i], parent)
        sequence.num_committed = len(sequence.hashes)
        found = self.match(sequence.hashes)
        self.blocks.release(found)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        last = sequence.block_ids[-1] if sequence.block_ids else None
        occupied = set(self.refs()) | set(self.quarantined)
        if len(occupied) == NUM_BLOCKS:
            with pytest.raises(OutOfBlocks):
                self.blocks.grow(last)
            return
        block = self.blocks.grow(last)
        assert block not in occupied
        self.content.pop(block, None)
        sequence.block_ids.append(block)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        sequence = self.pop(data)
        self.blocks.release(sequence.block_ids)
        found = self.match(sequence.hashes)
        self.blocks.release(found)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def abort_under_a_copy(self, data: st.DataObject) -> None:
        sequence = self.pop(data)
        still_held = self.refs()
        self.blocks.quarantine(sequence.block_ids)
        self.quarantined += [block for block in sequence.block_ids if not still_held[block]]

    @precondition(lambda self: self.quarantined)
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        settled = data.draw(st.lists(st.sampled_from(self.quarantined), unique=True))
        self.blocks.settle(settled)
        self.quarantined = [block for block in self.quarantined if block not in settled]

    @rule(at_most=st.integers(1, 4))
    def tell(self, at_most: int) -> None:
        """Never the same twice; after enough calls, all has been told."""
        self.take_changes(at_most)

    @rule()
    def tell_all(self) -> None:
        for _ in range(4 * NUM_BLOCKS):
            self.take_changes(at_most=1)
        found = {h for h in self.content.values() if self.blocks.prefix_cache.find(h) is not None}
        assert self.told == found

    def take_changes(self, at_most: int) -> None:
        stored, removed = self.blocks.prefix_cache.take_changes(at_most)
        assert len(stored) + len(removed) <= at_most
        assert not self.told & set(stored)
        assert self.told >= set(removed)
        self.told = self.told - set(removed) | set(stored)

    def pop(self, data: st.DataObject) -> Sequence:
        return self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))

    @rule(n=st.integers(0, NUM_BLOCKS))
    def plan(self, n: int) -> None:
        if self.blocks.can_allocate(n):
            assert sum(self.blocks.plan_runs(n)) == n

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        self.blocks.check_integrity()
        counts = self.blocks.counts()
        assert counts.leased == len(self.refs())
        assert counts.quarantined == len(self.quarantined)
        assert counts.free + counts.cached == NUM_BLOCKS - counts.leased - counts.quarantined


TestBlocks = BlocksMachine.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
