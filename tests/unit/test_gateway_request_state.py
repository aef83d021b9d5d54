"""What a request's attempts add up to; which block hashes it carries, and that none is made twice."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from flowkv_common import fingerprint as fingerprint_module
from flowkv_common.fingerprint import block_hashes
from flowkv_common.wire.messages import SamplingParams, TokenChunk, encode
from flowkv_gateway import request_state
from flowkv_gateway.request_state import MAX_HASHES, MAX_HASHES_IN_LOOP, RequestState


def state(prompt_ids: Sequence[int], fingerprint: str = "f") -> RequestState:
    return RequestState("r", list(prompt_ids), SamplingParams(max_tokens=9), 60.0, fingerprint)


def test_no_more_of_a_prompt_is_cached_than_it_has_tokens() -> None:
    """A later attempt finds what the first one has generated in the prefix cache, too."""
    request = state([1, 2, 3])
    request.add_chunk(TokenChunk(request.transfer_id, 0, [4, 5, 6, 7], num_cached_tokens=2))
    assert request.num_cached_tokens == 2
    request.begin_next_attempt("the test says so")
    last = TokenChunk(request.transfer_id, 4, [8], finish_reason="stop", num_cached_tokens=6)
    request.add_chunk(last)
    assert request.num_cached_tokens == 3
    assert request.finished_event().num_cached_tokens == 3


@pytest.fixture
def num_hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks were hashed, call by call."""
    calls: list[int] = []

    def counted(fingerprint: str, ids: Sequence[int], block_size: int, known: Sequence[str]) -> list[str]:
        hashes = block_hashes(fingerprint, ids, block_size, known)
        calls.append(len(hashes) - len(known))
        return hashes

    monkeypatch.setattr(request_state, "block_hashes", counted)
    return calls


async def test_one_hash_for_each_full_block_and_none_made_twice(num_hashed: list[int]) -> None:
    request = state(range(3))
    for num_tokens in (3, 11, 11, 12, 19):
        request.output_ids = list(range(3, num_tokens))
        assert await request.hash_blocks(4, MAX_HASHES) == block_hashes("f", range(num_tokens), 4)
    assert num_hashed == [2, 1, 1]


async def test_another_model_or_block_size_has_other_hashes() -> None:
    request = state(range(8))
    of_f = await request.hash_blocks(4, MAX_HASHES)
    of_g = await state(range(8), "g").hash_blocks(4, MAX_HASHES)
    assert of_g == block_hashes("g", range(8), 4) != of_f
    assert await request.hash_blocks(8, MAX_HASHES) == block_hashes("f", range(8), 8)


async def test_no_hashes_while_no_node_is_known() -> None:
    assert await state(range(8)).hash_blocks(None, MAX_HASHES) == []


@pytest.mark.parametrize(("num_blocks", "is_in_loop"), [(MAX_HASHES_IN_LOOP, True), (1001, False)])
async def test_long_prompts_are_hashed_beside_the_event_loop(
    monkeypatch: pytest.MonkeyPatch, num_blocks: int, is_in_loop: bool
) -> None:
    threads: list[int] = []

    def noted(*args: object) -> list[str]:
        threads.append(threading.get_ident())
        return ["0" * 32] * num_blocks

    monkeypatch.setattr(request_state, "block_hashes", noted)
    await state([0] * num_blocks).hash_blocks(1, MAX_HASHES)
    assert (threads == [threading.get_ident()]) == is_in_loop


async def test_no_more_hashes_are_made_than_a_message_can_carry() -> None:
    request = state(range(40))
    assert await request.hash_blocks(4, 3) == block_hashes("f", range(12), 4)
    request.output_ids = list(range(40, 80))
    assert await request.hash_blocks(4, 3) == block_hashes("f", range(12), 4)


async def test_the_longest_prompt_stays_far_below_the_limit_of_a_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fingerprint_module, "chained_hash", lambda *_: "0" * 32)
    request = state([0] * (4 * MAX_HASHES + 4))
    hashes = await request.hash_blocks(4, 10 * MAX_HASHES)
    assert len(hashes) == MAX_HASHES
    assert len(encode(request.schedule_request(hashes))) < 600_000
