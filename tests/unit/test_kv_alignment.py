"""Runs and copies, case by case."""

from __future__ import annotations

import pytest

from flowkv_common.wire.messages import Run
from flowkv_engine.kv.segments import Copy, align, ids_of, runs_of


def test_equal_runs_are_one_copy() -> None:
    assert align([3, 4, 5], [8, 9, 10]) == [Copy(3, 8, 3)]


def test_a_cut_on_either_side_is_a_cut() -> None:
    assert sorted(align([3, 4, 5, 6], [8, 9, 20, 21])) == [Copy(3, 8, 2), Copy(5, 20, 2)]
    assert sorted(align([3, 4, 9, 10], [5, 6, 7, 8])) == [Copy(3, 5, 2), Copy(9, 7, 2)]


def test_pieces_join_whatever_their_order() -> None:
    assert align([5, 6, 3, 4], [9, 10, 7, 8]) == [Copy(3, 7, 4)]


def test_nothing_is_no_copy_and_unequal_lists_are_refused() -> None:
    assert align([], []) == []
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        align([1, 2], [3])


def test_runs_and_ids() -> None:
    assert runs_of([7, 8, 3, 4, 4]) == [Run(7, 2), Run(3, 2), Run(4, 1)]
    assert ids_of([Run(7, 2), Run(3, 1)]) == [7, 8, 3]
