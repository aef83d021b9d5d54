"""From block ids to runs, and from two lists of block ids to the fewest copies. Pure; knows no pool."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from flowkv_common.wire.parts import Run


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
