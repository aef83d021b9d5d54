"""The counts that the transfer benchmark rests on, exact for each strategy."""

from __future__ import annotations

import pytest

from benchmarks.shapes import SHAPES
from benchmarks.transfers.strategies import STRATEGIES, USED_SHARE, used_pool
from flowkv_engine.kv.segments import Copy, runs_of

NUM_BLOCKS, NUM_POOL_BLOCKS, PIECES = 40, 400, 6


def copies_of(strategy: str, seed: int = 0) -> list[Copy]:
    return STRATEGIES[strategy].copies(NUM_BLOCKS, NUM_POOL_BLOCKS, PIECES, seed)


@pytest.mark.parametrize("strategy", ["layer-one", "layer-batch"])
def test_layer_major_takes_a_copy_per_block_and_piece(strategy: str) -> None:
    assert [copy.length for copy in copies_of(strategy)] == [1] * (NUM_BLOCKS * PIECES)


def test_block_major_takes_a_copy_per_block_and_a_fresh_pool_one() -> None:
    assert [copy.length for copy in copies_of("block")] == [1] * NUM_BLOCKS
    assert [copy.length for copy in copies_of("fresh")] == [NUM_BLOCKS]


@pytest.mark.parametrize("seed", range(3))
def test_each_idea_saves_copies(seed: int) -> None:
    counts = [len(copies_of(strategy, seed)) for strategy in STRATEGIES]
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_block_is_moved_once_to_a_place_of_its_own(strategy: str) -> None:
    unit = PIECES if STRATEGIES[strategy].is_layer_major else 1
    copies = copies_of(strategy)
    for start in ("src", "dst"):
        blocks = [getattr(copy, start) + i for copy in copies for i in range(copy.length)]
        assert len(set(blocks)) == len(blocks) == NUM_BLOCKS * unit
        assert set(blocks) <= set(range(NUM_POOL_BLOCKS * unit))


def test_placements_differ_and_can_be_had_again() -> None:
    for strategy in STRATEGIES:
        assert copies_of(strategy, 1) == copies_of(strategy, 1)
        assert copies_of(strategy, 1) != copies_of(strategy, 2)


def test_a_pool_in_use_has_about_its_share_taken_and_holes() -> None:
    pool = used_pool(NUM_POOL_BLOCKS, seed=1)
    assert 0.5 < 1 - pool.num_free / NUM_POOL_BLOCKS <= USED_SHARE
    assert len(runs_of(pool.free_blocks())) > 1


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_pieces_of_a_block_are_its_bytes(shape: object) -> None:
    assert isinstance(shape, type(SHAPES["llama"]))
    assert shape.piece_layout.block_bytes * shape.pieces_per_block == shape.layout.block_bytes


def test_blocks_have_the_bytes_of_the_models() -> None:
    assert SHAPES["llama"].layout.block_bytes == 2 << 20
    assert SHAPES["smollm2"].layout.block_bytes == 720 << 10
    assert SHAPES["llama"].num_blocks(13_000) == 813
