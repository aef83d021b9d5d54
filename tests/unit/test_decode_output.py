"""What a decode node tells a gateway that asks for output again: in parts that fit into a message."""

from __future__ import annotations

import time

import pytest

from flowkv_common.wire.limits import _OTHER_BYTES
from flowkv_common.wire.messages import Resumed, TokenChunk, TokenLogprob, encode
from flowkv_decode.sequences import KEEP_S, MAX_TOKENS, MAX_TOKENS_WITH_LOGPROBS, Outputs
from tests.drive import make_sequence


def filled(num_tokens: int, logprobs: bool) -> tuple[Outputs, str]:
    """The output of a sequence that has ended: 0 from prefill, then 1, 2, ..."""
    sequence = make_sequence([5, 6])
    sequence.output_ids.append(0)
    outputs, tid = Outputs(), sequence.transfer_id
    outputs.begin(sequence)
    for index in range(1, num_tokens):
        top = [(2**32 - 1, -12.345678901234567)] * 20
        each = [TokenLogprob(token_id=index, logprob=-1.0, top=top)] if logprobs else []
        finish_reason = "length" if index == num_tokens - 1 else None
        outputs.add_chunk(
            TokenChunk(
                transfer_id=tid, index=index, token_ids=[index], logprobs=each, finish_reason=finish_reason
            )
        )
    outputs.end(tid)
    return outputs, tid


@pytest.mark.parametrize(("logprobs", "most"), [(False, MAX_TOKENS), (True, MAX_TOKENS_WITH_LOGPROBS)])
def test_long_output_comes_in_parts_that_fit_into_the_smallest_message(logprobs: bool, most: int) -> None:
    num_tokens = 2 * most + 2
    outputs, tid = filled(num_tokens, logprobs)
    parts: list[TokenChunk] = []
    expected = 1
    while not parts or parts[-1].finish_reason is None:
        chunk = outputs.since(tid, expected)
        assert chunk is not None
        assert chunk.index == expected
        assert len(encode(Resumed(chunk=chunk))) < _OTHER_BYTES
        expected += len(chunk.token_ids)
        parts.append(chunk)
    assert [token_id for part in parts for token_id in part.token_ids] == list(range(1, num_tokens))
    if logprobs:
        assert [one.token_id for part in parts for one in part.logprobs] == list(range(1, num_tokens))
    assert [len(part.token_ids) for part in parts] == [most, most, 1]


def test_what_is_whole_ends_with_its_reason_and_then_is_empty() -> None:
    outputs, tid = filled(3, logprobs=False)
    assert outputs.since(tid, 0) == TokenChunk(
        transfer_id=tid, index=0, token_ids=[0, 1, 2], finish_reason="length"
    )
    last = outputs.since(tid, 3)
    assert last is not None
    assert (last.token_ids, last.finish_reason) == ([], "length")
    again = outputs.since(tid, 3)
    assert again is not None
    assert again.finish_reason == "length"
    assert outputs.since("stranger.0", 0) is None


def test_what_has_failed_gives_what_it_has_and_no_more() -> None:
    """Else a gateway that missed the failure would take each answer for a sign of life."""
    outputs, tid = Outputs(), (sequence := make_sequence([5, 6])).transfer_id
    sequence.output_ids.append(0)
    outputs.begin(sequence)
    outputs.add_chunk(TokenChunk(transfer_id=tid, index=1, token_ids=[1], logprobs=[]))
    running = outputs.since(tid, 2)
    assert running is not None
    assert (running.token_ids, running.finish_reason) == ([], None)
    outputs.end(tid)
    rest = outputs.since(tid, 1)
    assert rest is not None
    assert (rest.token_ids, rest.finish_reason) == ([1], None)
    assert outputs.since(tid, 2) is None


def test_output_is_forgotten_a_while_after_the_end_and_not_before() -> None:
    outputs, ended = filled(3, logprobs=False)
    running, ended_twice = make_sequence([1, 2, 3]), make_sequence([1, 2, 3])
    for sequence in (running, ended_twice):
        sequence.output_ids.append(10)
        outputs.begin(sequence)
    outputs.end(ended_twice.transfer_id)  # failed ...
    outputs.end(ended_twice.transfer_id)  # ... and cancelled
    now = time.monotonic()
    all_three = (running.transfer_id, ended, ended_twice.transfer_id)
    outputs.forget_old(now + 0.9 * KEEP_S)
    assert all(outputs.since(tid, 0) for tid in all_three)
    outputs.forget_old(now + 1.1 * KEEP_S)
    assert [outputs.since(tid, 0) is not None for tid in all_three] == [True, False, False]
    outputs.end(ended_twice.transfer_id)  # its step was stuck for long, and fails only now
