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
    starts = np.array([item.sequence.num_computed_tokens for item in items], np.int32)
    context_lens = starts + query_lens
    for item, context_len in zip(items, context_lens.tolist(), strict=True):
        _check(item, context_len, block_size)

    position_ids = np.concatenate(
        [np.arange(start, stop) for start, stop in zip(starts.tolist(), context_lens.tolist(), strict=True)]
    )
    block_tables = _block_tables(items, context_lens, block_size)
    rows = np.repeat(np.arange(len(items)), query_lens)
    blocks = block_tables[rows, position_ids // block_size].astype(np.int64)
    samples = [_sample_input(item) for item in items]
    sampled = np.array([sample is not None for sample in samples])
    return PackedBatch(
        token_ids=_token_ids(items),
        position_ids=position_ids,
        slots=blocks * block_size + position_ids % block_size,
        query_lens=query_lens,
        context_lens=context_lens,
        block_tables=block_tables,
        logits_indices=np.cumsum(query_lens, dtype=np.int64)[sampled] - 1,
        samples=samples,
    )


def _check(item: WorkItem, context_len: int, block_size: int) -> None:
    """A slot outside its own blocks would spoil another sequence: better to fail here."""
    sequence = item.sequence
    if not 1 <= item.num_tokens <= sequence.num_new_tokens:
        raise ValueError(
            f"{sequence.transfer_id}: {item.num_tokens} tokens asked for, {sequence.num_new_tokens} are new"
        )
    if len(sequence.block_table) * block_size < context_len:
        raise ValueError(
            f"{sequence.transfer_id}: {len(sequence.block_table)} blocks for {context_len} tokens"
        )


def _token_ids(items: list[WorkItem]) -> NDArray[np.int64]:
    token_ids: list[int] = []
    for sequence, num_tokens in items:
        start = sequence.num_computed_tokens
        token_ids += sequence.tokens_between(start, start + num_tokens)
    return np.array(token_ids, np.int64)


def _block_tables(
    items: list[WorkItem], context_lens: NDArray[np.int32], block_size: int
) -> NDArray[np.int32]:
    num_blocks = (-(-context_lens // block_size)).tolist()
    tables = np.zeros((len(items), max(num_blocks)), np.int32)
    for row, item, length in zip(tables, items, num_blocks, strict=True):
        row[:length] = item.sequence.block_table[:length]
    return tables


def _sample_input(item: WorkItem) -> SampleInput | None:
    sequence, num_tokens = item
    if num_tokens < sequence.num_new_tokens:
        return None
    penalized = has_penalties(sequence.sampling)
    return SampleInput(
        sampling=sequence.sampling,
        output_index=sequence.next_output_index,
        prompt_ids=sequence.prompt_ids if penalized else [],
        output_ids=sequence.output_ids.copy() if penalized else [],
    )
