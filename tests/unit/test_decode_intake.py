"""Who gets room at a decode node, and who may turn it into a running sequence."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, nullcontext

import pytest

from flowkv_common.errors import BadRequest, Full, Stale, Unavailable
from flowkv_common.fingerprint import block_hashes
from flowkv_common.wire.messages import (
    Release,
    TokenIds,
)
from flowkv_engine.engine.sampler import Sampled
from flowkv_node.node import new_sequence
from tests.engineless import BLOCK_SIZE, NUM_BLOCKS, Pair, Side, engineless_pair
from tests.nats_server import NatsServer
from tests.node_messages import FINGERPRINT, decode_run, reserve

MAX_HANDOFFS = 3


@pytest.fixture
async def pair(nats_server: NatsServer) -> AsyncIterator[Pair]:
    async with engineless_pair(nats_server, max_handoffs=MAX_HANDOFFS) as pair:
        yield pair


async def handed_over(side: Side, prompt_ids: list[int], name: str) -> None:
    """A sequence that runs."""
    reserved = await side.decode.reserve(reserve(len(prompt_ids) + 1, name))
    await side.decode.accept(decode_run(prompt_ids, reserved.token, name))
    assert side.decode.sequences_to_decode()


async def test_who_runs_and_who_was_preempted_come_before_a_new_handoff(side: Side) -> None:
    """The watermark: one block to grow for each that runs, and all of them for those who lost theirs."""
    await handed_over(side, [5] * (2 * BLOCK_SIZE - 1), "a")  # 2 blocks, full with its first token
    num_free = NUM_BLOCKS - 2
    with pytest.raises(Full, match="no room"):
        await side.decode.reserve(reserve(num_free * BLOCK_SIZE, "b"))
    reserved = await side.decode.reserve(reserve((num_free - 1) * BLOCK_SIZE, "b"))
    await side.decode.release(Release(transfer_id="b.0", token=reserved.token))

    hog = side.node.blocks.allocate(num_free)
    [sequence] = side.decode.sequences_to_decode()
    sequence.num_computed_tokens += 1
    side.decode.apply(sequence, Sampled(9, None))
    assert side.decode.sequences_to_decode() == []  # no block to grow: it has been preempted
    side.node.blocks.release(hog)
    assert side.decode.load().num_waiting == 1
    num_owed = 3
    with pytest.raises(Full, match="no room"):
        await side.decode.reserve(reserve((NUM_BLOCKS - num_owed + 1) * BLOCK_SIZE, "c"))
    await side.decode.reserve(reserve((NUM_BLOCKS - num_owed) * BLOCK_SIZE, "c"))


async def test_the_youngest_gives_way_to_the_oldest(side: Side) -> None:
    for name in ("old", "young"):
        await handed_over(side, [5] * (2 * BLOCK_SIZE - 1), name)
    [old, young] = side.decode.sequences_to_decode()
    hog = side.node.blocks.allocate(NUM_BLOCKS - 4)
    for sequence in (old, young):
        sequence.num_computed_tokens += 1
        side.decode.apply(sequence, Sampled(9, None))
    assert side.decode.sequences_to_decode() == [old]
    assert (len(old.block_table), young.block_table) == (3, [])
    side.node.blocks.release(hog)


async def test_open_reservations_are_bounded_by_count(side: Side) -> None:
    first = await side.decode.reserve(reserve(1, "r0"))
    for number in range(1, MAX_HANDOFFS):
        await side.decode.reserve(reserve(1, f"r{number}"))
    with pytest.raises(Full, match="too many"):
        await side.decode.reserve(reserve(1, "one-more"))
    await side.decode.reserve(reserve(1, "r0", token=first.token))  # a renewal is none more


async def test_what_never_fits_is_refused_for_good(side: Side) -> None:
    with pytest.raises(BadRequest, match="never fit"):
        await side.decode.reserve(reserve(NUM_BLOCKS * BLOCK_SIZE + 1))


async def test_a_renewal_keeps_the_same_room_also_in_a_drain(side: Side) -> None:
    first = await side.decode.reserve(reserve(10))
    side.node.drain()
    assert await side.decode.reserve(reserve(10, token=first.token)) == first
    with pytest.raises(Unavailable, match="draining"):
        await side.decode.reserve(reserve(10, "other"))


@pytest.mark.parametrize("ending", ["commit", "release", "expiry"])
async def test_a_renewal_that_comes_too_late_opens_nothing(side: Side, ending: str) -> None:
    """It is on its way while the prompt's last message overtakes it."""
    reserved = await side.decode.reserve(reserve(10, expires_in_s=0.0 if ending == "expiry" else 30.0))
    if ending == "commit":
        await side.decode.accept(decode_run([5] * 9, reserved.token))
    elif ending == "release":
        await side.decode.release(Release(transfer_id="r.0", token=reserved.token))
    else:
        assert side.node.reservations.sweep() == ["r.0"]
    with pytest.raises(Stale):
        await side.decode.reserve(reserve(10, token=reserved.token))
    assert side.node.reservations.num_open == 0
    if ending == "commit":  # the sequence is still what a cancel stops
        side.node.attempts.cancel("r.0")
        assert not any(side.idle_counts().values())


