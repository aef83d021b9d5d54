"""What TCP and shared memory have in common: a listener that survives any peer, and links that reconnect.

Knows frames and reservations; how bytes get from pool to pool is the business of the two.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import functools
import logging
import socket
from collections.abc import Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Generic, Self, TypeVar

from flowkv_common.errors import BadRequest, FlowKVError, Stale
from flowkv_common.kv.alignment import Copy, ids_of
from flowkv_common.kv.connector import ConnectorUnavailable, KVLink, Landing, Landings, Pool, find_stray
from flowkv_common.kv.connectors import sockets
from flowkv_common.kv.connectors.frames import MAX_HELLO_BYTES, Channel, Hello, Refused, Reply, Transfer
from flowkv_common.kv.connectors.link import StreamLink
from flowkv_common.kv.connectors.sockets import LOOPBACK, Place
from flowkv_common.wire.parts import Run

logger = logging.getLogger(__name__)

_BACKLOG = 128
_ACCEPT_RETRY_S = 0.1
# Connections of one listener that have not shown the secret. One more costs the oldest its place: whoever has
# the secret shows it at once.
MAX_STRANGERS = 64

Land = Callable[[list[Copy], Landing], Awaitable[int]]
P = TypeVar("P", bound=Pool)


class StreamConnector(abc.ABC, Generic[P]):
    """A connector of pools of type `P` over stream sockets. Its tasks end with its `async with` block."""

    name: str

    def __init__(
        self,
        pool: P,
        landings: Landings,
        admits: Callable[[str], bool],
        *,
        place: Place = LOOPBACK,
        io_timeout_s: float = 10.0,
    ) -> None:
        self._pool = pool
        self._landings = landings
        self._admits = admits
        self._place = place
        self._io_timeout_s = io_timeout_s
        self._tasks = asyncio.TaskGroup()
        self._serving: set[asyncio.Task[None]] = set()
        # Connections that have not shown the secret, the oldest first, and who serves them.
        self._strangers: dict[socket.socket, asyncio.Task[None]] = {}
        self._is_crowded = False
        self._links: list[StreamLink] = []
        self._resources = contextlib.ExitStack()  # given back after the last task has ended

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._serving:
            task.cancel()
        try:
            await self._tasks.__aexit__(None, None, None)  # an error of the body stays what it is
        finally:
            self._resources.close()
            for link in self._links:
                await link.close()

    @property
    def connect_timeout_s(self) -> float:
        """To reach the peer, to be greeted, and to be introduced."""
        return 3 * self._io_timeout_s

    async def listen(self) -> str:
        """Begins to serve; returns the address that peers connect to. Raises `OSError`."""
        listener, address = await self._bind()
        self._resources.enter_context(listener)
        listener.setblocking(False)
        listener.listen(_BACKLOG)
        self._start(self._accept(listener))
        return address

    async def connect(self, address: str, token: str, num_blocks: int) -> KVLink:
        """A probed link, see `KVConnector`."""

        async def dial() -> Channel:
            return await self._dial(address, token)

        link = StreamLink(self.name, self._pool, num_blocks, dial, self._push)
        await link.open()
        self._links = [other for other in self._links if not other.closed]
        self._links.append(link)
        return link

    # --- what a transport brings -------------------------------------------------------------------

    @abc.abstractmethod
    async def _bind(self) -> tuple[socket.socket, str]:
        """A bound socket and the address that leads to it."""

    @abc.abstractmethod
    async def _open_socket(self, address: str) -> socket.socket:
        """A non-blocking socket connected to `address`. Raises `OSError`."""

    @abc.abstractmethod
    async def _introduce(self, channel: Channel) -> None:
        """What a sender does between the greeting and its first transfer. Raises `OSError`, `Refused`."""

    @abc.abstractmethod
    async def _push(self, channel: Channel, copies: list[Copy]) -> int:
        """What a sender does between a transfer's frame and its confirmation; returns calls made."""

    @abc.abstractmethod
    async def _receive_from(self, channel: Channel, hello: Hello) -> None:
        """Serves a sender that has been greeted, until it hangs up: brings the `Land` to `_answer`."""

    # --- receiving ---------------------------------------------------------------------------------

    async def _answer(self, channel: Channel, hello: Hello, land: Land) -> None:
        """Serves one transfer after the other until the connection ends, which is an `OSError`."""
        while True:
            await channel.arrival()
            transfer = await channel.receive(Transfer)
            try:
                reply = Reply(num_calls=await self._land(transfer, hello, land))
            except FlowKVError as refusal:
                reply = Reply(error=refusal.message)
            await channel.send(reply)

    async def _land(self, transfer: Transfer, hello: Hello, land: Land) -> int:
        stray = find_stray(transfer.copies, hello.num_blocks, self._pool.num_blocks)
        if stray is not None:
            raise BadRequest(f"{stray} is outside the pools")
        dst_blocks = ids_of(Run(copy.dst, copy.length) for copy in transfer.copies)
        with self._landings.landing(transfer.transfer_id, transfer.token, dst_blocks) as landing:
            num_calls = await land(transfer.copies, landing)
            if landing.revoked:
                raise Stale(f"the reservation of transfer {transfer.transfer_id} has ended")
            return num_calls

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:
                # Out of descriptors, say. The kernel tells that also while nobody knocks.
                if sockets.is_readable(listener):
                    logger.warning("%s: can't accept: %s", self.name, error)
                    self._drop_oldest_stranger()
                await asyncio.sleep(_ACCEPT_RETRY_S)
            else:
                self._strangers[sock] = serving = self._start(self._serve(sock))
                serving.add_done_callback(functools.partial(self._done, sock))  # it may never get to run
                self._bound_strangers()
                # Between any two, however many wait, those who are here get their turn.
                await asyncio.sleep(0)

    def _bound_strangers(self) -> None:
        if len(self._strangers) <= MAX_STRANGERS:
            return
        if not self._is_crowded:
            logger.warning("%s: over %d connections show no secret: the oldest go", self.name, MAX_STRANGERS)
        self._is_crowded = True
        self._drop_oldest_stranger()

    def _drop_oldest_stranger(self) -> None:
        if oldest := next(iter(self._strangers), None):
            self._strangers.pop(oldest).cancel()

    def _done(self, sock: socket.socket, _: asyncio.Task[None]) -> None:
        sock.close()
        self._strangers.pop(sock, None)
        if not self._strangers:
            self._is_crowded = False

    async def _serve(self, sock: socket.socket) -> None:
        """One connection. Whatever a peer does costs only this."""
        with Channel(sock, self._io_timeout_s) as channel:
            try:
                async with channel.deadline():
                    hello = await channel.receive(Hello, MAX_HELLO_BYTES)
                objection = self._objection(hello)
                if objection is None:
                    self._strangers.pop(sock, None)
                await channel.send(Reply(error=objection))
                if objection is None:
                    await self._receive_from(channel, hello)
                else:
                    logger.warning("%s: refused a peer: %s", self.name, objection)
            except OSError as error:
                logger.info("%s: a connection ended: %s", self.name, error)
            except Exception:
                logger.exception("%s: a connection failed", self.name)

    def _objection(self, hello: Hello) -> str | None:
        if not self._admits(hello.token):
            return "wrong link token"
        if hello.layout != repr(self._pool.layout):
            return f"layouts differ: receiver {self._pool.layout!r}, sender {hello.layout}"
        return None

    def _start(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = self._tasks.create_task(work)
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        return task

    # --- sending -----------------------------------------------------------------------------------

    async def _dial(self, address: str, token: str) -> Channel:
        """A greeted connection. Raises `ConnectorUnavailable`."""
        with contextlib.ExitStack() as undo:
            try:
                async with asyncio.timeout(self._io_timeout_s):
                    sock = await self._open_socket(address)
                channel = undo.enter_context(Channel(sock, self._io_timeout_s))
                layout = repr(self._pool.layout)
                await channel.send(Hello(token=token, layout=layout, num_blocks=self._pool.num_blocks))
                await channel.expect_yes()
                await self._introduce(channel)
            except (OSError, Refused) as error:
                raise ConnectorUnavailable(f"{self.name} to {address}: {error or 'out of time'}") from error
            undo.pop_all()
            return channel
