"""Runs of blocks: the allocator of free ones, and the copies that bring the blocks of one side to another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from sortedcontainers import SortedList

from flowkv_common.wire.messages import Run


class Copy(NamedTuple):
    """Blocks `src ... src + length - 1` of the sender go to `dst ...` of the receiver."""

    src: int
    dst: int
    length: int


def align(src: Sequence[int], dst: Sequence[int]) -> list[Copy]:
    """The fewest copies that bring block `src[i]` to `dst[i]` for every `i`.

    Raises `ValueError` if the lists differ in length.
    """
    # Pieces belong to one copy exactly when they keep their distance and follow each other.
    copies: list[Copy] = []
    for piece in sorted(_pieces(src, dst), key=lambda piece: (piece.dst - piece.src, piece.src)):
        last = copies[-1] if copies else None
        if last and piece.src == last.src + last.length and piece.dst == last.dst + last.length:
            copies[-1] = last._replace(length=last.length + piece.length)
        else:
            copies.append(piece)
    return copies


def _pieces(src: Sequence[int], dst: Sequence[int]) -> Iterator[Copy]:
    """What is contiguous on both sides, in the order of the lists."""
    first_src = first_dst = length = 0
    for here, there in zip(src, dst, strict=True):
        if here == first_src + length and there == first_dst + length:
            length += 1
            continue
        if length:
            yield Copy(first_src, first_dst, length)
        first_src, first_dst, length = here, there, 1
    if length:
        yield Copy(first_src, first_dst, length)


def runs_of(block_ids: Iterable[int]) -> list[Run]:
    """The runs of a block table, in its order: `[7, 8, 3]` is `[Run(7, 2), Run(3, 1)]`."""
    runs: list[Run] = []
    start = end = -1
    for block_id in block_ids:
        if block_id != end:
            if end > start:
                runs.append(Run(start, end - start))
            start = block_id
        end = block_id + 1
    if end > start:
        runs.append(Run(start, end - start))
    return runs


def ids_of(runs: Iterable[Run]) -> list[int]:
    """The block ids of `runs`, in order: the inverse of `runs_of`."""
    return [block_id for run in runs for block_id in range(run.start, run.start + run.length)]


class Segments:
    """The free blocks among `0 ... num_blocks - 1`, as maximal runs. O(log n) per run that is touched."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = 0
        self._by_length = SortedList()  # (length, start)
        self._length_at: dict[int, int] = {}  # by start
        self._start_before: dict[int, int] = {}  # by end: where the segment starts that ends there
        self._is_free = bytearray(num_blocks)
        if num_blocks:
            self.free_run(Run(0, num_blocks))

    @property
    def longest_run(self) -> int:
        return int(self._by_length[-1][0]) if self._by_length else 0

    @property
    def num_segments(self) -> int:
        return len(self._by_length)

    def take_runs(self, n: int, like: Sequence[int] = (), *, room: int = 0) -> list[Run]:
        """Takes `n` blocks, in order, as one run where a segment holds them, else as few runs as possible.

        `like` are the lengths of the runs that these blocks will be copied from or to: where `n` blocks must
        be cut, they are cut where the other side is, if that saves copies. `room` is how many blocks should
        stay free behind the last run. Raises `ValueError` if fewer than `n` are free.
        """
        runs = self._choose_runs(n, like, room)
        for run in runs:
            self.take_run(run)
        return runs

    def plan_runs(self, n: int) -> list[int]:
        """Lengths of the runs that `take_runs(n)` would give now. Raises `ValueError` as it does."""
        return [run.length for run in self._choose_runs(n, (), 0)]

    def take_run(self, run: Run) -> None:
        """Takes exactly `run`. Raises `ValueError` if part of it is not free."""
        start, end = run.start, run.start + run.length
        if not (0 <= start < self.num_blocks and self._is_free[start]):
            raise ValueError(f"block {start} is not free")
        segment_start = self._is_free.rfind(0, 0, start) + 1  # a scan of bytes: 100,000 take microseconds
        segment_end = segment_start + self._length_at[segment_start]
        if end > segment_end:
            raise ValueError(f"{run} is not free: its segment ends at {segment_end}")
        self._is_free[start:end] = bytes(run.length)
        self.num_free -= run.length
        self._drop_segment(segment_start, segment_end)
        if segment_start < start:
            self._add_segment(segment_start, start)
        if end < segment_end:
            self._add_segment(end, segment_end)

    def take_after(self, block_id: int) -> int | None:
        """Takes the block behind the taken block `block_id` and returns it, or None if it is not free."""
        following = block_id + 1
        if following not in self._length_at:
            return None
        self.take_run(Run(following, 1))
        return following

    def free_run(self, run: Run) -> None:
        """Frees `run`. Raises `ValueError` if part of it is free already or outside the pool."""
        start, end = run.start, run.start + run.length
        if run.length < 1 or start < 0 or end > self.num_blocks:
            raise ValueError(f"{run} is no run of a pool of {self.num_blocks} blocks")
        if (free := self._is_free.find(1, start, end)) >= 0:
            raise ValueError(f"double free: block {free} of {run} is free")
        self._is_free[start:end] = b"\x01" * run.length
        self.num_free += run.length
        if (start_before := self._start_before.get(start)) is not None:
            self._drop_segment(start_before, start)
            start = start_before
        if (length_behind := self._length_at.get(end)) is not None:
            self._drop_segment(end, end + length_behind)
            end += length_behind
        self._add_segment(start, end)

    def free_blocks(self) -> list[int]:
        """All free block ids, ascending. O(n): for checks."""
        return ids_of(Run(start, length) for start, length in sorted(self._length_at.items()))

    def check_integrity(self) -> None:
        """Raises `IntegrityError` if the indexes disagree or neighbours were not merged. O(blocks)."""
        segments = [Run(start, length) for start, length in sorted(self._length_at.items())]
        by_length = sorted((segment.length, segment.start) for segment in segments)
        expect_equal("segments by start and by length", by_length, list(self._by_length))
        by_end = {segment.start + segment.length: segment.start for segment in segments}
        expect_equal("segments by start and by end", by_end, self._start_before)
        marked = [block_id for block_id, is_free in enumerate(self._is_free) if is_free]
        expect_equal("blocks of segments and blocks marked free", ids_of(segments), marked)
        expect_equal("free blocks", len(marked), self.num_free)
        expect_equal("segments, neighbours merged", runs_of(marked), segments)

    def _choose_runs(self, n: int, like: Sequence[int], room: int) -> list[Run]:
        if n > self.num_free:
            raise ValueError(f"{n} blocks wanted, {self.num_free} are free")
        if n < 1:
            return []
        fewest = self._fewest_runs(n, room)
        if len(fewest) == 1 or not like:
            return fewest
        lengths: list[int] = []  # `like`, cut off or completed so that it adds up to `n`
        missing = n
        for length in like:
            if missing > 0 and length > 0:
                lengths.append(min(length, missing))
                missing -= lengths[-1]
        if missing:
            lengths.append(missing)
        if set(accumulate(run.length for run in fewest)) <= set(accumulate(lengths)):
            return fewest  # cut only where the other side is cut too
        return self._runs_like(lengths, room) or fewest

    def _fewest_runs(self, n: int, room: int) -> list[Run]:
        """Whole segments, longest first, then a part of the smallest one that holds the rest and its room."""
        runs: list[Run] = []
        longest = len(self._by_length) - 1
        while n > self._by_length[longest][0]:
            length, start = self._by_length[longest]
            runs.append(Run(start, length))
            n -= length
            longest -= 1
        # Where no segment has that much room, the longest one left has the most.
        fitting = min(self._by_length.bisect_left((n + room, -1)), longest)
        return [*runs, self._place_run(fitting, n, room)]

    def _runs_like(self, lengths: Sequence[int], room: int) -> list[Run] | None:
        """A run in another segment for each of `lengths`, or None. Shortest first, each gets its best fit."""
        chosen: dict[int, Run] = {}
        index = -1
        for place in sorted(range(len(lengths)), key=lengths.__getitem__):
            index = max(index + 1, self._by_length.bisect_left((lengths[place], -1)))
            if index >= len(self._by_length):
                return None
            is_last = place == len(lengths) - 1
            chosen[place] = self._place_run(index, lengths[place], room if is_last else 0)
        return [chosen[place] for place in range(len(lengths))]

    def _place_run(self, index: int, n: int, room: int) -> Run:
        """At the end of this segment by length, as far as there is room behind."""
        length, start = self._by_length[index]
        spare = length - n
        return Run(start + spare - min(room, spare), n)

    def _add_segment(self, start: int, end: int) -> None:
        self._length_at[start] = end - start
        self._start_before[end] = start
        self._by_length.add((end - start, start))

    def _drop_segment(self, start: int, end: int) -> None:
        del self._length_at[start]
        del self._start_before[end]
        self._by_length.remove((end - start, start))


class IntegrityError(AssertionError):
    """The indexes of the KV cache contradict each other: a bug, never a user's fault."""


def expect_equal(what: str, left: object, right: object) -> None:
    """Raises `IntegrityError` that names both sides unless they are equal."""
    if left != right:
        raise IntegrityError(f"{what}: {left!r} != {right!r}")
