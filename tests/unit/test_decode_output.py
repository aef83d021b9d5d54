"""What recent sequences have said can be asked for again, for a while."""

from __future__ import annotations

import time

from drive import make_sequence

from flowkv_common.wire.messages import TokenChunk
from flowkv_decode.output import KEEP_S, Outputs


def said(outputs: Outputs, num_tokens: int) -> str:
    """A sequence that comes with token 10 and goes on with 11, 12 ..., its transfer id."""
    sequence = make_sequence([1, 2, 3])
    sequence.output_ids.append(10)
    outputs.open(sequence)
    for index in range(1, num_tokens):
        outputs.add(TokenChunk(transfer_id=sequence.transfer_id, index=index, token_ids=[10 + index]))
    return sequence.transfer_id


def test_output_is_given_again_from_any_index() -> None:
    outputs = Outputs()
    tid = said(outputs, 4)
    for index in range(5):
        chunk = outputs.since(tid, index)
        assert chunk is not None
        assert (chunk.index, chunk.token_ids) == (index, [10, 11, 12, 13][index:])
    assert outputs.since("another.0", 0) is None


def test_output_is_forgotten_a_while_after_the_end_and_not_before() -> None:
    outputs = Outputs()
    running, ended, ended_twice = (said(outputs, 2) for _ in range(3))
    outputs.end(ended)
    outputs.end(ended_twice)  # failed ...
    outputs.end(ended_twice)  # ... and cancelled
    now = time.monotonic()
    outputs.forget_old(now + 0.9 * KEEP_S)
    assert all(outputs.since(tid, 0) for tid in (running, ended, ended_twice))
    outputs.forget_old(now + 1.1 * KEEP_S)
    assert [outputs.since(tid, 0) is not None for tid in (running, ended, ended_twice)] == [
        True,
        False,
        False,
    ]
