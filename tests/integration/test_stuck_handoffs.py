"""A handoff that makes no progress turns its node red, is given back, and the node recovers if it can."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest

from flowkv_common.aio import running
from flowkv_common.errors import Unavailable
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Reserve
from flowkv_node import host
from flowkv_node.handoffs import STUCK_AFTER_S
from tests.engineless import Pair, engineless_pair
from tests.nats_server import NatsServer
from tests.waiting import until

PROMPT = list(range(100, 110))


@pytest.fixture
async def pair(nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pair]:
    monkeypatch.setattr(host, "SUPERVISE_PERIOD_S", 0.01)
    async with engineless_pair(nats_server, max_handoffs=2) as pair:
        async with running(host.supervise(pair.p.node, SimpleNamespace(busy_since=None))):
            yield pair


def pass_time(pair: Pair) -> None:
    """Nearly as much as a handoff may be still: twice this is too much."""
    pair.p.clock.forward_s += 0.9 * STUCK_AFTER_S


async def sweep(pair: Pair) -> None:
    """Until the watch has looked again, twice."""
    await asyncio.sleep(5 * host.SUPERVISE_PERIOD_S)


async def send_without_end(pair: Pair) -> None:
    """A prompt whose last copy is never confirmed."""
    await pair.p.prefill.accept(pair.run(PROMPT))
    pair.link.may_confirm.clear()
    await pair.compute_all()
    async with asyncio.timeout(5):
        await pair.link.landed.wait()


async def serve_another(pair: Pair) -> None:
    pair.d.node.attempts.cancel("r0.0")
    before = pair.d.num_sequences_accepted
    await pair.p.prefill.accept(pair.run(PROMPT))
    await pair.compute_all()
    await pair.d.wait_accepted(before + 1)
    await pair.p.wait_idle()


async def test_a_send_that_never_ends_is_given_back_and_the_node_recovers(pair: Pair) -> None:
    await send_without_end(pair)
    pass_time(pair)
    await sweep(pair)
    assert pair.p.node.why_not_ready() is None
    pass_time(pair)
    await until(pair.p.node.why_not_ready)
    reason = pair.p.node.why_not_ready()
    assert reason == "no progress in 1 of 1 handoffs: r0.0 is handed over for 324 s"
    await until(lambda: any(chunk.error for chunk in pair.chunks))
    [error] = [chunk.error for chunk in pair.chunks if chunk.error]
    assert (error.code, error.message) == (503, f"p: {reason}")
    await pair.p.wait_idle()
    await until(lambda: pair.p.node.why_not_ready() is None)
    pair.link.may_confirm.set()
    await serve_another(pair)


async def test_a_node_stays_red_while_a_handoff_cant_be_ended(pair: Pair) -> None:
    """A thread that waits for a device heeds no cancel."""
    pair.link.hears_cancel = False
    await send_without_end(pair)
    pass_time(pair)
    pass_time(pair)
    await until(pair.p.node.why_not_ready)
    with pytest.raises(Unavailable, match="no progress in 1 of 1 handoffs"):
        await pair.p.prefill.accept(pair.run(PROMPT))
    await sweep(pair)
    assert pair.p.node.why_not_ready() is not None
    assert pair.p.node.handoffs.queue.num_holders == 1
    pair.link.may_confirm.set()
    await pair.p.wait_idle()
    await until(lambda: pair.p.node.why_not_ready() is None)
    await serve_another(pair)


async def test_a_prompt_that_waits_for_the_engine_is_not_stuck_while_that_steps(pair: Pair) -> None:
    await pair.p.prefill.accept(pair.run(PROMPT))
    await until(pair.p.prefill.sequences_to_prefill)
    for _ in range(4):
        pass_time(pair)
        pair.p.clock.end_step()  # of others
        await sweep(pair)
        assert pair.p.node.why_not_ready() is None
    await pair.compute_all()
    await pair.d.wait_accepted(1)


async def test_a_prompt_that_nobody_computes_is_stuck(pair: Pair) -> None:
    await pair.p.prefill.accept(pair.run(PROMPT))
    await until(pair.p.prefill.sequences_to_prefill)
    pass_time(pair)
    pass_time(pair)
    await until(pair.p.node.why_not_ready)
    assert "r0.0 is computed for" in str(pair.p.node.why_not_ready())
    await pair.p.wait_idle()
    await until(lambda: pair.p.node.why_not_ready() is None)
    await serve_another(pair)


async def test_a_send_that_waits_behind_others_is_not_stuck_while_those_arrive(pair: Pair) -> None:
    await send_without_end(pair)
    waits, pair.link.may_confirm = pair.link.may_confirm, asyncio.Event()
    pair.link.may_confirm.set()
    for number in range(3):
        pass_time(pair)
        await pair.p.prefill.accept(pair.run(PROMPT))
        await pair.compute_all()
        await pair.d.wait_accepted(number + 1)
        await sweep(pair)
        assert pair.p.node.why_not_ready() is None
    waits.set()
    await pair.p.wait_idle()
    assert pair.d.num_sequences_accepted == 4


async def test_a_prompt_that_waits_for_a_full_decode_node_is_not_stuck_while_that_answers(pair: Pair) -> None:
    taken = pair.d.node.blocks.allocate(pair.d.node.blocks.num_blocks)
    answered = asyncio.Semaphore(0)
    subject = subjects.at(subjects.DECODE_RESERVE, "d")
    async with await pair.bus.subscribe(subject, Reserve, lambda *_: answered.release()):
        await pair.p.prefill.accept(pair.run(PROMPT))
        async with asyncio.timeout(10):
            for _ in range(3):
                pass_time(pair)
                for _ in range(2):  # it has heard the answer to the first when it asks the second time
                    await answered.acquire()
                assert pair.p.node.why_not_ready() is None
    pair.d.node.blocks.release(taken)
    await pair.compute_all()
    await pair.d.wait_accepted(1)


async def test_a_prompt_that_waits_for_blocks_nobody_gives_back_is_stuck(pair: Pair) -> None:
    taken = pair.p.node.blocks.allocate(pair.p.node.blocks.num_blocks)
    await pair.p.prefill.accept(pair.run(PROMPT))
    await until(lambda: pair.d.node.reservations.num_open)
    await sweep(pair)
    pass_time(pair)
    pass_time(pair)
    await until(pair.p.node.why_not_ready)
    assert "r0.0 waits for blocks" in str(pair.p.node.why_not_ready())
    pair.p.node.blocks.release(taken)
    await pair.p.wait_idle()
    await until(lambda: pair.p.node.why_not_ready() is None)
    await serve_another(pair)
