"""Transports whose receiver pulls: it opens the sender's pool and copies out of it.

The sender shows its pool once, when it connects; afterwards it only names blocks.
"""

from __future__ import annotations

import abc
import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar, Protocol

from flowkv_engine.kv.reservations import Reservation
from flowkv_engine.kv.segments import Copy
from flowkv_engine.transport.stream import (
    Channel,
    Hello,
    Land,
    Reply,
    StreamConnector,
    finish_thread,
    open_thread,
)


class PeerPool(Protocol):
    """A peer's pool as it is seen from here. One worker thread at a time uses it. Raises `OSError`."""

    def copy(self, src: int, dst: int, num_bytes: int) -> None:
        """Copies from byte `src` of the peer's pool to byte `dst` of ours; may only queue the copy."""

    def settle(self) -> None:
        """Returns when all queued copies have ended; whether it raises or not, none of them is left."""

    def close(self) -> None:
        """Ends the mapping."""


class PullConnector(StreamConnector):
    # Copies are cut into steps of at least that much where they are longer, and so much is queued at once.
    step_bytes: ClassVar[int]

    @abc.abstractmethod
    async def show_pool(self, channel: Channel) -> None:
        """Tells the receiver how to open our pool. Raises `OSError`."""

    @abc.abstractmethod
    async def open_pool(self, channel: Channel, num_bytes: int) -> PeerPool:
        """Opens the pool of `num_bytes` that the sender shows. Raises `OSError`."""

    async def introduce(self, channel: Channel) -> None:
        await self.show_pool(channel)
        await channel.expect_yes()

    async def welcome(self, channel: Channel, hello: Hello) -> Land:
        block_bytes = self.pool.layout.block_bytes
        peer = await self.open_pool(channel, hello.num_blocks * block_bytes)
        channel.lifetime.callback(peer.close)
        await channel.send_frame(Reply())
        return pulling(channel, open_thread(channel, self.name), peer, block_bytes, self.step_bytes)


def pulling(
    channel: Channel, thread: ThreadPoolExecutor, peer: PeerPool, block_bytes: int, step_bytes: int
) -> Land:
    """What lands blocks by copies out of a peer's pool."""

    async def land(copies: list[Copy], reservation: Reservation) -> int:
        """The thread has left the pool when this returns or raises."""
        abandoned = threading.Event()

        def should_stop() -> bool:
            return reservation.revoked or abandoned.is_set()

        with channel.watching(abandoned.set):
            loop = asyncio.get_running_loop()
            copied = loop.run_in_executor(
                thread, copy_all, peer, copies, block_bytes, step_bytes, should_stop
            )
            num_calls = await finish_thread(copied, abandoned.set)
        if abandoned.is_set():
            raise ConnectionAbortedError("the sender hung up during the copy")
        return num_calls

    return land


def copy_all(
    peer: PeerPool, copies: list[Copy], block_bytes: int, step_bytes: int, should_stop: Callable[[], bool]
) -> int:
    """Copies in even steps until it should stop, waits for those queued, returns how many there were."""
    num_calls = num_queued_bytes = 0
    try:
        for copy in copies:
            src, dst, num_bytes = copy.src * block_bytes, copy.dst * block_bytes, copy.length * block_bytes
            step = -(-num_bytes // max(1, num_bytes // step_bytes))
            for done in range(0, num_bytes, step):
                if num_queued_bytes >= step_bytes:
                    peer.settle()
                    num_queued_bytes = 0
                if should_stop():
                    return num_calls
                peer.copy(src + done, dst + done, min(step, num_bytes - done))
                num_queued_bytes += step
                num_calls += 1
    finally:
        peer.settle()
    return num_calls
