"""Sequences as a node computes them, and one engine step of several of them as plain arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flowkv_common.fingerprint import chained_hash
from flowkv_common.wire.messages import SamplingParams
from flowkv_common.wire.nodes import num_attended
from flowkv_engine.engine.grammar import Matcher
from flowkv_engine.engine.sampler import Sampled, SampleInput, depends_on_output, has_penalties


@dataclass(slots=True, eq=False)
class Sequence:
    """One attempt of a request on a node. Owned by the asyncio loop.

    Tokens `0 .. num_computed_tokens - 1` have their KV in the blocks of `block_table`.
    """

    transfer_id: str  # of the request and the attempt
    gateway_id: str
    prompt_ids: list[int]  # never changed: a running step may hold it
    output_ids: list[int]
    sampling: SamplingParams
    deadline: float  # monotonic seconds
    block_table: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0  # of the computed ones: found in the prefix cache
    num_committed_blocks: int = 0  # of its full blocks: known to the prefix cache
    num_scored_tokens: int = 0  # of the prompt, after the first: their log probabilities are known
    matcher: Matcher | None = field(init=False, repr=False)  # used by the engine's thread alone
    _hashes: list[str] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.matcher = Matcher(self.sampling.grammar) if self.sampling.grammar else None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_new_tokens(self) -> int:
        """Tokens whose KV is still to be computed; 1 while decoding, since the last one always is."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def num_new_attended(self) -> int:
        """`num_attended` of the new tokens."""
        return num_attended(self.num_new_tokens, self.num_computed_tokens)

    @property
    def is_prefilling(self) -> bool:
        return self.num_new_tokens > 1

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """They are asked for, and not all known."""
        is_asked = self.sampling.num_prompt_logprobs is not None
        return is_asked and self.num_scored_tokens < len(self.prompt_ids) - 1

    def tokens_between(self, start: int, stop: int) -> list[int]:
        """`(prompt_ids + output_ids)[start:stop]` without building the whole list."""
        num_prompt = len(self.prompt_ids)
        if start >= num_prompt:
            return self.output_ids[start - num_prompt : stop - num_prompt]
        return self.prompt_ids[start:stop] + self.output_ids[: max(0, stop - num_prompt)]

    def full_block_hashes(self, fingerprint: str, block_size: int) -> list[str]:
        """`block_hashes` of all tokens so far; only blocks that are new get hashed."""
        hashes = self._hashes
        while (len(hashes) + 1) * block_size <= self.num_tokens:
            start = len(hashes) * block_size
            block = self.tokens_between(start, start + block_size)
            hashes.append(chained_hash(fingerprint, hashes[-1] if hashes else None, block))
        return hashes.copy()

    def finish_reason_after(self, token_id: int, eos_ids: list[int], max_model_len: int) -> str | None:
        """Why the request ends if `token_id` is its next output: "stop", "length", or `None` to go on.

        Ask before appending. An EOS, or one of the request's own `stop_token_ids`, counts once `min_tokens`
        outputs stand before it.
        """
        sampling = self.sampling
        num_outputs = len(self.output_ids)
        ends_text = token_id in eos_ids and not sampling.ignore_eos
        if (ends_text or token_id in sampling.stop_token_ids) and num_outputs >= sampling.min_tokens:
            return "stop"
        if num_outputs + 1 >= sampling.max_tokens or self.num_tokens + 1 >= max_model_len:
            return "length"
        return None


class WorkItem(NamedTuple):
    """Compute the next `num_tokens` tokens of `sequence`; if that is all of them, sample one more.

    Then `draft` may follow, guesses of what comes next: each is computed as if it were a token of the
    sequence, and one more is sampled after it.
    """

    sequence: Sequence
    num_tokens: int
    draft: tuple[int, ...] = ()


class _Row(NamedTuple):
    """An item of a `PackedBatch`: places `start .. stop - 1` of a sequence."""

    sequence: Sequence
    start: int
    stop: int
    token_ids: list[int]
    drafted: tuple[int, ...]  # those of the draft up to here


