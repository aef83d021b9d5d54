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


def cut(copies: Iterable[Copy], max_length: int) -> Iterator[list[Copy]]:
    """Cuts `copies` into lists of which each moves `max_length`, the last one maybe less."""
    part: list[Copy] = []
    space = max_length
    for src, dst, length in copies:
        while length:
            step = min(space, length)
            part.append(Copy(src, dst, step))
            src, dst, length, space = src + step, dst + step, length - step, space - step
            if not space:
                yield part
                part, space = [], max_length
    if part:
        yield part


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
    """The free blocks among `0 ... num_blocks - 1`, as maximal runs: segments.

    An operation is O(log segments) per run, and looks for the ends of a segment in bytes: 100,000 blocks are
    a few microseconds.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = 0
        self._is_free = bytearray(num_blocks)
        self._by_length = SortedList()  # (length, start) of each segment
        if num_blocks:
            self.free_run(Run(0, num_blocks))

    @property
    def longest_run(self) -> int:
        return int(self._by_length[-1][0]) if self._by_length else 0

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
        if start < 0 or end > self.num_blocks or self._is_free.find(0, start, end) >= 0:
            raise ValueError(f"{run} is not free")
        segment_start, segment_end = self._free_around(start, end)
        self._by_length.remove((segment_end - segment_start, segment_start))
        if segment_start < start:
            self._by_length.add((start - segment_start, segment_start))
        if end < segment_end:
            self._by_length.add((segment_end - end, end))
        self._is_free[start:end] = bytes(run.length)
        self.num_free -= run.length

    def take_after(self, block_id: int) -> int | None:
        """Takes the block behind `block_id` and returns it, or None if it is not free."""
        following = block_id + 1
        if following == self.num_blocks or not self._is_free[following]:
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
        segment_start, segment_end = self._free_around(start, end)
        if segment_start < start:
            self._by_length.remove((start - segment_start, segment_start))
        if end < segment_end:
            self._by_length.remove((segment_end - end, end))
        self._by_length.add((segment_end - segment_start, segment_start))
        self._is_free[start:end] = b"\x01" * run.length
        self.num_free += run.length

    def num_free_in(self, start: int, end: int) -> int:
        """Free blocks among `start ... end - 1`."""
        return self._is_free.count(1, start, end)

    def free_blocks(self) -> list[int]:
        """All free block ids, ascending. O(blocks): for checks."""
        return [block_id for block_id, is_free in enumerate(self._is_free) if is_free]

    def check_integrity(self) -> None:
        """Raises `IntegrityError` if the indexes disagree. O(blocks)."""
        free = self.free_blocks()
        expect_equal("free blocks", len(free), self.num_free)
        segments = sorted((run.length, run.start) for run in runs_of(free))
        expect_equal("segments by length", segments, list(self._by_length))

    def _free_around(self, start: int, end: int) -> tuple[int, int]:
        """Where the free blocks in front of `start` begin, and where those from `end` on end."""
        segment_end = self._is_free.find(0, end)
        return self._is_free.rfind(0, 0, start) + 1, self.num_blocks if segment_end < 0 else segment_end

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


class IntegrityError(AssertionError):
    """The indexes of the KV cache contradict each other: a bug, never a user's fault."""


def expect_equal(what: str, left: object, right: object) -> None:
    """Raises `IntegrityError` that names both sides unless they are equal."""
    if left != right:
        raise IntegrityError(f"{what}: {left!r} != {right!r}")
