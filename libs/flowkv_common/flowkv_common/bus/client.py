"""nats-py's client with what it lacks: a `flush` that is a barrier, and subscriptions that can be dropped."""

from __future__ import annotations

import asyncio
from typing import Any

from nats.aio.client import Client
from nats.aio.subscription import Subscription


class BarrierClient(Client):
    """Sends a PING only behind all that was sent before it.

    nats-py 2.16 writes the PING straight to the socket while SUB, UNSUB and PUB may still wait in its buffer.
    The PONG then proves nothing: `flush` returns before the server knows of a subscription, and `drain`
    before the last messages have come, which are then dropped.
    """

    async def _send_ping(self, future: asyncio.Future[Any] | None = None) -> None:
        await self._flush_pending(force_flush=True)
        await super()._send_ping(future)

    def forget(self, subscription: Subscription) -> None:
        """Drop a subscription without a word to the server, which may be gone.

        One that could not be drained stays in nats-py's books, and the next reconnect brings it back to life.
        """
        subscription._stop_processing()
        self._remove_sub(subscription._id)
