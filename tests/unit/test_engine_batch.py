from __future__ import annotations

from typing import Any

import pytest

from flowkv_common.wire.messages import SamplingParams
from flowkv_engine.engine.batch import WorkItem, pack
from tests.drive import make_sequence


def test_packs_decode_chunk_and_last_chunk() -> None:
    decoding = make_sequence([10, 11, 12], [7])
    decoding.num_computed_tokens = 3
    decoding.output_ids.append(13)
    chunk = make_sequence([20, 21, 22, 23, 24, 25], [5, 2])
    last_chunk = make_sequence([30, 31, 32, 33, 34, 35], [9, 0])
    last_chunk.num_computed_tokens = 3

    batch = pack([WorkItem(decoding, 1), WorkItem(chunk, 2), WorkItem(last_chunk, 3)], block_size=4)

    assert batch.token_ids.tolist() == [13, 20, 21, 33, 34, 35]
    assert batch.position_ids.tolist() == [3, 0, 1, 3, 4, 5]
    assert batch.slots.tolist() == [31, 20, 21, 39, 0, 1]
    assert batch.query_lens.tolist() == [1, 2, 3]
    assert batch.context_lens.tolist() == [4, 2, 6]
    assert batch.query_starts.tolist() == [0, 1, 3, 6]
    assert batch.block_tables.tolist() == [[7, 0], [5, 0], [9, 0]]
    assert batch.logits_indices.tolist() == [0, 5]
    assert [sample is not None for sample in batch.samples] == [True, False, True]


@pytest.mark.parametrize("asked", [{"frequency_penalty": 1.0}, {"bad_words": [[7, 8]]}])
def test_is_a_snapshot(asked: dict[str, Any]) -> None:
    sequence = make_sequence([1, 2], [3], SamplingParams(max_tokens=9, **asked))
    sequence.output_ids.append(4)
    batch = pack([WorkItem(sequence, 3)], block_size=4)
    sequence.output_ids.append(5)
    sequence.block_table[0] = 8
    sample = batch.samples[0]
    assert sample is not None
    assert (sample.output_ids, sample.output_index, batch.slots.tolist()) == ([4], 1, [12, 13, 14])


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_refuses_tokens_that_are_not_there(num_tokens: int) -> None:
    with pytest.raises(ValueError, match="tokens asked for"):
        pack([WorkItem(make_sequence([1, 2], [0]), num_tokens)], block_size=4)


def test_refuses_a_block_table_that_is_too_short() -> None:
    with pytest.raises(ValueError, match="1 blocks for 5 tokens"):
        pack([WorkItem(make_sequence([1, 2, 3, 4, 5], [0]), 5)], block_size=4)
