"""The simulated pool against a list of prefixes in the order of their use."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.simulator.pool import Lease, Pool
from flowkv.bench.traces import Piece, Request

BLOCKS_PER_ID = 512 // 64
# Each names all before it, as in a trace: two chains of one root, and one of their own.
CHAINS = [(1, 2, 3, 4), (1, 2, 5, 6), (7, 8, 9)]


def whole(*ids: int) -> tuple[Piece, ...]:
    return tuple((key, BLOCKS_PER_ID) for key in ids)


class NaivePool:
    """Pieces in a list, the least recently used first; who uses what in another."""

    def __init__(self, num_blocks: int) -> None:
        self.free = num_blocks
        self.idle: list[Piece] = []
        self.used: list[Piece] = []
        self.grown = 0

    def known(self, key: int) -> Piece | None:
        return next((piece for piece in self.idle + self.used if piece[0] == key), None)

    def take(self, num_blocks: int, pieces: tuple[Piece, ...]) -> Lease | None:
        hits: list[Piece] = []
        num_cached = 0
        for key, num in pieces:
            known = self.known(key)
            if known is None or known[1] < num:
                break
            hits.append(known)
            num_cached += num
        num_own = num_blocks - num_cached
        idle = [piece for piece in self.idle if piece not in hits]
        if num_own > self.free + sum(num for _, num in idle):
            return None
        self.idle = idle
        self.evict_for(num_own)
        self.free -= num_own
        self.used += hits
        return Lease(num_own, [key for key, _ in hits], num_cached)

    def evict_for(self, num_blocks: int) -> None:
        while self.free < num_blocks:
            self.free += self.idle.pop(0)[1]

    def grow(self, num_blocks: int) -> bool:
        """Give back all that has grown, and take it anew; False leaves it as it was."""
        if num_blocks > self.free + self.grown + sum(num for _, num in self.idle):
            return False
        self.free += self.grown
        self.evict_for(num_blocks)
        self.free -= num_blocks
        self.grown = num_blocks
        return True

    def commit(self, lease: Lease, pieces: tuple[Piece, ...]) -> None:
        for key, num in pieces[len(lease.pinned) :]:
            if self.known(key):
                break
            self.used.append((key, num))
            lease.pinned.append(key)
            lease.num_own -= num

    def release(self, lease: Lease) -> None:
        self.free += lease.num_own
        for key in reversed(lease.pinned):
            piece = self.known(key)
            assert piece is not None
            self.used.remove(piece)
            if piece not in self.used:
                self.idle.append(piece)


steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("take"),
            st.sampled_from(CHAINS),
            st.integers(0, 4),
            st.integers(1, BLOCKS_PER_ID),  # of its last id
            st.integers(1, 20),
        ),
        st.tuples(st.just("commit"), st.integers(0, 9)),
        st.tuples(st.just("release"), st.integers(0, 9)),
        st.tuples(st.just("grow"), st.integers(0, 60 * 64)),
    ),
    max_size=40,
)


@given(steps)
def test_blocks_and_prefixes_are_those_of_the_naive_pool(drawn: list[tuple[Any, ...]]) -> None:
    pool, naive = Pool(80, 64), NaivePool(80)
    held: list[tuple[Lease, Lease, tuple[Piece, ...]]] = []
    announced: set[Piece] = set()
    for kind, *args in drawn:
        if kind == "take":
            chain, length, num_last, more = args
            *before, last = chain[:length] or (None,)
            pieces = (*whole(*before), (last, num_last)) if last else ()
            num_tokens = 512 * len(pieces) + 64 * more
            expected = naive.take(num_tokens // 64, pieces)
            assert pool.has_room(num_tokens, pieces) == (expected is not None)
            if expected is not None:
                lease = pool.lease(num_tokens, pieces)
                assert lease == expected
                held.append((lease, expected, pieces))
        elif kind == "grow":
            assert pool.grow_to(args[0]) == naive.grow(args[0] // 64)
        elif held:
            lease, expected, pieces = held[args[0] % len(held)]
            if kind == "commit":
                pool.commit(lease, pieces)
                naive.commit(expected, pieces)
            else:
                pool.release(lease)
                naive.release(expected)
                held.remove((lease, expected, pieces))
        assert pool.num_free == naive.free
        assert pool.num_cached == sum(num for _, num in naive.idle)
        stored, removed = pool.take_news()
        announced = (announced | set(stored)) - set(removed)
        assert announced == set(naive.idle) | set(naive.used)
    for lease, _, _ in held:
        pool.release(lease)
    assert pool.num_free + pool.num_cached + naive.grown == pool.num_blocks
    assert pool.grow_to(0)
    assert pool.num_free + pool.num_cached == pool.num_blocks


def test_sequences_grow_into_what_is_free_and_what_is_cached() -> None:
    pool = Pool(24, 64)
    lease = pool.lease(16 * 64, ())
    pool.commit(lease, whole(1, 2))
    pool.release(lease)
    assert pool.grow_to(8 * 64 + 63)  # a block is taken when it is full: the lease has the one before
    assert (pool.num_free, pool.num_hits(whole(1, 2))) == (0, 2)
    assert pool.grow_to(10 * 64)
    assert (pool.num_free, pool.num_hits(whole(1, 2))) == (6, 1)
    assert not pool.grow_to(25 * 64)
    assert (pool.num_free, pool.num_hits(whole(1, 2))) == (6, 1)  # as it was
    assert pool.grow_to(0)
    assert (pool.num_free, pool.num_cached) == (16, 8)


def test_news_of_what_came_and_went_is_none() -> None:
    pool = Pool(16, 64)
    lease = pool.lease(512, ())
    pool.commit(lease, whole(1))
    pool.release(lease)
    pool.release(pool.lease(1024, ()))
    assert pool.take_news() == ([], [])


def test_the_end_of_a_chain_goes_first() -> None:
    pool = Pool(24, 64)
    lease = pool.lease(24 * 64, ())
    pool.commit(lease, whole(1, 2, 3))
    pool.release(lease)
    pool.release(pool.lease(64, ()))
    assert pool.num_hits(whole(1, 2, 3)) == 2


def test_pieces_are_the_full_blocks_that_ids_name() -> None:
    assert Request(1100, 1, (1, 2, 3)).pieces(64) == [(1, 8), (2, 8), (3, 1)]
    assert Request(1087, 1, (1, 2, 3)).pieces(64) == list(whole(1, 2))
    assert Request(1100, 1, (1,)).pieces(64) == list(whole(1))
    assert Request(63, 1, (1,)).pieces(64) == []
