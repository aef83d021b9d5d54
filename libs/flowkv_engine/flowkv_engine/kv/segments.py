"""How a broken invariant is reported: with both sides of the equation. Knows nothing of what it compares."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from sortedcontainers import SortedList

from flowkv_common.wire.messages import Run


class IntegrityError(AssertionError):
    """The books of the KV cache contradict each other: a bug, never a user's fault."""


def expect_equal(what: str, left: object, right: object) -> None:
    """Raises `IntegrityError` that names both sides unless they are equal."""
    if left != right:
        raise IntegrityError(f"{what}: {left!r} != {right!r}")


class Copy(NamedTuple):
    """A stretch contiguous on both sides: blocks `src ... src + length - 1` go to `dst ...`."""

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
    """Stretches that are contiguous on both sides, in the order of the lists."""
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


_Cut = tuple[Run, Run]  # a segment, and the run that is taken out of it


class Segments:
    """The free blocks among `0 ... num_blocks - 1`. Each operation is O(log n) per run it touches."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = 0
        self._by_length = SortedList()  # (length, start)
        self._length_at: dict[int, int] = {}  # by start
        self._start_before: dict[int, int] = {}  # by end: where the segment starts that ends there
        self._is_free = bytearray(num_blocks)
        if num_blocks:
            self.give(Run(0, num_blocks))

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
        cuts = self._choose(n, like, room)
        for segment, run in cuts:
            self._cut(segment, run)
        return [run for _, run in cuts]

    def plan(self, n: int) -> list[int]:
        """Lengths of the runs that `take(n)` would give now. Raises `ValueError` as `take` does."""
        return [run.length for _, run in self._choose(n, (), 0)]

    def take_after(self, block_id: int) -> int | None:
        """Takes the block behind the taken block `block_id` and returns it, or None if it is not free."""
        following = block_id + 1
        length = self._length_at.get(following)
        if length is None:
            return None
        self._cut(Run(following, length), Run(following, 1))
        return following

    def take_at(self, run: Run) -> None:
        """Takes exactly `run`. Raises `ValueError` if part of it is not free."""
        segment = self.segment_of(run.start)
        if run.start + run.length > segment.start + segment.length:
            raise ValueError(f"{run} is not free: {segment} ends before it")
        self._cut(segment, run)

    def give(self, run: Run) -> None:
        """Frees `run`. Raises `ValueError` if part of it is free already or outside the pool."""
        start, end = run.start, run.start + run.length
        if run.length < 1 or start < 0 or end > self.num_blocks:
            raise ValueError(f"{run} is no run of a pool of {self.num_blocks} blocks")
        if (free := self._is_free.find(1, start, end)) >= 0:
            raise ValueError(f"double free: block {free} of {run} is free")
        self._is_free[start:end] = b"\x01" * run.length
        self.num_free += run.length
        if (start_before := self._start_before.get(start)) is not None:
            self._drop(Run(start_before, start - start_before))
            start = start_before
        if (length_behind := self._length_at.get(end)) is not None:
            self._drop(Run(end, length_behind))
            end += length_behind
        self._add(Run(start, end - start))

    def segment_of(self, block_id: int) -> Run:
        """The segment that holds the free block `block_id`. Raises `ValueError` if it is not free."""
        if not (0 <= block_id < self.num_blocks and self._is_free[block_id]):
            raise ValueError(f"block {block_id} is not free")
        start = self._is_free.rfind(0, 0, block_id) + 1  # a scan of bytes: 100,000 take microseconds
        return Run(start, self._length_at[start])

    def free_blocks(self) -> list[int]:
        """All free block ids, ascending. O(n): for checks."""
        return ids_of(Run(start, length) for start, length in sorted(self._length_at.items()))

    def check_integrity(self) -> None:
        """Raises `IntegrityError` if the indexes disagree or neighbours were not merged."""
        segments = [Run(start, length) for start, length in sorted(self._length_at.items())]
        by_length = sorted((segment.length, segment.start) for segment in segments)
        expect_equal("segments by start and by length", by_length, list(self._by_length))
        by_end = {segment.start + segment.length: segment.start for segment in segments}
        expect_equal("segments by start and by end", by_end, self._start_before)
        marked = [block_id for block_id, is_free in enumerate(self._is_free) if is_free]
        expect_equal("blocks of segments and blocks marked free", ids_of(segments), marked)
        expect_equal("free blocks", len(marked), self.num_free)
        expect_equal("segments, neighbours merged", runs_of(marked), segments)

    # --- choosing --------------------------------------------------------------------------------

    def _choose(self, n: int, like: Sequence[int], room: int) -> list[_Cut]:
        if n > self.num_free:
            raise ValueError(f"{n} blocks wanted, {self.num_free} are free")
        if n < 1:
            return []
        fewest = self._fewest(n, room)
        if len(fewest) == 1 or not like:
            return fewest
        lengths = _fitted(like, n)
        if set(_cuts([run.length for _, run in fewest])) <= set(_cuts(lengths)):
            return fewest  # no copy more than the other side's own cuts cost
        return self._matching(lengths, room) or fewest

    def _fewest(self, n: int, room: int) -> list[_Cut]:
        """Whole segments, longest first, then the smallest one that holds the rest and its room."""
        cuts: list[_Cut] = []
        longest = len(self._by_length) - 1
        while n > self._by_length[longest][0]:
            length, start = self._by_length[longest]
            cuts.append((Run(start, length), Run(start, length)))
            n -= length
            longest -= 1
        # Where no segment has that much room, the longest one left has the most.
        fitting = min(self._by_length.bisect_left((n + room, -1)), longest)
        cuts.append(self._placed(fitting, n, room))
        return cuts

    def _matching(self, lengths: Sequence[int], room: int) -> list[_Cut] | None:
        """One segment of its own for each of `lengths`, or None. Shortest first, each gets its best fit."""
        chosen: dict[int, _Cut] = {}
        index = -1
        for place in sorted(range(len(lengths)), key=lengths.__getitem__):
            index = max(index + 1, self._by_length.bisect_left((lengths[place], -1)))
            if index >= len(self._by_length):
                return None
            is_last = place == len(lengths) - 1
            chosen[place] = self._placed(index, lengths[place], room if is_last else 0)
        return [chosen[place] for place in range(len(lengths))]

    def _placed(self, index: int, n: int, room: int) -> _Cut:
        length, start = self._by_length[index]
        spare = length - n
        return Run(start, length), Run(start + spare - min(room, spare), n)

    # --- bookkeeping -----------------------------------------------------------------------------

    def _cut(self, segment: Run, run: Run) -> None:
        """Takes `run` out of `segment`."""
        end, segment_end = run.start + run.length, segment.start + segment.length
        self._is_free[run.start : end] = bytes(run.length)
        self.num_free -= run.length
        self._drop(segment)
        if segment.start < run.start:
            self._add(Run(segment.start, run.start - segment.start))
        if end < segment_end:
            self._add(Run(end, segment_end - end))

    def _add(self, segment: Run) -> None:
        self._length_at[segment.start] = segment.length
        self._start_before[segment.start + segment.length] = segment.start
        self._by_length.add((segment.length, segment.start))

    def _drop(self, segment: Run) -> None:
        del self._length_at[segment.start]
        del self._start_before[segment.start + segment.length]
        self._by_length.remove((segment.length, segment.start))


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
