"""From block ids to runs, and from two lists of block ids to the fewest copies. Pure; knows no pool."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from flowkv_common.wire.messages import Run


class Copy(NamedTuple):
    """A stretch contiguous on both sides: blocks `src ... src + length - 1` go to `dst ...`."""

    src: int
    dst: int
    length: int


def align(src: Sequence[int], dst: Sequence[int]) -> list[Copy]:
    """The fewest copies that bring block `src[i]` to `dst[i]` for every `i`.

    Raises `ValueError` if the lists differ in length.
    """
    # Blocks belong to one copy exactly when they keep their distance and follow each other.
    by_distance = sorted((there - here, here) for here, there in zip(src, dst, strict=True))
    copies: list[Copy] = []
    for distance, here in by_distance:
        last = copies[-1] if copies else None
        if last and last.src + last.length == here and last.dst - last.src == distance:
            copies[-1] = last._replace(length=last.length + 1)
        else:
            copies.append(Copy(here, here + distance, 1))
    return copies


def runs_of(block_ids: Iterable[int]) -> list[Run]:
    """The runs of a block table, in its order: `[7, 8, 3]` is `[Run(7, 2), Run(3, 1)]`."""
    runs: list[Run] = []
    for block_id in block_ids:
        if runs and runs[-1].start + runs[-1].length == block_id:
            runs[-1] = Run(runs[-1].start, runs[-1].length + 1)
        else:
            runs.append(Run(block_id, 1))
    return runs


def ids_of(runs: Iterable[Run]) -> list[int]:
    """The block ids of `runs`, in order: the inverse of `runs_of`."""
    return [block_id for run in runs for block_id in range(run.start, run.start + run.length)]
