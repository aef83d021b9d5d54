"""A prompt's way to its decode node: what is sent, when it is committed, and what is left if it fails."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import msgspec
import pytest

from flowkv_common.errors import Full, Unavailable
from flowkv_common.fingerprint import block_hashes
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Reserve, Reserved
from flowkv_decode.sequences import DecodeRole
from flowkv_engine.kv.blocks import Blocks
from flowkv_node import links
from flowkv_prefill import handoff
from flowkv_prefill.handoff import split_at
from tests.engineless import BLOCK_SIZE, FIRST_TOKEN, Pair, engineless_pair, kv_of
from tests.nats_server import NatsServer
from tests.node_messages import FINGERPRINT
from tests.waiting import until


def prompt_of(num_tokens: int) -> list[int]:
    return [100 + i for i in range(num_tokens)]


def cache_at_decode(pair: Pair, prompt_ids: list[int], num_blocks: int) -> list[int]:
    """The first blocks of a prompt, as an earlier request left them at the decode node."""
    blocks: Blocks = pair.d.node.blocks
    block_ids = blocks.allocate(num_blocks)
    hashes = block_hashes(FINGERPRINT, prompt_ids, BLOCK_SIZE)[:num_blocks]
    for place, (block_id, block_hash) in enumerate(zip(block_ids, hashes, strict=True)):
        blocks.commit(block_id, block_hash, hashes[place - 1] if place else None)
        pair.d.pool.tensor[block_id] = -1.0  # to be seen if it were sent again
    blocks.release(block_ids)
    return block_ids


# The last block is full, nearly full, or holds one token; one prompt is shorter than a block.
LENGTHS = [1, BLOCK_SIZE, 4 * BLOCK_SIZE - 1, 4 * BLOCK_SIZE, 4 * BLOCK_SIZE + 1]


@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize("chunk_tokens", [BLOCK_SIZE, 1000])
@pytest.mark.parametrize("overlap", [True, False])
async def test_every_token_of_the_prompt_lands_and_every_block_is_sent_once(
    nats_server: NatsServer, num_tokens: int, chunk_tokens: int, overlap: bool
) -> None:
    prompt_ids = prompt_of(num_tokens)
    async with engineless_pair(nats_server, overlap_transfer=overlap) as pair:
        await pair.p.prefill.accept(pair.run(prompt_ids))
        await pair.compute_all(chunk_tokens)
        await until(lambda: pair.d.decode.load().num_waiting == 1)
        [sequence] = pair.d.decode.sequences_to_decode()
        assert pair.d.kv(sequence.block_table, num_tokens) == kv_of(prompt_ids)
        assert (sequence.prompt_ids, sequence.output_ids) == (prompt_ids, [FIRST_TOKEN])
        assert sequence.num_computed_tokens == num_tokens
        num_blocks = -(-num_tokens // BLOCK_SIZE)
        assert Counter(pair.link.times_sent().values()) == {1: num_blocks}
        # Each chunk but the last is sent while the next one computes, where there are several.
        num_sends = num_blocks if overlap and chunk_tokens == BLOCK_SIZE else 1
        assert len(pair.link.sends) == num_sends
        await pair.p.wait_idle()


@pytest.mark.parametrize(("num_tokens", "num_cached"), [(9, 2), (12, 2), (13, 3)])
async def test_what_decode_has_cached_is_not_sent(pair: Pair, num_tokens: int, num_cached: int) -> None:
    """The block of the last prompt token is always sent: prefill computes that token anyway."""
    prompt_ids = prompt_of(num_tokens)
    known = cache_at_decode(pair, prompt_ids, num_tokens // BLOCK_SIZE)[:num_cached]
    await pair.p.prefill.accept(pair.run(prompt_ids))
    await pair.compute_all(BLOCK_SIZE)
    await until(lambda: pair.d.decode.load().num_waiting == 1)
    [sequence] = pair.d.decode.sequences_to_decode()
    assert sequence.block_table[:num_cached] == known
    num_cached_tokens = num_cached * BLOCK_SIZE
    expected = [-1.0] * num_cached_tokens + kv_of(prompt_ids)[num_cached_tokens:]
    assert pair.d.kv(sequence.block_table, num_tokens) == expected
    assert sum(pair.link.times_sent().values()) == -(-num_tokens // BLOCK_SIZE) - num_cached


async def test_the_commit_waits_for_the_last_copys_confirmation(pair: Pair) -> None:
    """Until then prefill holds its blocks, and decode knows of a reservation alone."""
    await pair.p.prefill.accept(pair.run(prompt_of(10)))
    pair.link.may_confirm.clear()
    await pair.compute_all()
    async with asyncio.timeout(5):
        await pair.link.landed.wait()
    await pair.settle()
    assert (pair.d.num_sequences_accepted, pair.d.node.reservations.num_open) == (0, 1)
    assert pair.p.node.blocks.num_leased == 3
    assert [chunk.token_ids for chunk in pair.chunks] == [[FIRST_TOKEN]]  # it waits for no copy
    pair.link.may_confirm.set()
    await pair.d.wait_accepted(1)
    await pair.p.wait_idle()
    assert pair.d.node.reservations.num_open == 0


async def test_a_request_that_ends_with_its_first_token_gives_its_room_back_at_once(pair: Pair) -> None:
    await pair.p.prefill.accept(pair.run(prompt_of(10), max_tokens=1))
    await pair.compute_all()
    await pair.p.wait_idle()
    assert pair.chunks[0].finish_reason == "length"
    # By a message, not by expiring; and it was never handed over.
    assert not any(pair.d.idle_counts().values())
    assert pair.d.num_sequences_accepted == 0


async def test_a_copy_that_is_refused_fails_the_attempt_and_is_not_committed(pair: Pair) -> None:
    run = pair.run(prompt_of(10))
    await pair.p.prefill.accept(run)
    await until(lambda: pair.d.node.reservations.num_open)
    pair.d.node.reservations.cancel(f"{run.request_id}.0")
    await pair.compute_all()
    await until(lambda: any(chunk.error for chunk in pair.chunks))
    error = next(chunk.error for chunk in pair.chunks if chunk.error)
    assert error.code == 502
    assert "d:" in error.message
    await pair.p.wait_idle()
    assert pair.d.num_sequences_accepted == 0


async def test_a_commit_that_is_refused_gives_everything_back(pair: Pair) -> None:
    """Its reservation is lost between the last copy and the commit."""
    run = pair.run(prompt_of(10))
    await pair.p.prefill.accept(run)
    pair.link.may_confirm.clear()
    await pair.compute_all()
    async with asyncio.timeout(5):
        await pair.link.landed.wait()
    pair.d.node.attempts.cancel(f"{run.request_id}.0")
    pair.link.may_confirm.set()
    await until(lambda: any(chunk.error for chunk in pair.chunks))
    await pair.p.wait_idle()
    await pair.d.wait_idle()


async def test_a_reservation_is_renewed_while_its_prompt_is_computed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handoff, "RENEW_S", 0.01)
    asked: list[Reserve] = []
    subject = subjects.at(subjects.DECODE_RESERVE, "d")
    async with await pair.bus.subscribe(subject, Reserve, asked.append):
        await pair.p.prefill.accept(pair.run(prompt_of(10)))
        await until(lambda: pair.d.node.reservations.num_open)
        opened_at = pair.d.node.reservations.renewed_at
        await until(lambda: len(asked) > 2 and pair.d.node.reservations.renewed_at > opened_at)
    assert len({message.transfer_id for message in asked}) == 1
    assert pair.d.node.num_rooms_given == 1  # renewed, not opened again
    await pair.compute_all()
    await pair.d.wait_accepted(1)


async def test_prefill_asks_a_full_decode_node_again_and_takes_no_blocks_before(pair: Pair) -> None:
    taken = pair.d.node.blocks.allocate(pair.d.node.blocks.num_blocks)
    full: list[Full] = []
    subject = subjects.at(subjects.DECODE_RESERVE, "d")
    async with await pair.bus.subscribe(subject, Reserve, lambda *_: full.append(Full("asked"))):
        await pair.p.prefill.accept(pair.run(prompt_of(10)))
        await until(lambda: len(full) > 2)
    assert pair.p.node.blocks.num_leased == 0
    pair.d.node.blocks.release(taken)
    await pair.compute_all()
    await pair.d.wait_accepted(1)


async def test_room_at_a_full_decode_node_goes_to_the_prompt_that_is_due_first(pair: Pair) -> None:
    """However long each has waited. Only the first one asks."""
    free = pair.d.node.blocks.allocate(pair.d.node.blocks.num_blocks)
    asked: list[str] = []
    subject = subjects.at(subjects.DECODE_RESERVE, "d")
    async with await pair.bus.subscribe(subject, Reserve, lambda one: asked.append(one.transfer_id)):

        async def accept(due_in_s: float) -> None:
            run = pair.run(prompt_of(10))
            await pair.p.prefill.accept(msgspec.structs.replace(run, due_in_s=due_in_s))

        async def first_is(transfer_id: str) -> None:
            """It asks, and then again without another between."""
            await until(lambda: asked[-2:] == [transfer_id] * 2)

        for due_in_s in (30.0, 10.0, 50.0, 20.0):
            await accept(due_in_s)
        await first_is("r1.0")
        await accept(40.0)
        await first_is("r1.0")
        pair.p.node.attempts.cancel("r1.0")
        await first_is("r3.0")
        for served in ("r3.0", "r0.0", "r4.0", "r2.0"):
            await first_is(served)
            pair.d.node.blocks.release([free.pop() for _ in range(3)])
        await until(lambda: pair.d.node.reservations.num_open == 4)
    assert [attempt.transfer_id for attempt in pair.d.node.attempts] == ["r3.0", "r0.0", "r4.0", "r2.0"]
    assert "r2.0" not in asked[: asked.index("r4.0")]
    for attempt in pair.p.node.attempts:
        pair.p.node.attempts.cancel(attempt.transfer_id)
    await pair.p.wait_idle()


async def time_eight_prompts(pair: Pair) -> tuple[float, float]:
    """Seconds to the first answer, and to all of eight prompts that come at once."""
    began = time.monotonic()
    for _ in range(8):
        await pair.p.prefill.accept(pair.run(prompt_of(10)))
    await until(lambda: pair.chunks)
    first_s = time.monotonic() - began
    await until(lambda: len(pair.chunks) == 8)
    return first_s, time.monotonic() - began


async def test_a_decode_node_that_stands_still_costs_each_prompt_one_time_out(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_over = asyncio.Event()

    async def stand_still(_: DecodeRole, __: Reserve) -> Reserved:
        await is_over.wait()
        raise Unavailable("too late")

    monkeypatch.setattr(DecodeRole, "reserve", stand_still)
    monkeypatch.setattr(handoff, "CONTROL_TIMEOUT_S", 0.2)
    monkeypatch.setattr(handoff, "LINE_PATIENCE_S", 0.02)
    async with engineless_pair(nats_server) as pair:
        first_s, all_s = await time_eight_prompts(pair)
        assert all_s < 3 * first_s
        is_over.set()
        await pair.p.wait_idle()


async def test_all_who_wait_for_a_link_wait_equally_long(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "LINK_PATIENCE_S", 0.2)
    pair.p.node.links._links.clear()
    first_s, all_s = await time_eight_prompts(pair)
    assert all_s < 2 * first_s
    assert {chunk.error and chunk.error.message for chunk in pair.chunks} == {"d: no link to d within 0.2 s"}
    await pair.p.wait_idle()


async def test_a_link_that_comes_in_time_is_used(pair: Pair) -> None:
    made = pair.p.node.links._links
    kept = dict(made)
    made.clear()
    await pair.p.prefill.accept(pair.run(prompt_of(10)))
    await until(lambda: pair.p.node.handoffs.queue.num_holders)  # it has looked for the link by now
    made.update(kept)
    await pair.compute_all()
    await pair.d.wait_accepted(1)


@pytest.mark.parametrize(
    ("spans", "hidden_s", "exposed_s"),
    [
        ([], 0.0, 0.0),
        ([(1.0, 2.0)], 1.0, 0.0),
        ([(5.0, 7.0)], 0.0, 2.0),
        ([(4.0, 5.0)], 1.0, 0.0),
        ([(3.0, 7.0)], 2.0, 2.0),  # under way when the last chunk was done
        ([(1.0, 2.0), (4.5, 5.5), (5.5, 8.5)], 1.5, 3.5),
    ],
)
def test_sends_are_hidden_until_the_last_chunk_is_computed(
    spans: list[tuple[float, float]], hidden_s: float, exposed_s: float
) -> None:
    assert split_at(5.0, spans) == (hidden_s, exposed_s)
