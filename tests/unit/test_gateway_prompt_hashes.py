"""Which block hashes a request carries, and that none is made twice."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from flowkv_common.wire import hashing
from flowkv_common.wire.hashing import block_hashes
from flowkv_common.wire.messages import ScheduleRequest, encode
from flowkv_gateway import cluster as prompt_hashes
from flowkv_gateway.cluster import MAX_HASHES, MAX_HASHES_IN_LOOP, HashBasis, PromptHashes

BASIS = HashBasis("f", 4)


@pytest.fixture
def num_hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks were hashed, call by call."""
    calls: list[int] = []

    def counted(fingerprint: str, ids: Sequence[int], block_size: int, known: Sequence[str]) -> list[str]:
        hashes = block_hashes(fingerprint, ids, block_size, known)
        calls.append(len(hashes) - len(known))
        return hashes

    monkeypatch.setattr(prompt_hashes, "block_hashes", counted)
    return calls


async def test_one_hash_for_each_full_block_and_none_made_twice(num_hashed: list[int]) -> None:
    hashes = PromptHashes()
    for num_tokens in (3, 11, 11, 12, 19):
        token_ids = list(range(num_tokens))
        assert await hashes.of(token_ids, BASIS) == block_hashes("f", token_ids, 4)
    assert num_hashed == [2, 1, 1]


async def test_another_model_has_other_hashes() -> None:
    hashes = PromptHashes()
    await hashes.of(list(range(8)), BASIS)
    assert await hashes.of(list(range(8)), HashBasis("g", 4)) == block_hashes("g", list(range(8)), 4)
    assert await hashes.of(list(range(8)), HashBasis("g", 8)) == block_hashes("g", list(range(8)), 8)


@pytest.mark.parametrize(("num_blocks", "is_in_loop"), [(MAX_HASHES_IN_LOOP, True), (1001, False)])
async def test_long_prompts_are_hashed_beside_the_event_loop(
    monkeypatch: pytest.MonkeyPatch, num_blocks: int, is_in_loop: bool
) -> None:
    threads: list[int] = []

    def noted(*args: object) -> list[str]:
        threads.append(threading.get_ident())
        return ["0" * 32] * num_blocks

    monkeypatch.setattr(prompt_hashes, "block_hashes", noted)
    await PromptHashes().of([0] * num_blocks, HashBasis("f", 1))
    assert (threads == [threading.get_ident()]) == is_in_loop


async def test_no_more_hashes_are_made_than_a_message_can_carry() -> None:
    hashes = PromptHashes(max_hashes=3)
    assert await hashes.of(list(range(40)), BASIS) == block_hashes("f", list(range(12)), 4)
    assert await hashes.of(list(range(80)), BASIS) == block_hashes("f", list(range(12)), 4)


async def test_the_longest_prompt_stays_far_below_the_limit_of_a_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hashing, "chained_hash", lambda *_: "0" * 32)
    hashes = await PromptHashes().of([0] * (4 * MAX_HASHES + 4), BASIS)
    assert len(hashes) == MAX_HASHES
    request = ScheduleRequest(
        request_id="r", attempt=0, fingerprint="f", num_prompt_tokens=1, max_new_tokens=1, block_hashes=hashes
    )
    assert len(encode(request)) < 600_000
