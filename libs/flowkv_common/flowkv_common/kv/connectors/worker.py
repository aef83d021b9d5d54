"""Waiting in the event loop for a thread that touches a pool."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TypeVar

T = TypeVar("T")


async def outlived(working: asyncio.Future[T], abandoned: threading.Event) -> T:
    """The result of a thread. A cancel sets `abandoned`, for the thread to see, and waits until it has left.

    A thread can't be interrupted, and blocks that it may still write must not be given out
    (docs/architecture.md, rule 4).
    """
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        abandoned.set()
        while not working.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([working])
        if not working.cancelled():
            working.exception()  # has been looked at: the cancel is what counts
        raise
