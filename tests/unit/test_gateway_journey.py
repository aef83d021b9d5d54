"""What a request's attempts add up to."""

from __future__ import annotations

from flowkv_common.wire.messages import SamplingParams, TokenChunk
from flowkv_gateway.dispatch import Generation, Journey


def test_no_more_of_a_prompt_is_cached_than_it_has_tokens() -> None:
    """A later attempt finds what the first one has generated in the prefix cache, too."""
    journey = Journey(Generation("r", [1, 2, 3], SamplingParams(max_tokens=9), 60.0, fingerprint="f"))
    first = journey.take(TokenChunk(journey.transfer_id, 0, [4, 5, 6, 7], num_cached_tokens=2))
    journey.next_attempt()
    second = journey.take(TokenChunk(journey.transfer_id, 4, [8], finish_reason="stop", num_cached_tokens=6))
    assert [first.num_cached_tokens, second.num_cached_tokens] == [2, 3]
    assert journey.finished().num_cached_tokens == 3
