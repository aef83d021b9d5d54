from __future__ import annotations

import pytest

from flowkv_common.fingerprint import block_hashes
from flowkv_common.wire.messages import SamplingParams
from tests.drive import make_sequence

EOS = [2]


def test_counts_follow_computation_and_output() -> None:
    sequence = make_sequence([5, 6, 7])
    assert (sequence.num_tokens, sequence.num_new_tokens, sequence.is_prefilling) == (3, 3, True)
    sequence.num_computed_tokens = 3
    sequence.output_ids.append(8)
    assert (sequence.num_new_tokens, sequence.is_prefilling) == (1, False)
    assert sequence.tokens_between(0, sequence.num_tokens) == [5, 6, 7, 8]


@pytest.mark.parametrize("start", range(7))
@pytest.mark.parametrize("stop", range(7))
def test_tokens_between_is_a_slice_of_all_tokens(start: int, stop: int) -> None:
    sequence = make_sequence([1, 2, 3])
    sequence.output_ids += [4, 5, 6]
    if start <= stop:
        assert sequence.tokens_between(start, stop) == [1, 2, 3, 4, 5, 6][start:stop]


def test_block_hashes_grown_bit_by_bit_equal_those_of_the_whole() -> None:
    sequence = make_sequence(list(range(10)))
    assert sequence.full_block_hashes("model", 4) == block_hashes("model", list(range(10)), 4)
    for token_id in range(10, 21):
        sequence.output_ids.append(token_id)
        assert sequence.full_block_hashes("model", 4) == block_hashes("model", list(range(token_id + 1)), 4)


def test_returned_hashes_are_the_callers() -> None:
    sequence = make_sequence(list(range(8)))
    sequence.full_block_hashes("model", 4).clear()
    assert len(sequence.full_block_hashes("model", 4)) == 2


@pytest.mark.parametrize(
    ("sampling", "num_outputs", "token_id", "reason"),
    [
        (SamplingParams(max_tokens=9), 0, 2, "stop"),
        (SamplingParams(max_tokens=9), 0, 3, None),
        (SamplingParams(max_tokens=9, ignore_eos=True), 0, 2, None),
        (SamplingParams(max_tokens=9, min_tokens=3), 2, 2, None),
        (SamplingParams(max_tokens=9, min_tokens=3), 3, 2, "stop"),
        (SamplingParams(max_tokens=9, ignore_eos=True, stop_token_ids=[7, 3]), 0, 3, "stop"),
        (SamplingParams(max_tokens=9, min_tokens=3, stop_token_ids=[3]), 2, 3, None),
        (SamplingParams(max_tokens=9, stop_token_ids=[3]), 0, 2, "stop"),
        (SamplingParams(max_tokens=1), 0, 3, "length"),
        (SamplingParams(max_tokens=1), 0, 2, "stop"),
        (SamplingParams(max_tokens=4), 2, 3, None),
        (SamplingParams(max_tokens=4), 3, 3, "length"),
        (SamplingParams(max_tokens=99), 6, 3, None),
        (SamplingParams(max_tokens=99), 7, 3, "length"),  # of the model: 2 + 7 + 1 tokens
    ],
)
def test_finish_reason(sampling: SamplingParams, num_outputs: int, token_id: int, reason: str | None) -> None:
    sequence = make_sequence([7, 8], sampling=sampling)
    sequence.output_ids += [3] * num_outputs
    assert sequence.finish_reason_after(token_id, EOS, max_model_len=10) == reason
