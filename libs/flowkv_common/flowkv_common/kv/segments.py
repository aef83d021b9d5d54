"""Free segments of a pool: hands out runs as long as it can. Knows free from taken, nothing else.

Runs are cut from the back of a segment, so that the sequence in front of it can go on growing in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from sortedcontainers import SortedDict, SortedList

from flowkv_common.kv.alignment import ids_of
from flowkv_common.kv.integrity import expect_equal
from flowkv_common.wire.messages import Run


class Segments:
    """The free blocks among `0 ... num_blocks - 1`. Each operation is O(log n) per run it touches."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = 0
        self._by_start = SortedDict()  # start -> length
        self._by_length = SortedList()  # (length, start)
        if num_blocks:
            self._add(Run(0, num_blocks))

    @property
    def longest_run(self) -> int:
        return int(self._by_length[-1][0]) if self._by_length else 0

    @property
    def num_segments(self) -> int:
        return len(self._by_length)

    def take(self, n: int, like: Sequence[int] = (), *, room: int = 0) -> list[Run]:
        """Takes `n` blocks, in order, as one run where a segment holds them, else as few runs as possible.

        `like` are the lengths of the runs that these blocks will be copied from or to: where `n` blocks must
        be cut, they are cut where the other side is, if that saves copies. `room` is how many blocks should
        stay free behind the last run. Raises `ValueError` if fewer than `n` are free.
        """
        runs = self._choose(n, like, room)
        for run in runs:
            self._cut(run)
        return runs

    def plan(self, n: int) -> list[int]:
        """Lengths of the runs that `take(n)` would give now. Raises `ValueError` as `take` does."""
        return [run.length for run in self._choose(n, (), 0)]

    def take_after(self, block_id: int) -> int | None:
        """Takes the block behind the taken block `block_id` and returns it, or None if it is not free."""
        following = block_id + 1
        if following not in self._by_start:
            return None
        self._cut(Run(following, 1))
        return following

    def give(self, run: Run) -> None:
        """Frees `run`. Raises `ValueError` if part of it is free already or outside the pool."""
        start, end = run.start, run.start + run.length
        if run.length < 1 or start < 0 or end > self.num_blocks:
            raise ValueError(f"{run} is no run of a pool of {self.num_blocks} blocks")
        before = self._last_before(end)
        if before is not None and before.start + before.length > start:
            raise ValueError(f"double free: {run} overlaps the free {before}")
        if before is not None and before.start + before.length == start:
            self._drop(before)
            start = before.start
        if (length_behind := self._by_start.get(end)) is not None:
            self._drop(Run(end, length_behind))
            end += length_behind
        self._add(Run(start, end - start))

    def segment_of(self, block_id: int) -> Run:
        """The segment that holds the free block `block_id`. Raises `ValueError` if it is not free."""
        segment = self._last_before(block_id + 1)
        if segment is None or segment.start + segment.length <= block_id:
            raise ValueError(f"block {block_id} is not free")
        return segment

    def free_blocks(self) -> list[int]:
        """All free block ids, ascending. O(n): for checks."""
        return ids_of(Run(start, length) for start, length in self._by_start.items())

    def check_integrity(self) -> None:
        """Raises `IntegrityError` if the two indexes disagree or neighbours were not merged."""
        segments = [Run(start, length) for start, length in self._by_start.items()]
        by_length = sorted((segment.length, segment.start) for segment in segments)
        expect_equal("segments by start and by length", by_length, list(self._by_length))
        expect_equal("free blocks", sum(segment.length for segment in segments), self.num_free)
        end = -1
        for segment in segments:
            expect_equal(f"{segment} lies apart from the one before", segment.start > end, True)
            end = segment.start + segment.length
        expect_equal("segments end inside the pool", end <= self.num_blocks, True)

    # --- choosing --------------------------------------------------------------------------------

    def _choose(self, n: int, like: Sequence[int], room: int) -> list[Run]:
        if n > self.num_free:
            raise ValueError(f"{n} blocks wanted, {self.num_free} are free")
        if n < 1:
            return []
        fewest = self._fewest(n, room)
        lengths = _fitted(like, n)
        if set(_cuts([run.length for run in fewest])) <= set(_cuts(lengths)):
            return fewest  # no copy more than the other side's own cuts cost
        return self._matching(lengths, room) or fewest

    def _fewest(self, n: int, room: int) -> list[Run]:
        """Whole segments, longest first, then the smallest one that holds the rest and its room."""
        runs: list[Run] = []
        longest = len(self._by_length) - 1
        while n > self._by_length[longest][0]:
            length, start = self._by_length[longest]
            runs.append(Run(start, length))
            n -= length
            longest -= 1
        # Where no segment has that much room, the longest one left has the most.
        fitting = min(self._by_length.bisect_left((n + room, -1)), longest)
        runs.append(self._placed(fitting, n, room))
        return runs

    def _matching(self, lengths: Sequence[int], room: int) -> list[Run] | None:
        """One segment of its own for each of `lengths`, or None. Shortest first, each gets its best fit."""
        chosen: dict[int, Run] = {}
        index = -1
        for place in sorted(range(len(lengths)), key=lengths.__getitem__):
            index = max(index + 1, self._by_length.bisect_left((lengths[place], -1)))
            if index >= len(self._by_length):
                return None
            is_last = place == len(lengths) - 1
            chosen[place] = self._placed(index, lengths[place], room if is_last else 0)
        return [chosen[place] for place in range(len(lengths))]

    def _placed(self, index: int, n: int, room: int) -> Run:
        length, start = self._by_length[index]
        spare = length - n
        return Run(start + spare - min(room, spare), n)

    # --- bookkeeping -----------------------------------------------------------------------------

    def _cut(self, run: Run) -> None:
        """Takes `run` out of the segment around it."""
        end = run.start + run.length
        segment = self._last_before(end)
        assert segment is not None
        self._drop(segment)
        if segment.start < run.start:
            self._add(Run(segment.start, run.start - segment.start))
        if end < segment.start + segment.length:
            self._add(Run(end, segment.start + segment.length - end))

    def _last_before(self, end: int) -> Run | None:
        """The last segment that starts before `end`."""
        index = self._by_start.bisect_left(end) - 1
        return Run(*self._by_start.peekitem(index)) if index >= 0 else None

    def _add(self, segment: Run) -> None:
        self._by_start[segment.start] = segment.length
        self._by_length.add((segment.length, segment.start))
        self.num_free += segment.length

    def _drop(self, segment: Run) -> None:
        del self._by_start[segment.start]
        self._by_length.remove((segment.length, segment.start))
        self.num_free -= segment.length


def _cuts(lengths: Sequence[int]) -> list[int]:
    """Where runs of these lengths are cut, as offsets from their beginning."""
    return list(accumulate(lengths))[:-1]


def _fitted(lengths: Sequence[int], n: int) -> list[int]:
    """`lengths` cut off, or completed by one more, so that they add up to `n`."""
    fitted: list[int] = []
    for length in lengths:
        if n > 0 and length > 0:
            fitted.append(min(length, n))
            n -= fitted[-1]
    return [*fitted, n] if n else fitted
