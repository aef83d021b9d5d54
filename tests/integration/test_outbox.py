"""Tokens of one step for one gateway: one message, or as many as the server's limit makes necessary."""

from __future__ import annotations

import asyncio

from nats_server import NatsServer

from flowkv_common.bus.connection import connect
from flowkv_common.node.attempts import Attempts
from flowkv_common.node.outbox import Outbox
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import StepTokens, TokenChunk
from flowkv_common.wire.parts import NodeRef, TokenLogprob


def chunk(number: int, num_logprobs: int) -> TokenChunk:
    logprob = TokenLogprob(token_id=1, logprob=-1.0, top=[(1, -12.345678901234567)] * num_logprobs)
    return TokenChunk(transfer_id=f"r{number}.0", index=0, token_ids=[1], logprobs=[logprob])


async def test_a_step_whose_tokens_are_more_than_a_message_takes_is_sent_in_several() -> None:
    with NatsServer(max_payload=4096) as server:
        got: asyncio.Queue[StepTokens] = asyncio.Queue()
        async with connect(server.url, name="test") as bus:
            async with await bus.subscribe(subjects.tokens("g"), StepTokens, lambda step, _: got.put(step)):
                outbox = Outbox(bus, NodeRef(node_id="n", incarnation="1"), Attempts())
                for number in range(3):
                    outbox.add("g", chunk(number, num_logprobs=0))
                await outbox.flush()
                for number in range(20):
                    outbox.add("g", chunk(number, num_logprobs=20))
                await outbox.flush()
                await bus.nc.flush()
        steps = [got.get_nowait() for _ in range(got.qsize())]
    whole, *parts = [[one.transfer_id for one in step.chunks] for step in steps]
    assert whole == ["r0.0", "r1.0", "r2.0"]
    assert len(parts) == 4
    assert [tid for part in parts for tid in part] == [f"r{number}.0" for number in range(20)]
