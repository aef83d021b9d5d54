"""Alignment against brute force."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flowkv_engine.kv.segments import align, ids_of, runs_of

NUM_BLOCKS = 12

block_ids = st.lists(st.integers(0, NUM_BLOCKS - 1), unique=True)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two block tables of equal length, each without repeats; runs are likely."""
    length = draw(st.integers(0, NUM_BLOCKS))
    return _table(draw, length), _table(draw, length)


def _table(draw: st.DrawFn, length: int) -> list[int]:
    cuts = sorted(draw(st.sets(st.integers(1, NUM_BLOCKS - 1), max_size=3)))
    bounds = list(zip([0, *cuts], [*cuts, NUM_BLOCKS], strict=True))
    return [block for begin, end in draw(st.permutations(bounds)) for block in range(begin, end)][:length]


def fewest_copies(pairs: frozenset[tuple[int, int]]) -> int:
    """Tries every way to peel contiguous stretches off, the longest one from each beginning."""
    beginnings = [(src, dst) for src, dst in pairs if (src - 1, dst - 1) not in pairs]
    num_copies = 0
    for src, dst in beginnings:
        num_copies += 1
        while (src, dst) in pairs:
            pairs -= {(src, dst)}
            src, dst = src + 1, dst + 1
    assert not pairs
    return num_copies


@given(tables())
def test_copies_move_every_block_to_its_place_and_are_the_fewest(both: tuple[list[int], list[int]]) -> None:
    src, dst = both
    copies = align(src, dst)
    moved = [(copy.src + i, copy.dst + i) for copy in copies for i in range(copy.length)]
    wanted = list(zip(src, dst, strict=True))
    assert sorted(moved) == sorted(wanted)
    assert len(copies) == fewest_copies(frozenset(wanted))


@given(tables())
def test_never_more_copies_than_the_cuts_of_both_sides(both: tuple[list[int], list[int]]) -> None:
    src, dst = both
    if src:
        assert len(align(src, dst)) <= len(runs_of(src)) + len(runs_of(dst)) - 1


@given(block_ids)
def test_runs_and_ids_are_inverse(ids: list[int]) -> None:
    runs = runs_of(ids)
    assert ids_of(runs) == ids
    assert all(a.start + a.length != b.start for a, b in zip(runs, runs[1:], strict=False))
