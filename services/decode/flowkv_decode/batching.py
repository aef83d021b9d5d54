"""Which sequences run, and who gives way when blocks run out. Pure: no clock, no I/O, no blocks.

Continuous batching: the batch is formed anew before every step.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered

from flowkv_common.engine.batch import WorkItem
from flowkv_common.engine.sequence import Sequence


def num_missing_blocks(sequence: Sequence, block_size: int) -> int:
    """Blocks that the sequence lacks for all the tokens it has, the newest included."""
    return max(0, -(-sequence.num_tokens // block_size) - len(sequence.block_table))


def pick_victim(running: Ordered[Sequence]) -> Sequence:
    """Who is preempted: the one that came last, so that the oldest always proceed."""
    return running[-1]


def decode_items(running: Ordered[Sequence]) -> list[WorkItem]:
    """One token for each sequence that has only its newest token to compute."""
    return [WorkItem(sequence, 1) for sequence in running if not sequence.is_prefilling]


def recompute_items(running: Ordered[Sequence], max_tokens: int) -> list[WorkItem]:
    """Chunks of the sequences that lost their KV to a preemption, oldest first."""
    items = []
    for sequence in running:
        if sequence.is_prefilling and max_tokens > 0:
            num_tokens = min(sequence.num_new_tokens, max_tokens)
            items.append(WorkItem(sequence, num_tokens))
            max_tokens -= num_tokens
    return items