class PromptRows(NamedTuple):
    """Consecutive rows of a batch. Each gives the log probability of the prompt's token after it."""

    item: int  # its place among the work items
    start: int  # the first row
    token_ids: list[int]  # one per row: those after them
    num_top: int  # of the best ones beside each

    def split(self, max_rows: int) -> list[PromptRows]:
        return [
            PromptRows(self.item, self.start + at, self.token_ids[at : at + max_rows], self.num_top)
            for at in range(0, len(self.token_ids), max_rows)
        ]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """N items in one row of T tokens, item after item, S of them to be sampled from.

    Each token of a draft is an item of its own, after that of its sequence: it gets the very logits that a
    step of one token would give it. The loop takes this snapshot, the engine's thread reads it.
    """

    token_ids: NDArray[np.int64]  # [T]
    position_ids: NDArray[np.int64]  # [T]
    slots: NDArray[np.int64]  # [T], block id * block_size + offset: where each token's KV goes
    query_lens: NDArray[np.int32]  # [N], tokens computed in this step
    context_lens: NDArray[np.int32]  # [N], tokens attended to, those of this step included
    block_tables: NDArray[np.int32]  # [N, most blocks of an item], padded with 0
    logits_indices: NDArray[np.int64]  # [S], places in the row
    samples: list[SampleInput | None]  # [N], None: the item does not reach its last token
    prompt_rows: list[PromptRows] = field(default_factory=list)  # of prompts that ask for log probabilities

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
    rows: list[_Row] = []
    prompt_rows: list[PromptRows] = []
    num_packed = 0
    for place, item in enumerate(items):
        if item.sequence.lacks_prompt_logprobs:
            prompt_rows += _prompt_rows(place, item, num_packed)
        rows += _rows(item)
        num_packed += item.num_tokens + len(item.draft)
    query_lens = np.array([row.stop - row.start for row in rows], np.int32)
    context_lens = np.array([row.stop for row in rows], np.int32)
    num_blocks = -(-context_lens // block_size)
    block_tables = np.zeros((len(rows), num_blocks.max()), np.int32)
    for place, (row, length) in enumerate(zip(rows, num_blocks.tolist(), strict=True)):
        sequence = row.sequence
        if len(sequence.block_table) < length:  # a slot outside its own blocks would spoil another sequence
            raise ValueError(
                f"{sequence.transfer_id}: {len(sequence.block_table)} blocks for {row.stop} tokens"
            )
        block_tables[place, :length] = sequence.block_table[:length]
    samples = [_sample_input(row) for row in rows]
    ends = np.cumsum(query_lens, dtype=np.int64)  # of the items in the row
    position_ids = np.arange(ends[-1]) + np.repeat(context_lens - ends, query_lens)
    places = np.repeat(np.arange(len(rows)), query_lens)
    blocks = block_tables[places, position_ids // block_size].astype(np.int64)
    sampled = [sample is not None for sample in samples]
    return PackedBatch(
        token_ids=np.array([token_id for row in rows for token_id in row.token_ids], np.int64),
        position_ids=position_ids,
        slots=blocks * block_size + position_ids % block_size,
        query_lens=query_lens,
        context_lens=context_lens,
        block_tables=block_tables,
        logits_indices=ends[sampled] - 1,
        samples=samples,
        prompt_rows=prompt_rows,
    )


def tokens_that_count(
    items: Iterable[WorkItem], sampled: Iterable[Sampled | None]
) -> Iterator[list[Sampled | None]]:
    """Of each item: what it would get in steps of one token, to the first that its draft has not guessed.

    `sampled`: what the batch of `items` gave.
    """
    given = iter(sampled)
    for item in items:
        first, *others = islice(given, 1 + len(item.draft))
        tokens = [first]
        for guess, drawn in zip(item.draft, others, strict=True):
            if (before := tokens[-1]) is None or before.token_id != guess:
                break
            tokens.append(drawn)
        yield tokens


def _rows(item: WorkItem) -> Iterator[_Row]:
    sequence, num_tokens, draft = item
    start, num_new = sequence.num_computed_tokens, sequence.num_new_tokens
    if not 1 <= num_tokens <= num_new:
        raise ValueError(f"{sequence.transfer_id}: {num_tokens} tokens asked for, {num_new} are new")
    if draft and num_tokens < num_new:
        raise ValueError(f"{sequence.transfer_id}: a draft, but {num_new - num_tokens} tokens before it")
    stop = start + num_tokens
    yield _Row(sequence, start, stop, sequence.tokens_between(start, stop), ())
    for place, token_id in enumerate(draft, 1):
        yield _Row(sequence, stop + place - 1, stop + place, [token_id], draft[:place])


def _sample_input(row: _Row) -> SampleInput | None:
    sequence, sampling = row.sequence, row.sequence.sampling
    if row.stop < sequence.num_tokens:
        return None
    needs_output = depends_on_output(sampling) or sequence.matcher is not None
    return SampleInput(
        sampling=sampling,
        output_index=len(sequence.output_ids) + len(row.drafted),
        prompt_ids=sequence.prompt_ids if has_penalties(sampling) else [],
        output_ids=[*sequence.output_ids, *row.drafted] if needs_output else [],
        matcher=sequence.matcher,
        is_drafted=bool(row.drafted),
    )


def _prompt_rows(place: int, item: WorkItem, row: int) -> list[PromptRows]:
    """What is asked of a chunk that begins in `row` of the batch."""
    sequence, begin = item.sequence, item.sequence.num_computed_tokens
    first = max(begin, sequence.num_scored_tokens)
    end = min(begin + item.num_tokens, len(sequence.prompt_ids) - 1)
    if first >= end:
        return []
    token_ids = sequence.prompt_ids[first + 1 : end + 1]
    return [PromptRows(place, row + first - begin, token_ids, sequence.sampling.num_prompt_logprobs or 0)]
