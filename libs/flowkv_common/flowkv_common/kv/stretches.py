"""Idle blocks in the order in which a cache gives them up, many at a time. Knows no hashes."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence

from flowkv_common.kv.integrity import expect_equal
from flowkv_common.wire.parts import Run

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
