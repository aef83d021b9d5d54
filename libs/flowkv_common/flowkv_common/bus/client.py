"""nats-py's client with a `flush` that is the barrier it promises to be."""

from __future__ import annotations

import asyncio
from typing import Any

from nats.aio.client import Client


class BarrierClient(Client):
    """Sends a PING only behind all that was sent before it.

    nats-py 2.16 writes the PING straight to the socket while SUB, UNSUB and PUB may still wait in its buffer.
    The PONG then proves nothing: `flush` returns before the server knows of a subscription, and `drain`
    before the last messages have come, which are then dropped.
    """

    async def _send_ping(self, future: asyncio.Future[Any] | None = None) -> None:
        await self._flush_pending(force_flush=True)
        await super()._send_ping(future)
