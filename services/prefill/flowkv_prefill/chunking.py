"""Which prompt tokens go into the next step. Pure: sequences and numbers in, work out."""

from __future__ import annotations

from collections.abc import Iterable

from flowkv_common.engine.batch import WorkItem
from flowkv_common.engine.sequence import Sequence


def plan_chunks(queue: Iterable[Sequence], max_tokens: int, block_size: int) -> list[WorkItem]:
    """First come, first served, at most `max_tokens` tokens in all.

    A chunk that does not end its prompt ends on a block border, so that only whole blocks are handed off
    while later chunks compute.
    """
    chunks: list[WorkItem] = []
    for sequence in queue:
        num_tokens = min(sequence.num_new_tokens, max_tokens)
        if num_tokens < sequence.num_new_tokens:
            end = sequence.num_computed_tokens + num_tokens
            num_tokens -= end % block_size
        if num_tokens <= 0:
            break
        chunks.append(WorkItem(sequence, num_tokens))
        max_tokens -= num_tokens
    return chunks
