"""One engine step's work as plain arrays: a snapshot taken by the loop, read by the engine thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flowkv_engine.engine.sampler import SampleInput, has_penalties
from flowkv_engine.engine.sequence import Sequence


class WorkItem(NamedTuple):
    """Compute the next `num_tokens` tokens of `sequence`; if that is all of them, sample one more."""

    sequence: Sequence
    num_tokens: int


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """N items in one row of T tokens, item after item, S of them to be sampled from."""

    token_ids: NDArray[np.int64]  # [T]
    position_ids: NDArray[np.int64]  # [T]
    slots: NDArray[np.int64]  # [T], block id * block_size + offset: where each token's KV goes
    query_lens: NDArray[np.int32]  # [N], tokens computed in this step
    context_lens: NDArray[np.int32]  # [N], tokens attended to, those of this step included
    block_tables: NDArray[np.int32]  # [N, most blocks of an item], padded with 0
    logits_indices: NDArray[np.int64]  # [S], places in the row
    samples: list[SampleInput | None]  # [N], None: the item does not reach its last token

    @property
    def query_starts(self) -> NDArray[np.int32]:
        """Where each item begins in the row, and T at the end: [N + 1], int32."""
        starts = np.zeros(len(self.query_lens) + 1, np.int32)
        np.cumsum(self.query_lens, out=starts[1:])
        return starts

    @property
    def decode_lens(self) -> NDArray[np.int32]:
        """Context lengths of the items of one token, 0 of the others: [N], int32."""
        return np.where(self.query_lens == 1, self.context_lens, np.int32(0))


def pack(items: list[WorkItem], block_size: int) -> PackedBatch:
    """The batch of `items`, in their order. Raises `ValueError` if one has too few tokens or blocks."""
    query_lens = np.array([item.num_tokens for item in items], np.int32)
    context_lens = np.array([item.sequence.num_computed_tokens for item in items], np.int32) + query_lens
    num_blocks = -(-context_lens // block_size)
    block_tables = np.zeros((len(items), num_blocks.max()), np.int32)
    token_ids: list[int] = []
    samples: list[SampleInput | None] = []
    for row, (sequence, num_tokens) in enumerate(items):
        if not 1 <= num_tokens <= sequence.num_new_tokens:
            raise ValueError(
                f"{sequence.transfer_id}: {num_tokens} tokens asked for, {sequence.num_new_tokens} are new"
            )
        stop, length = int(context_lens[row]), int(num_blocks[row])
        if len(sequence.block_table) < length:  # a slot outside its own blocks would spoil another sequence
            raise ValueError(f"{sequence.transfer_id}: {len(sequence.block_table)} blocks for {stop} tokens")
        block_tables[row, :length] = sequence.block_table[:length]
        token_ids += sequence.tokens_between(sequence.num_computed_tokens, stop)
        if num_tokens < sequence.num_new_tokens:
            samples.append(None)
            continue
        sampling = sequence.sampling
        penalized = has_penalties(sampling)
        samples.append(
            SampleInput(
                sampling=sampling,
                output_index=len(sequence.output_ids),
                prompt_ids=sequence.prompt_ids if penalized else [],
                output_ids=sequence.output_ids.copy() if penalized else [],
            )
        )
    ends = np.cumsum(query_lens, dtype=np.int64)  # of the items in the row
    position_ids = np.arange(ends[-1]) + np.repeat(context_lens - ends, query_lens)
    rows = np.repeat(np.arange(len(items)), query_lens)
    blocks = block_tables[rows, position_ids // block_size].astype(np.int64)
    sampled = [sample is not None for sample in samples]
    return PackedBatch(
        token_ids=np.array(token_ids, np.int64),
        position_ids=position_ids,
        slots=blocks * block_size + position_ids % block_size,
        query_lens=query_lens,
        context_lens=context_lens,
        block_tables=block_tables,
        logits_indices=ends[sampled] - 1,
        samples=samples,
    )
