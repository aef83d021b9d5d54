"""Waits that end: for what has no event, and for what may never come."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from flowkv_common.bus.connection import Bus

T = TypeVar("T")
TIMEOUT_S = 5.0


async def until(is_met: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> None:
    """Looks again and again: not every state has an event. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while not is_met():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def soon(wait: Awaitable[T], timeout_s: float = TIMEOUT_S) -> T:
    """What it gives. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        return await wait


def reconnected(bus: Bus) -> asyncio.Event:
    """Set once the connection has come back."""
    back = asyncio.Event()
    bus.on_reconnect(back.set)
    return back
