"""nats-py's client with what it lacks: it notices that it hears nothing, and what is cancelled ends.

nats-py 2.16 is deaf without a word in three cases. A server that is stopped, or behind a network that drops
packets, is noticed after half a minute. An error in the read loop ends it and is only logged; the PONG of a
flush that was cancelled is such an error. And a cancel that comes while it flushes is dropped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import nats.errors
from nats.aio.client import DEFAULT_FLUSH_TIMEOUT, PING_PROTO, Client, Srv
from nats.aio.subscription import Subscription
from nats.aio.transport import TcpTransport

T = TypeVar("T")

# The server is asked for a sign of life this often. Every wait that ends in a verdict on others is longer
# than DEAF_AFTER_PINGS of these, so that who hears nobody knows it first (docs/architecture.md, rule 8).
PING_EVERY_S = 0.25
DEAF_AFTER_PINGS = 4
# Then another connection is tried, to another server if there is one.
HANG_UP_AFTER_PINGS = 20


def _do_nothing() -> None: ...


class BarrierClient(Client):
    """Sends a PING only behind all that was sent before it, and says whether it hears the server.

    nats-py writes the PING straight to the socket while SUB, UNSUB and PUB may still wait in its buffer.
    The PONG then proves nothing: `flush` returns before the server knows of a subscription, and `drain`
    before the last messages have come, which are then dropped.
    """

    def __init__(
        self, on_deaf: Callable[[], None] = _do_nothing, on_heard_again: Callable[[], None] = _do_nothing
    ) -> None:
        """`on_deaf` is called when a connection that stands has become silent, the other when it is not."""
        super().__init__()
        self._on_deaf = on_deaf
        self._on_heard_again = on_heard_again
        self._num_silent_pings = 0

    @property
    def is_hearing(self) -> bool:
        """Connected, and the server has said something lately."""
        return bool(self.is_connected) and self._num_silent_pings < DEAF_AFTER_PINGS

    async def flush(self, timeout: float = DEFAULT_FLUSH_TIMEOUT) -> None:
        await _cancellable(super().flush(timeout))  # type: ignore[arg-type]

    def forget(self, subscription: Subscription) -> None:
        """Drop a subscription without a word to the server, which may be gone.

        One that could not be drained stays in nats-py's books, and the next reconnect brings it back to life.
        """
        subscription._stop_processing()
        self._remove_sub(subscription._id)

    # --- in the place of nats-py's own ------------------------------------------------------------

    async def _flush_pending(self, force_flush: bool = False) -> Any:
        return await _cancellable(super()._flush_pending(force_flush))

    async def _send_ping(self, future: asyncio.Future[Any] | None = None) -> None:
        await self._flush_pending(force_flush=True)
        await super()._send_ping(future)

    async def _process_pong(self) -> None:
        if self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()  # who waited has left
        await super()._process_pong()
        self._heard()

    async def _read_loop(self) -> None:
        await super()._read_loop()
        if self.is_connected:  # so it has failed: nobody has cut the connection, and nobody hears it any more
            await self._process_op_err(nats.errors.StaleConnectionError())

    async def _ping_interval(self) -> None:
        """Until cancelled: one beat after the other, each with a ping on its way.

        Silence is counted in beats, not on the clock: a process that was held up itself has missed one.
        """
        self._num_silent_pings = 0
        while True:
            num_heard = self._num_heard()
            if not self._pongs and self._transport is not None:
                # Straight to the socket, where it waits for nobody; what waits outlives the connection.
                self._pongs.append(asyncio.get_running_loop().create_future())
                self._transport.write(PING_PROTO)
            await asyncio.sleep(PING_EVERY_S)
            if self._num_heard() != num_heard:
                self._heard()
                continue
            self._num_silent_pings += 1
            if self._num_silent_pings == DEAF_AFTER_PINGS:
                self._on_deaf()
            if self._num_silent_pings == HANG_UP_AFTER_PINGS:
                self._drop_socket()
                await self._process_op_err(nats.errors.StaleConnectionError())
                return

    async def _connect_to_server(self, s: Srv) -> None:
        self._drop_socket()  # of the attempt before, if that has failed
        await super()._connect_to_server(s)

    def _drop_socket(self) -> None:
        """At once: a close would wait until all is sent, which a silent server does not take."""
        writer = self._transport._io_writer if isinstance(self._transport, TcpTransport) else None
        if writer is not None:
            writer.transport.abort()

    def _num_heard(self) -> int:
        return int(self.stats["in_msgs"]) + int(self._pongs_received)

    def _heard(self) -> None:
        was_deaf = self._num_silent_pings >= DEAF_AFTER_PINGS
        self._num_silent_pings = 0
        if was_deaf:
            self._on_heard_again()


async def _cancellable(wait: Awaitable[T]) -> T:
    """`wait`, but a cancel that it catches is raised all the same."""
    task = asyncio.current_task()
    assert task is not None
    num_cancels = task.cancelling()
    result = await wait
    if task.cancelling() > num_cancels:
        raise asyncio.CancelledError
    return result
