"""Tokens of one step for one gateway, and when a gateway is taken for gone."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from flowkv_common.aio import running
from flowkv_common.bus import connection
from flowkv_common.bus.connection import connect
from flowkv_common.bus.service import Endpoint, Service
from flowkv_common.errors import Full
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import (
    Keepalive,
    KeepaliveReply,
    NodeRef,
    StepTokens,
    TokenChunk,
    TokenLogprob,
)
from flowkv_node import attempts as attempts_module
from flowkv_node.attempts import MISSES_UNTIL_GONE, Attempt, Attempts, Outbox
from tests.nats_server import NatsServer
from tests.waiting import until


def chunk(number: int, num_logprobs: int) -> TokenChunk:
    logprob = TokenLogprob(token_id=1, logprob=-1.0, top=[(1, -12.345678901234567)] * num_logprobs)
    return TokenChunk(transfer_id=f"r{number}.0", index=0, token_ids=[1], logprobs=[logprob])


async def test_a_step_whose_tokens_are_more_than_a_message_takes_is_sent_in_several() -> None:
    with NatsServer(max_payload=4096) as server:
        got: asyncio.Queue[StepTokens] = asyncio.Queue()
        async with connect(server.url, name="test") as bus:
            async with await bus.subscribe(subjects.tokens("g"), StepTokens, got.put):
                outbox = Outbox(bus, NodeRef(node_id="n", incarnation="1"), Attempts())
                for number in range(3):
                    outbox.add_chunk("g", chunk(number, num_logprobs=0))
                await outbox.flush()
                for number in range(20):
                    outbox.add_chunk("g", chunk(number, num_logprobs=20))
                await outbox.flush()
                await bus.nc.flush()
        steps = [got.get_nowait() for _ in range(got.qsize())]
    whole, *parts = [[one.transfer_id for one in step.chunks] for step in steps]
    assert whole == ["r0.0", "r1.0", "r2.0"]
    assert len(parts) == 4
    assert [tid for part in parts for tid in part] == [f"r{number}.0" for number in range(20)]


async def test_tokens_of_one_attempt_that_follow_each_other_go_out_as_one_chunk(
    nats_server: NatsServer,
) -> None:
    got: asyncio.Queue[StepTokens] = asyncio.Queue()
    async with connect(nats_server.url, name="test") as bus:
        async with await bus.subscribe(subjects.tokens("g"), StepTokens, got.put):
            outbox = Outbox(bus, NodeRef(node_id="n", incarnation="1"), Attempts())
            for index, finish_reason in ((4, None), (5, None), (6, "length")):
                each = msgspec.structs.replace(chunk(0, 1), index=index, finish_reason=finish_reason)
                outbox.add_chunk("g", each)
            outbox.add_chunk("g", chunk(1, num_logprobs=0))
            outbox.add_failure("g", "r1.0", Full("no room"))
            await outbox.flush()
            first, second, failure = (await asyncio.wait_for(got.get(), 5)).chunks
    assert (first.index, first.token_ids, len(first.logprobs)) == (4, [1, 1, 1], 3)
    assert first.finish_reason == "length"
    assert second == chunk(1, num_logprobs=0)
    assert failure.error is not None


async def test_the_first_token_is_no_part_of_what_was_told_of_its_prompt(nats_server: NatsServer) -> None:
    """A gateway takes no output from a chunk with log probabilities of the prompt."""
    got: asyncio.Queue[StepTokens] = asyncio.Queue()
    token = chunk(0, num_logprobs=1)
    of_prompt = TokenChunk(transfer_id="r0.0", index=0, token_ids=[], prompt_logprobs=token.logprobs)
    async with connect(nats_server.url, name="test") as bus:
        async with await bus.subscribe(subjects.tokens("g"), StepTokens, got.put):
            outbox = Outbox(bus, NodeRef(node_id="n", incarnation="1"), Attempts())
            outbox.add_chunk("g", of_prompt)
            outbox.add_chunk("g", token)
            await outbox.flush()
            assert (await asyncio.wait_for(got.get(), 5)).chunks == [of_prompt, token]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keepalives at once, and verdicts from the first moment on."""
    monkeypatch.setattr(attempts_module, "KEEPALIVE_PERIOD_S", 0.01)
    monkeypatch.setattr(connection, "SETTLE_S", 0.0)


def begin(attempts: Attempts, transfer_id: str) -> None:
    attempts.begin(Attempt(transfer_id, "g", "decode", lambda _: None))


@pytest.mark.usefixtures("quick")
async def test_a_gateway_that_answers_with_an_error_keeps_its_requests_until_it_is_silent(
    nats_server: NatsServer,
) -> None:
    num_heard = 0

    async def refuse(message: Keepalive) -> KeepaliveReply:
        nonlocal num_heard
        num_heard += 1
        raise Full("too many keepalives at once")

    async with connect(nats_server.url, name="test") as bus:
        attempts = Attempts()
        begin(attempts, "r.0")
        outbox = Outbox(bus, NodeRef(node_id="n", incarnation="1"), attempts)
        endpoint = Endpoint(subjects.keepalive("g"), Keepalive, refuse)
        async with running(outbox.keep_alive()):
            async with Service(bus, name="g", version="1.0.0", service_id="g", endpoints=[endpoint]):
                await until(lambda: num_heard > 2 * MISSES_UNTIL_GONE)
                assert "r.0" in attempts
            await until(lambda: "r.0" not in attempts)


@pytest.mark.usefixtures("quick")
async def test_a_keepalive_that_is_too_large_costs_no_requests(caplog: pytest.LogCaptureFixture) -> None:
    with NatsServer(max_payload=4096) as server:
        async with connect(server.url, name="test") as bus:
            attempts = Attempts()
            for number in range(300):
                begin(attempts, f"r{number}.0")
            outbox = Outbox(bus, NodeRef(node_id="n", incarnation="1"), attempts)
            async with running(outbox.keep_alive()):
                await until(lambda: len(caplog.messages) > 2 * MISSES_UNTIL_GONE)
            assert len(attempts) == 300
    assert all(text.startswith("keepalive to g: ") for text in caplog.messages)
