"""Tasks that run beside a block and end with it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Coroutine
from typing import Any


@contextlib.asynccontextmanager
async def running(*coroutines: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `coroutines` while the block runs, cancel them when it ends; if one fails, so does the block.

    A single error leaves as itself, whoever raised it, and several as a group.
    """
    async with group() as tasks:
        mine = [tasks.create_task(coroutine) for coroutine in coroutines]
        try:
            yield
        finally:
            for task in mine:
                task.cancel()


@contextlib.asynccontextmanager
async def group() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group that a single error leaves as itself: several leave as a group."""
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except BaseExceptionGroup as errors:
        if len(errors.exceptions) == 1:
            raise errors.exceptions[0] from None
        raise


def stop_on_signals() -> asyncio.Event:
    """An event that SIGTERM or SIGINT sets: the sign to drain and leave."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop
