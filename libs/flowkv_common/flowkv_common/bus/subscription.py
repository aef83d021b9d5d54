"""A subscription that can be left without losing what has arrived."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Self

import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as NatsSubscription

from flowkv_common import errors
from flowkv_common.bus.client import BarrierClient

_CONFIRM_TIMEOUT_S = 5


class Subscription:
    """Interest in a subject; leaving the context drains it: what has arrived is still handled."""

    def __init__(self, nc: BarrierClient, subject: str) -> None:
        self.subject = subject
        self.num_undecodable = 0
        self.num_failed = 0
        self._nc = nc
        self._inner: NatsSubscription | None = None

    async def start(
        self,
        on_message: Callable[[Msg], Awaitable[None]],
        max_pending_messages: int,
        max_pending_bytes: int,
    ) -> None:
        """Subscribe; when this returns the server knows of it. Raises `Unavailable`."""
        try:
            self._inner = await self._nc.subscribe(
                self.subject,
                cb=on_message,
                pending_msgs_limit=max_pending_messages,
                pending_bytes_limit=max_pending_bytes,
            )
            if self._nc.is_hearing:  # else the reconnect restores it
                await self._nc.flush(_CONFIRM_TIMEOUT_S)
        except nats.errors.Error as error:
            await self.drain()  # nobody else will
            raise errors.Unavailable(f"can't subscribe to {self.subject}: {error}") from error

    async def drain(self, timeout_s: float = 5.0) -> None:
        """Take nothing new and handle what is here. Idempotent; gives up after `timeout_s`."""
        inner, self._inner = self._inner, None
        if inner is None:
            return
        # Without a server there is nothing to drain, and `drain()` would wait for its answer.
        leave: Callable[[], Awaitable[None]] = inner.drain if self._nc.is_hearing else inner.unsubscribe
        try:
            with contextlib.suppress(nats.errors.Error, TimeoutError, OSError):
                async with asyncio.timeout(timeout_s):
                    await leave()
        finally:
            self._nc.forget(inner)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.drain()
