"""Waiting in the event loop for a thread that touches a pool."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import functools
import logging
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Generic, Self, TypeVar

from flowkv_common.errors import BadRequest, FlowKVError, Stale, TransferFailed
from flowkv_common.wire.messages import Run
from flowkv_engine.kv.pool import Pool
from flowkv_engine.kv.reservations import Reservation, Reservations
from flowkv_engine.kv.segments import Copy, ids_of
from flowkv_engine.transport import sockets
from flowkv_engine.transport.base import (
    ConnectorUnavailable,
    KVLink,
    TransferStats,
    find_stray,
)
from flowkv_engine.transport.sockets import (
    LOOPBACK,
    MAX_HELLO_BYTES,
    Channel,
    Hello,
    Place,
    Refused,
    Reply,
    Transfer,
)

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


# What one frame asks for: little enough that its confirmation comes well within the deadline of a step,
# much enough that most requests need one.
_MAX_FRAME_PAYLOAD_BYTES = 1 << 30
_MAX_FRAME_BLOCKS = 8192


class StreamLink:
    """A `KVLink`. `dial` gives a greeted connection, `push` moves the copies of one frame."""

    def __init__(
        self,
        name: str,
        pool: Pool,
        num_peer_blocks: int,
        dial: Callable[[], Awaitable[Channel]],
        push: Callable[[Channel, list[Copy]], Awaitable[int]],
    ) -> None:
        self.name = name
        self._pool = pool
        self._num_peer_blocks = num_peer_blocks
        self._dial = dial
        self._push = push
        self._turn = asyncio.Lock()
        self._channel: Channel | None = None
        self._is_closed = False
        self._is_lost = False

    @property
    def closed(self) -> bool:
        return self._is_closed

    @property
    def is_lost(self) -> bool:
        return self._is_lost

    async def open(self) -> None:
        """Dials now, as a probe. Raises `ConnectorUnavailable`."""
        self._channel = await self._dial()

    async def send(self, transfer_id: str, token: str, copies: Sequence[Copy]) -> TransferStats:
        """See `KVLink.send`."""
        stray = find_stray(copies, self._pool.num_blocks, self._num_peer_blocks)
        if stray is not None:
            raise TransferFailed(f"{stray} is outside the pools")
        started = time.perf_counter()
        num_calls = 0
        async with self._turn:
            for part in _frames(copies, self._blocks_per_frame()):
                num_calls += await self._exchange(Transfer(transfer_id=transfer_id, token=token, copies=part))
        return TransferStats(
            num_bytes=sum(copy.length for copy in copies) * self._pool.layout.block_bytes,
            num_copies=len(copies),
            num_calls=num_calls,
            duration_s=time.perf_counter() - started,
        )

    async def close(self) -> None:
        """See `KVLink.close`."""
        self._is_closed = True
        async with self._turn:
            self._hang_up()

    async def _exchange(self, transfer: Transfer) -> int:
        """Sends one frame and waits for its confirmation; returns calls made on both sides."""
        try:
            channel = await self._connected()
            await channel.send(transfer)
            num_pushed = await self._push(channel, transfer.copies)
            return num_pushed + (await channel.expect_yes()).num_calls
        except Refused as refusal:
            raise TransferFailed(f"{self.name}: refused: {refusal}") from refusal
        except (OSError, ConnectorUnavailable) as error:
            self._hang_up()
            raise TransferFailed(f"{self.name}: {error}") from error
        except BaseException:  # cancelled, maybe with half a frame on the wire
            self._hang_up()
            raise

    async def _connected(self) -> Channel:
        if self._is_closed:
            raise TransferFailed(f"{self.name}: the link is closed")
        if self._channel is not None and not self._channel.is_quiet():
            self._hang_up()
        if self._channel is None:
            try:
                self._channel = await self._dial()
            except ConnectorUnavailable:
                self._is_lost = True
                raise
            self._is_lost = False
        return self._channel

    def _hang_up(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _blocks_per_frame(self) -> int:
        by_bytes = _MAX_FRAME_PAYLOAD_BYTES // self._pool.layout.block_bytes
        return min(_MAX_FRAME_BLOCKS, max(1, by_bytes))


def _frames(copies: Sequence[Copy], num_blocks: int) -> Iterator[list[Copy]]:
    """Cuts `copies` into lists of at most `num_blocks` blocks each."""
    frame: list[Copy] = []
    space = num_blocks
    for src, dst, length in copies:
        done = 0
        while done < length:
            step = min(space, length - done)
            frame.append(Copy(src + done, dst + done, step))
            done += step
            space -= step
            if not space:
                yield frame
                frame, space = [], num_blocks
    if frame:
        yield frame


logger = logging.getLogger(__name__)

_BACKLOG = 128
_ACCEPT_RETRY_S = 0.1
# Connections of one listener that have not shown the secret. One more costs the oldest its place: whoever has
# the secret shows it at once.
MAX_STRANGERS = 64

Land = Callable[[list[Copy], Reservation], Awaitable[int]]
P = TypeVar("P", bound=Pool)


class StreamConnector(abc.ABC, Generic[P]):
    """A connector of pools of type `P` over stream sockets. Its tasks end with its `async with` block."""

    name: str

    def __init__(
        self,
        pool: P,
        reservations: Reservations,
        admits: Callable[[str], bool],
        *,
        place: Place = LOOPBACK,
        io_timeout_s: float = 10.0,
    ) -> None:
        self._pool = pool
        self._reservations = reservations
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
        with self._reservations.copying(transfer.transfer_id, transfer.token, dst_blocks) as reservation:
            num_calls = await land(transfer.copies, reservation)
            if reservation.revoked:
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
