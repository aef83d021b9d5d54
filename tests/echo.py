"""Somebody who answers over NATS, and who asks: whether the way there and back is open."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from nats.aio.msg import Msg

from flowkv_common.bus.connection import Bus
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Accepted, encode
from flowkv_common.wire.nodes import Drain

SUBJECT = subjects.SCHEDULE  # where users have rights, a gateway may ask there and a scheduler answer
ANSWER = Accepted(node_id="echo")


@contextlib.asynccontextmanager
async def echo(bus: Bus) -> AsyncIterator[None]:
    """Answers while the context lasts."""

    async def answer(msg: Msg) -> None:
        await msg.respond(encode(ANSWER))

    async with await bus.subscribe_raw(SUBJECT, answer):
        yield


async def ask(bus: Bus, timeout_s: float = 5.0) -> Accepted:
    """Raises what `Bus.request` does."""
    return await bus.request(SUBJECT, Drain(), Accepted, timeout_s=timeout_s)
