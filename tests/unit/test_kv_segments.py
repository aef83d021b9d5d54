"""Which run an allocator chooses, case by case."""

from __future__ import annotations

import pytest

from flowkv_common.wire.messages import Run
from flowkv_engine.kv.segments import Segments


def segments_with(num_blocks: int, *free: Run) -> Segments:
    """Segments of which exactly `free` are free."""
    segments = Segments(num_blocks)
    segments.take_runs(num_blocks)
    for run in free:
        segments.free_run(run)
    segments.check_integrity()
    return segments


def lengths(runs: list[Run]) -> list[int]:
    return [run.length for run in runs]


def test_takes_the_smallest_segment_that_fits() -> None:
    segments = segments_with(40, Run(0, 10), Run(12, 4), Run(20, 6))
    assert segments.take_runs(4) == [Run(12, 4)]
    assert segments.take_runs(5) == [Run(21, 5)]


def test_without_a_fit_takes_as_few_runs_as_possible_largest_first() -> None:
    segments = segments_with(40, Run(0, 2), Run(5, 6), Run(12, 4), Run(20, 3))
    assert lengths(segments.take_runs(9)) == [6, 3]
    assert segments.take_runs(3) == [Run(13, 3)]


def test_plan_is_what_take_runs_gives_and_changes_nothing() -> None:
    segments = segments_with(40, Run(0, 2), Run(5, 6), Run(12, 4))
    plan = segments.plan_runs(11)
    assert segments.num_free == 12
    assert plan == lengths(segments.take_runs(11)) == [6, 4, 1]


@pytest.mark.parametrize(
    ("like", "expected"), [([3, 4], [3, 4]), ([4, 3], [4, 3]), ([7], [5, 2]), ([], [5, 2])]
)
def test_cuts_where_the_other_side_is_cut(like: list[int], expected: list[int]) -> None:
    segments = segments_with(40, Run(0, 5), Run(10, 3), Run(20, 1))
    assert lengths(segments.take_runs(7, like)) == expected


def test_one_run_needs_no_more_copies_than_the_other_sides_runs() -> None:
    segments = segments_with(40, Run(0, 3), Run(5, 4), Run(20, 10))
    assert segments.take_runs(7, like=[3, 4]) == [Run(23, 7)]


def test_like_may_be_too_short_too_long_or_senseless() -> None:
    for like in ([2], [3, 40], [0, -1, 3, 4]):
        segments = segments_with(40, Run(0, 5), Run(10, 3))
        assert sum(lengths(segments.take_runs(7, like))) == 7


def test_room_stays_behind_each_sequence() -> None:
    segments = Segments(32)
    first, second = segments.take_runs(4, room=4)[0], segments.take_runs(4, room=4)[0]
    for run in (first, second):
        last = run.start + run.length - 1
        for _ in range(4):
            grown = segments.take_after(last)
            assert grown == last + 1
            last = grown


def test_without_enough_room_anywhere_takes_what_room_there_is() -> None:
    segments = segments_with(40, Run(0, 5), Run(10, 3))
    assert segments.take_runs(3, room=9) == [Run(0, 3)]


def test_grows_into_the_next_block_only_if_it_is_free() -> None:
    segments = segments_with(10, Run(4, 2))
    assert [segments.take_after(3), segments.take_after(4), segments.take_after(5)] == [4, 5, None]
    assert segments.take_after(9) is None


def test_takes_a_run_by_its_place_if_all_of_it_is_free() -> None:
    segments = segments_with(10, Run(2, 6))
    segments.take_run(Run(4, 2))
    assert segments.free_blocks() == [2, 3, 6, 7]
    for wrong in (Run(3, 2), Run(4, 1), Run(7, 2), Run(10, 1)):
        with pytest.raises(ValueError, match="not free"):
            segments.take_run(wrong)
    segments.check_integrity()


def test_neighbours_merge() -> None:
    segments = segments_with(10, Run(0, 3), Run(6, 4))
    segments.free_run(Run(3, 3))
    assert (segments.longest_run, segments.num_free) == (10, 10)


@pytest.mark.parametrize("run", [Run(2, 1), Run(1, 2), Run(3, 4), Run(9, 2), Run(-1, 1), Run(5, 0)])
def test_refuses_to_free_what_is_free_or_foreign(run: Run) -> None:
    segments = segments_with(10, Run(2, 2))
    with pytest.raises(ValueError, match="Run"):
        segments.free_run(run)
    segments.check_integrity()


def test_refuses_to_take_more_than_there_is() -> None:
    segments = segments_with(10, Run(2, 2))
    with pytest.raises(ValueError, match="3 blocks wanted, 2 are free"):
        segments.take_runs(3)
    assert segments.take_runs(0) == []
