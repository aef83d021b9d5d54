"""Where a request's blocks lie on both sides, and which copies that makes. The same for each seed.

The strategies take the paper's ideas one after the other; each adds to the one before.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from flowkv_common.wire.messages import Run
from flowkv_engine.kv.segments import Copy, Segments, align, ids_of

# A pool in use: this share of the blocks is taken by other requests, of so many blocks each.
USED_SHARE = 0.75
OTHERS_BLOCKS = (4, 96)
GROWTH_ROOM = 8
# Others come and go until each block has been given out about that often.
TURNOVERS = 10


@dataclass(frozen=True)
class Strategy:
    """`place(num_blocks, num_pool_blocks, seed)` gives copies in blocks of a block-major pool."""

    title: str
    place: Callable[[int, int, int], list[Copy]]
    is_layer_major: bool = False
    is_one_by_one: bool = False

    def copies(self, num_blocks: int, num_pool_blocks: int, pieces_per_block: int, seed: int) -> list[Copy]:
        """The copies of one request. A layer-major pool has [pieces_per_block, num_pool_blocks] pieces."""
        copies = self.place(num_blocks, num_pool_blocks, seed)
        if not self.is_layer_major:
            return copies
        return [
            Copy(plane * num_pool_blocks + src + i, plane * num_pool_blocks + dst + i, 1)
            for plane in range(pieces_per_block)
            for src, dst, length in copies
            for i in range(length)
        ]


def scattered(num_blocks: int, num_pool_blocks: int, seed: int) -> list[Copy]:
    """Blocks as a free list gives them out after a while: anywhere, one by one."""
    rng = random.Random(seed)
    src, dst = (rng.sample(range(num_pool_blocks), num_blocks) for _ in range(2))
    return [Copy(here, there, 1) for here, there in zip(src, dst, strict=True)]


def allocated(num_blocks: int, num_pool_blocks: int, seed: int, is_told: bool = False) -> list[Copy]:
    """By the segments of two pools in use; with `is_told` the receiver takes runs like the sender's."""
    src = used_pool(num_pool_blocks, 2 * seed).take_runs(num_blocks)
    like = [run.length for run in src] if is_told else []
    dst = used_pool(num_pool_blocks, 2 * seed + 1).take_runs(num_blocks, like)
    return align(ids_of(src), ids_of(dst))


def fresh(num_blocks: int, num_pool_blocks: int, seed: int) -> list[Copy]:
    """In an empty pool, at another place for each seed."""
    start = random.Random(seed).randrange(num_pool_blocks - num_blocks + 1)
    return [Copy(start, num_pool_blocks - num_blocks - start, num_blocks)]


STRATEGIES = {
    "layer-one": Strategy("layer-major, one call per piece", scattered, True, True),
    "layer-batch": Strategy("layer-major, all pieces in one batch", scattered, True),
    "block": Strategy("block-major, scattered blocks", scattered),
    "segments": Strategy("+ segment allocator, 75 % in use", allocated),
    "aligned": Strategy("+ two-sided alignment, 75 % in use", partial(allocated, is_told=True)),
    "fresh": Strategy("+ two-sided alignment, fresh pool", fresh),
}


def used_pool(num_blocks: int, seed: int) -> Segments:
    """A pool in which requests have come and gone; `USED_SHARE` of it is taken."""
    rng = random.Random(seed)
    segments = Segments(num_blocks)
    others: list[list[Run]] = []
    num_given_out = 0
    while num_given_out < TURNOVERS * num_blocks:
        wanted = rng.randint(*OTHERS_BLOCKS)
        while num_blocks - segments.num_free + wanted > USED_SHARE * num_blocks:
            for run in others.pop(rng.randrange(len(others))):
                segments.free_run(run)
        others.append(segments.take_runs(wanted, room=GROWTH_ROOM))
        num_given_out += wanted
    return segments