async def test_a_reservation_is_opened_once(side: Side) -> None:
    reserved = await side.decode.reserve(reserve(10))
    with pytest.raises(Stale, match="already"):
        await side.decode.reserve(reserve(10))
    await side.decode.accept(decode_run([5] * 9, reserved.token))
    with pytest.raises(Stale, match="already"):
        await side.decode.reserve(reserve(10))


async def test_a_cancel_that_comes_first_keeps_the_reservation_out(side: Side) -> None:
    side.node.attempts.cancel("r.0")
    with pytest.raises(Stale):
        await side.decode.reserve(reserve(10))
    assert not any(side.idle_counts().values())


async def test_a_sequence_of_a_cancelled_attempt_is_not_adopted_and_leaves_nothing(side: Side) -> None:
    side.node.attempts.cancel("r.0")
    with pytest.raises(Stale):
        side.decode.adopt(new_sequence(decode_run([5] * 9, "")))
    assert not any(side.idle_counts().values())
    assert side.decode._fresh == {}


async def test_a_cancel_after_the_reservation_keeps_the_commit_out(side: Side) -> None:
    reserved = await side.decode.reserve(reserve(10))
    side.node.attempts.cancel("r.0")
    with pytest.raises(Stale):
        await side.decode.accept(decode_run([5] * 9, reserved.token))
    assert not any(side.idle_counts().values())


@pytest.mark.parametrize("token", ["", "0" * 32])
async def test_only_the_reservations_secret_commits_or_releases_it(side: Side, token: str) -> None:
    reserved = await side.decode.reserve(reserve(10))
    with pytest.raises(Stale, match="token"):
        await side.decode.accept(decode_run([5] * 9, token))
    with pytest.raises(Stale, match="token"):
        await side.decode.release(Release(transfer_id="r.0", token=token))
    with pytest.raises(Stale):
        await side.decode.reserve(reserve(10, token=token))
    assert (side.node.reservations.num_open, side.num_sequences_accepted) == (1, 0)
    await side.decode.accept(decode_run([5] * 9, reserved.token))
    assert (side.node.reservations.num_open, side.num_sequences_accepted) == (0, 1)


@pytest.mark.parametrize(
    ("prompt_ids", "output_ids", "error"),
    [
        ([5] * 11, [7], nullcontext()),  # three blocks, full
        ([5] * 12, [7], pytest.raises(BadRequest, match="3 blocks were reserved")),
        ([5] * 9, [], pytest.raises(BadRequest, match="0 of output")),
    ],
)
async def test_a_commit_of_other_tokens_than_were_reserved_for_costs_no_blocks(
    side: Side, prompt_ids: list[int], output_ids: list[int], error: AbstractContextManager[object]
) -> None:
    reserved = await side.decode.reserve(reserve(10))
    with error:
        await side.decode.accept(decode_run(prompt_ids, reserved.token, output_ids=TokenIds.of(output_ids)))
        side.node.attempts.cancel("r.0")
    assert not any(side.idle_counts().values())


async def test_a_release_frees_the_room_and_ends_the_attempt(side: Side) -> None:
    reserved = await side.decode.reserve(reserve(10))
    assert side.node.blocks.num_leased == 3
    await side.decode.release(Release(transfer_id="r.0", token=reserved.token))
    assert not any(side.idle_counts().values())


@pytest.mark.parametrize(("num_prompt_tokens", "num_pinned"), [(7, 1), (8, 1), (9, 2)])
async def test_the_block_of_the_last_prompt_token_is_never_pinned(
    side: Side, num_prompt_tokens: int, num_pinned: int
) -> None:
    """Prefill recomputes that token: its block is always sent."""
    hashes = block_hashes(FINGERPRINT, [5] * 8, BLOCK_SIZE)
    cached = side.node.blocks.allocate(2)
    for place, block_id in enumerate(cached):
        side.node.blocks.commit(block_id, hashes[place], hashes[place - 1] if place else None)
    side.node.blocks.release(cached)
    reserved = await side.decode.reserve(reserve(num_prompt_tokens + 1, block_hashes=hashes))
    assert reserved.num_cached_blocks == num_pinned
