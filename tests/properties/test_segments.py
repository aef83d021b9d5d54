"""Segments against a set of free block ids."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flowkv_common.wire.messages import Run
from flowkv_engine.kv.segments import Segments, ids_of, runs_of

NUM_BLOCKS = 24


def num_copies(lengths: list[int], like: list[int]) -> int:
    """Copies between runs of `lengths` and runs of `like`, which add up to the same."""
    ends = {sum(side[: i + 1]) for side in (lengths, like) for i in range(len(side))}
    return len(ends)


class SegmentsMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.segments = Segments(NUM_BLOCKS)
        self.free = set(range(NUM_BLOCKS))

    def free_runs(self) -> list[Run]:
        return runs_of(sorted(self.free))

    @precondition(lambda self: self.free)
    @rule(data=st.data(), room=st.integers(0, 4))
    def take_runs(self, data: st.DataObject, room: int) -> None:
        n = data.draw(st.integers(1, len(self.free)))
        before = sorted((run.length for run in self.free_runs()), reverse=True)
        fewest = next(i for i in range(len(before)) if sum(before[: i + 1]) >= n) + 1
        plan = self.segments.plan_runs(n)
        runs = self.segments.take_runs(n, room=room)
        assert len(runs) == len(plan) == fewest
        assert sum(run.length for run in runs) == sum(plan) == n
        self.move(runs)
        if room == 0 and fewest == 1:
            assert min(length for length in before if length >= n) - n in {
                run.length for run in self.free_runs()
            } | {0}

    @precondition(lambda self: self.free)
    @rule(data=st.data(), like=st.lists(st.integers(1, 6), min_size=1, max_size=6))
    def take_runs_like(self, data: st.DataObject, like: list[int]) -> None:
        n = min(sum(like), len(self.free))
        plan = self.segments.plan_runs(n)
        runs = self.segments.take_runs(n, like)
        self.move(runs)
        if sum(like) == n:
            lengths = [run.length for run in runs]
            assert num_copies(lengths, like) <= num_copies(plan, like)

    def move(self, runs: list[Run]) -> None:
        taken = ids_of(runs)
        assert len(set(taken)) == len(taken)
        assert set(taken) <= self.free
        self.free -= set(taken)

    @rule(start=st.integers(0, NUM_BLOCKS - 1), length=st.integers(1, 6))
    def take_run(self, start: int, length: int) -> None:
        run = Run(start, length)
        if set(ids_of([run])) <= self.free:
            self.segments.take_run(run)
            self.move([run])
        else:
            with pytest.raises(ValueError, match="not free"):
                self.segments.take_run(run)

    @rule(block=st.integers(0, NUM_BLOCKS - 1))
    def take_after(self, block: int) -> None:
        if block in self.free:
            return
        expected = block + 1 if block + 1 in self.free else None
        assert self.segments.take_after(block) == expected
        self.free.discard(block + 1)

    @rule(start=st.integers(0, NUM_BLOCKS - 1), length=st.integers(1, 8))
    def free_run(self, start: int, length: int) -> None:
        run = Run(start, length)
        ids = set(ids_of([run]))
        if ids & self.free or start + length > NUM_BLOCKS:
            with pytest.raises(ValueError, match="Run"):
                self.segments.free_run(run)
        else:
            self.segments.free_run(run)
            self.free |= ids

    @invariant()
    def same_as_the_set(self) -> None:
        self.segments.check_integrity()
        runs = self.free_runs()
        assert self.segments.free_blocks() == sorted(self.free)
        assert self.segments.num_free == len(self.free)
        assert self.segments.longest_run == max((run.length for run in runs), default=0)


TestSegments = SegmentsMachine.TestCase
TestSegments.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
