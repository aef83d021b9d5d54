"""Where a request's blocks lie on both sides, and which copies that makes. Pure, and the same for each seed.

The strategies take the paper's ideas one after the other; each adds to the one before.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flowkv_common.wire.messages import Run
from flowkv_engine.kv.segments import Copy, Segments, align, ids_of

# A pool in use: this share of the blocks is taken by other requests, of so many blocks each.
USED_SHARE = 0.75
_OTHERS_BLOCKS = (4, 96)
_GROWTH_ROOM = 8
# Others come and go until each block has been given out about that often.
_TURNOVERS = 10

Place = Callable[[int, int, int], list[Copy]]


@dataclass(frozen=True)
class Strategy:
    """`place(num_blocks, num_pool_blocks, seed)` gives copies in blocks of a block-major pool."""

    title: str
    place: Place
    is_layer_major: bool = False
    is_one_by_one: bool = False

    def copies(self, num_blocks: int, num_pool_blocks: int, pieces_per_block: int, seed: int) -> list[Copy]:
        """The copies of one request; a layer-major strategy's are in pieces."""
        copies = self.place(num_blocks, num_pool_blocks, seed)
        return _layer_major(copies, num_pool_blocks, pieces_per_block) if self.is_layer_major else copies


def _scattered(num_blocks: int, num_pool_blocks: int, seed: int) -> list[Copy]:
    """Blocks as a free list gives them out after a while: anywhere, one by one."""
    rng = random.Random(seed)
    src, dst = (rng.sample(range(num_pool_blocks), num_blocks) for _ in range(2))
    return [Copy(here, there, 1) for here, there in zip(src, dst, strict=True)]


def _allocated(num_blocks: int, num_pool_blocks: int, seed: int) -> list[Copy]:
    src = _used_pool(num_pool_blocks, 2 * seed).take_runs(num_blocks)
    dst = _used_pool(num_pool_blocks, 2 * seed + 1).take_runs(num_blocks)
    return align(ids_of(src), ids_of(dst))


def _aligned(num_blocks: int, num_pool_blocks: int, seed: int) -> list[Copy]:
    src = _used_pool(num_pool_blocks, 2 * seed).take_runs(num_blocks)
    dst = _used_pool(num_pool_blocks, 2 * seed + 1).take_runs(num_blocks, [run.length for run in src])
    return align(ids_of(src), ids_of(dst))


def _fresh(num_blocks: int, num_pool_blocks: int, seed: int) -> list[Copy]:
    """In an empty pool, at another place for each seed."""
    start = random.Random(seed).randrange(num_pool_blocks - num_blocks + 1)
    return [Copy(start, num_pool_blocks - num_blocks - start, num_blocks)]


STRATEGIES = {
    "layer-one": Strategy("layer-major, one call per piece", _scattered, True, True),
    "layer-batch": Strategy("layer-major, all pieces in one batch", _scattered, True),
    "block": Strategy("block-major, scattered blocks", _scattered),
    "segments": Strategy("+ segment allocator, 75 % in use", _allocated),
    "aligned": Strategy("+ two-sided alignment, 75 % in use", _aligned),
    "fresh": Strategy("+ two-sided alignment, fresh pool", _fresh),
}


def _layer_major(copies: Sequence[Copy], num_pool_blocks: int, pieces_per_block: int) -> list[Copy]:
    """The pieces of the copied blocks in a pool of [pieces_per_block, num_pool_blocks] pieces."""
    return [
        Copy(plane * num_pool_blocks + src + i, plane * num_pool_blocks + dst + i, 1)
        for plane in range(pieces_per_block)
        for src, dst, length in copies
        for i in range(length)
    ]


def _used_pool(num_blocks: int, seed: int) -> Segments:
    """A pool in which requests have come and gone; `USED_SHARE` of it is taken."""
    rng = random.Random(seed)
    segments = Segments(num_blocks)
    others: list[list[Run]] = []
    num_given_out = 0
    while num_given_out < _TURNOVERS * num_blocks:
        wanted = rng.randint(*_OTHERS_BLOCKS)
        while num_blocks - segments.num_free + wanted > USED_SHARE * num_blocks:
            for run in others.pop(rng.randrange(len(others))):
                segments.free_run(run)
        others.append(segments.take_runs(wanted, room=_GROWTH_ROOM))
        num_given_out += wanted
    return segments
