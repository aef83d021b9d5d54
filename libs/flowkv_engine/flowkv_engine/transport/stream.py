"""KV over stream sockets: the frames that two nodes exchange, and what all connectors on sockets share.

A sender dials and greets with a `Hello`. Then it sends `Transfer` after `Transfer`; the bytes move as the
transport moves them, and a `Reply` confirms that they have landed.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import functools
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar, Self, TypeVar

import msgspec

from flowkv_common.aio import running
from flowkv_common.errors import BadRequest, FlowKVError, Stale, TransferFailed
from flowkv_common.wire.messages import Run
from flowkv_engine.kv.pool import Pool
from flowkv_engine.kv.reservations import Reservation, Reservations
from flowkv_engine.kv.segments import Copy, cut, ids_of
from flowkv_engine.transport import sockets, tls
from flowkv_engine.transport.base import ConnectorUnavailable, KVLink, TransferStats, find_stray
from flowkv_engine.transport.sockets import LOOPBACK, Place

log = logging.getLogger(__name__)

MAX_FRAME_BYTES = 1 << 20
# A `Hello` takes a few hundred bytes, 50 more for each layer where they differ, and any process may send one.
MAX_HELLO_BYTES = 16384
_LENGTH_BYTES = 4
_PIECE_BYTES = 64 << 10
# What one `Transfer` asks for: little enough that its confirmation comes well within the deadline of a step,
# much enough that most requests need one.
_MAX_TRANSFER_BYTES = 1 << 30
_MAX_TRANSFER_BLOCKS = 8192

_ACCEPT_RETRY_S = 0.1
# Connections of one listener that have not shown the secret. One more costs the oldest its place: a peer that
# has the secret shows it at once.
MAX_UNAUTHENTICATED = 64
# Of several ways to a peer one that has not greeted for so long is left for the next.
_NEXT_WAY_S = 2.0

T = TypeVar("T")
F = TypeVar("F", bound="Frame")
# Moves the bytes of one `Transfer`, from its sender and into its receiver; returns the calls made. A push
# raises `ConnectorUnavailable` where the transport turns out not to work between the two.
Push = Callable[[list[Copy]], Awaitable[int]]
Land = Callable[[list[Copy], Reservation], Awaitable[int]]


class Frame(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag=True):
    """Base of all frames: only a frame of the expected type is read."""


class Hello(Frame, frozen=True, kw_only=True):
    """Opens a connection. `layout` must be the receiver's; `num_blocks` is the size of the sender's pool."""

    token: str
    layout: str
    num_blocks: int


class Transfer(Frame, frozen=True, kw_only=True):
    """Copies of one transfer, with the secret of its reservation."""

    transfer_id: str
    token: str
    copies: list[Copy]


class Reply(Frame, frozen=True, kw_only=True):
    """Yes, unless there is an `error`. `num_calls`: memory copies that the receiver made."""

    error: str | None = None
    num_calls: int = 0


class FrameError(ConnectionError):
    """The peer broke the protocol; nothing that follows on this connection means anything."""


class Refused(Exception):
    """The peer understood and said no. The connection is good for more."""


@contextlib.asynccontextmanager
async def within(timeout_s: float | None) -> AsyncIterator[None]:
    """Raises `TimeoutError`, with words, when what happens in it takes longer."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise TimeoutError(str(error) or f"nothing came or went for {timeout_s} s") from None


class Channel:
    """A connected socket that speaks frames. It belongs to one task at a time.

    `way`: where it was dialled. What enters `lifetime` ends when the channel is closed. Raises `OSError` for
    all that ends a connection: closed, out of time, garbage.
    """

    def __init__(self, sock: socket.socket, io_timeout_s: float, way: str = "") -> None:
        sock.setblocking(False)
        self.sock = sock
        self.way = way
        self.lifetime = contextlib.ExitStack()
        self.lifetime.enter_context(sock)
        self._io_timeout_s = io_timeout_s
        self._loop = asyncio.get_running_loop()

    async def send_frame(self, frame: Frame) -> None:
        payload = msgspec.json.encode(frame)
        if len(payload) > MAX_FRAME_BYTES:
            raise FrameError(f"a frame of {len(payload)} bytes is over the limit of {MAX_FRAME_BYTES}")
        await self.write(memoryview(len(payload).to_bytes(_LENGTH_BYTES, "big") + payload))

    async def receive_frame(self, kind: type[F], max_bytes: int = MAX_FRAME_BYTES) -> F:
        """The next frame, which must be a `kind` of at most `max_bytes`."""
        num_bytes = int.from_bytes(await self._read(_LENGTH_BYTES), "big")
        if num_bytes > max_bytes:
            raise FrameError(f"a frame of {num_bytes} bytes is over the limit of {max_bytes}")
        try:
            return msgspec.json.decode(await self._read(num_bytes), type=kind)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise FrameError(f"no {kind.__name__}: {error}") from error

    async def expect_yes(self) -> Reply:
        """The next frame, a reply without error. Raises `Refused` with the peer's words otherwise."""
        reply = await self.receive_frame(Reply)
        if reply.error is not None:
            raise Refused(reply.error)
        return reply

    async def write(self, view: memoryview) -> None:
        """Hands all of `view` to the kernel, in one step."""
        async with self.deadline():
            if isinstance(self.sock, ssl.SSLSocket):
                await tls.send_all(self.sock, view)
            else:
                await self._loop.sock_sendall(self.sock, view)

    async def wait_readable(self) -> None:
        """Returns when there is something to read, be it the end. The only wait without a deadline."""
        if self._num_decrypted():
            return
        arrived = asyncio.Event()
        with self.watching(arrived.set):
            await arrived.wait()

    @contextlib.contextmanager
    def watching(self, on_arrival: Callable[[], None]) -> Iterator[None]:
        """Calls `on_arrival` once if the peer sends or hangs up meanwhile. Nothing may read meanwhile."""

        def arrived() -> None:
            self._loop.remove_reader(self.sock)
            on_arrival()

        self._loop.add_reader(self.sock, arrived)
        try:
            yield
        finally:
            self._loop.remove_reader(self.sock)

    @contextlib.asynccontextmanager
    async def deadline(self) -> AsyncIterator[None]:
        """Raises `TimeoutError`, with words, when a step takes longer than its time."""
        async with within(self._io_timeout_s):
            yield

    def has_ended(self) -> bool:
        """Whether the connection has, and nothing is left to read."""
        return not self._num_decrypted() and self._peek() == b""

    def is_quiet(self) -> bool:
        """Whether the connection stands and no unasked byte waits, so that a request may go out."""
        return not self._num_decrypted() and self._peek() is None

    def close(self) -> None:
        self.lifetime.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _read(self, num_bytes: int) -> bytearray:
        """In one step. What is announced but never comes takes no memory."""
        data = bytearray()
        async with self.deadline():
            while missing := num_bytes - len(data):
                size = min(missing, _PIECE_BYTES)
                if isinstance(self.sock, ssl.SSLSocket):
                    piece = await tls.receive(self.sock, size)
                else:
                    piece = await self._loop.sock_recv(self.sock, size)
                if not piece:
                    raise ConnectionResetError("closed by the peer")
                data += piece
        return data

    def _peek(self) -> bytes | None:
        """The next byte as it is on the wire, left there: empty at the end, None if nothing has come."""
        try:
            return socket.socket.recv(self.sock, 1, socket.MSG_PEEK)  # with TLS, beneath it
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def _num_decrypted(self) -> int:
        """Bytes of a record of TLS that is read in part: the socket tells nothing of them."""
        return self.sock.pending() if isinstance(self.sock, ssl.SSLSocket) else 0


@dataclass(eq=False)
class StreamConnector(abc.ABC):
    """A `KVConnector` over sockets. Its tasks end with its `async with` block."""

    name: ClassVar[str]
    is_local: ClassVar[bool]  # both nodes must be on one host and talk over Unix sockets, else over TCP

    pool: Pool
    reservations: Reservations
    admits: Callable[[str], bool]
    _: KW_ONLY
    place: Place = LOOPBACK
    io_timeout_s: float = 10.0
    # Connections that have not shown the secret, the oldest first, and the tasks that serve them.
    _unauthenticated: dict[socket.socket, asyncio.Task[None]] = field(default_factory=dict, init=False)
    _links: list[StreamLink] = field(default_factory=list, init=False)
    _opened: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack, init=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self._opened.aclose()  # is not told of the block's error, which stays what it is
        finally:
            for link in self._links:
                await link.close()

    @property
    def connect_timeout_s(self) -> float:
        """To reach the peer, to be greeted, and to be introduced."""
        return 3 * self.io_timeout_s

    async def listen(self) -> str:
        """See `KVConnector.listen`."""
        if self.is_local:
            listener, address = sockets.listen_unix(self.place, self._opened)
        else:
            listener, address = await sockets.listen_tcp(self.place)
        self._opened.enter_context(listener)
        listener.setblocking(False)
        await self._opened.enter_async_context(running(self._accept(listener)))
        return address

    async def connect(self, address: str, token: str, num_blocks: int) -> KVLink:
        """See `KVConnector.connect`."""
        link = StreamLink(self, address, token, num_blocks)
        await link.probe()
        self._links = [other for other in self._links if not other.closed]
        self._links.append(link)
        return link

    # --- what a transport brings -------------------------------------------------------------------

    @abc.abstractmethod
    async def introduce(self, channel: Channel) -> Push | None:
        """What a sender does after the greeting. Returns what moves the bytes between a `Transfer` and its
        confirmation; None where the receiver pulls them. Raises `OSError`, `Refused`."""

    @abc.abstractmethod
    async def welcome(self, channel: Channel, hello: Hello) -> Land:
        """What a receiver does after the greeting. Returns what lands the bytes of a `Transfer`: it may write
        until it returns or raises, and heeds a revocation. Raises `OSError`."""

    # --- receiving ---------------------------------------------------------------------------------

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        is_crowded = False
        async with asyncio.TaskGroup() as serving:
            while True:
                try:
                    sock, _ = await loop.sock_accept(listener)
                except OSError as error:
                    # Out of descriptors, say. The kernel says so also while no connection waits.
                    if sockets.is_readable(listener):
                        log.warning("%s: can't accept: %s", self.name, error)
                        self._drop_oldest_unauthenticated()
                    await asyncio.sleep(_ACCEPT_RETRY_S)
                    continue
                is_crowded &= bool(self._unauthenticated)
                task = self._unauthenticated[sock] = serving.create_task(self._serve(sock))
                # Here, not in `_serve`: a task that is cancelled at once never runs.
                task.add_done_callback(functools.partial(self._connection_ended, sock))
                if len(self._unauthenticated) > MAX_UNAUTHENTICATED:
                    if not is_crowded:
                        text = "%s: over %d connections show no secret: the oldest go"
                        log.warning(text, self.name, MAX_UNAUTHENTICATED)
                    is_crowded = True
                    self._drop_oldest_unauthenticated()
                # However many wait, the connections that are served get their turn between any two.
                await asyncio.sleep(0)

    def _drop_oldest_unauthenticated(self) -> None:
        if oldest := next(iter(self._unauthenticated), None):
            self._unauthenticated.pop(oldest).cancel()

    def _connection_ended(self, sock: socket.socket, _: asyncio.Task[None]) -> None:
        sock.close()
        self._unauthenticated.pop(sock, None)

    async def _serve(self, sock: socket.socket) -> None:
        """One connection. Whatever a peer does costs only this."""
        accepted = sock
        try:
            if not self.is_local:
                sockets.tune_tcp(sock)
                async with within(self.io_timeout_s):
                    sock = await self._encrypted(sock, is_server=True)
            with Channel(sock, self.io_timeout_s) as channel:
                async with channel.deadline():
                    hello = await channel.receive_frame(Hello, MAX_HELLO_BYTES)
                if (objection := self._why_refused(sock, hello)) is not None:
                    await channel.send_frame(Reply(error=objection))
                    log.warning("%s: refused a peer: %s", self.name, objection)
                    return
                self._unauthenticated.pop(accepted, None)
                await channel.send_frame(Reply())
                land = await self.welcome(channel, hello)
                while True:
                    await channel.wait_readable()
                    transfer = await channel.receive_frame(Transfer)
                    try:
                        reply = Reply(num_calls=await self._land_transfer(transfer, hello, land))
                    except FlowKVError as refusal:
                        reply = Reply(error=refusal.message)
                    await channel.send_frame(reply)
        except OSError as error:
            is_stranger = isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError)
            level = logging.WARNING if is_stranger else logging.INFO
            log.log(level, "%s: a connection ended: %s", self.name, error)
        except Exception:
            log.exception("%s: a connection failed", self.name)

    def _why_refused(self, sock: socket.socket, hello: Hello) -> str | None:
        if isinstance(sock, ssl.SSLSocket) and (objection := tls.why_not_a_node(sock)):
            return objection
        if not self.admits(hello.token):
            return "wrong link token"
        if hello.layout != repr(self.pool.layout):
            return f"layouts differ: receiver {self.pool.layout!r}, sender {hello.layout}"
        return None

    async def _land_transfer(self, transfer: Transfer, hello: Hello, land: Land) -> int:
        stray = find_stray(transfer.copies, hello.num_blocks, self.pool.num_blocks)
        if stray is not None:
            raise BadRequest(f"{stray} is outside the pools")
        dst_blocks = ids_of(Run(copy.dst, copy.length) for copy in transfer.copies)
        with self.reservations.copying(transfer.transfer_id, transfer.token, dst_blocks) as reservation:
            num_calls = await land(transfer.copies, reservation)
            if reservation.revoked:
                raise Stale(f"the reservation of transfer {transfer.transfer_id} has ended")
            return num_calls

    # --- sending -----------------------------------------------------------------------------------

    async def dial(self, address: str, token: str) -> tuple[Channel, Push | None]:
        """A connection that is greeted and introduced, on the first way of `address` that leads to the peer.

        Raises `ConnectorUnavailable` with what is wrong with each.
        """
        ways = [address] if self.is_local else self._ways_to(address)
        reasons = []
        for way in ways:
            try:
                async with within(None if way is ways[-1] else _NEXT_WAY_S):
                    channel = await self._greet(way, token)
            except (OSError, Refused) as error:
                reasons.append(f"{self.name} to {way}: {error}")
                continue
            with contextlib.ExitStack() as undo:
                undo.enter_context(channel)
                try:
                    push = await self.introduce(channel)
                except (OSError, Refused) as error:
                    raise ConnectorUnavailable(f"{self.name} to {way}: {error}") from error
                undo.pop_all()
                return channel, push
        raise ConnectorUnavailable("; ".join(reasons))

    def _ways_to(self, address: str) -> list[str]:
        """`host:port` of each. Raises `ConnectorUnavailable` if one end has TLS and the other not."""
        ways, wants_tls = sockets.split_address(address)
        if wants_tls and self.place.tls is None:
            raise ConnectorUnavailable("the peer wants TLS: set FLOWKV_DATA_TLS_CERT here, too")
        if not wants_tls and self.place.tls is not None:
            raise ConnectorUnavailable("the peer has no TLS: set FLOWKV_DATA_TLS_CERT there, too")
        return ways

    async def _greet(self, way: str, token: str) -> Channel:
        """A connection whose other end has let us in. Raises `OSError`, `Refused`."""
        dial_socket = sockets.dial_unix if self.is_local else sockets.dial_tcp
        layout = repr(self.pool.layout)
        with contextlib.ExitStack() as undo:
            async with within(self.io_timeout_s):
                sock = undo.enter_context(await dial_socket(way))
                if not self.is_local:
                    sock = undo.enter_context(await self._encrypted(sock, is_server=False))
            channel = undo.enter_context(Channel(sock, self.io_timeout_s, way))
            await channel.send_frame(Hello(token=token, layout=layout, num_blocks=self.pool.num_blocks))
            await channel.expect_yes()
            undo.pop_all()
            return channel

    async def _encrypted(self, sock: socket.socket, *, is_server: bool) -> socket.socket:
        """The socket with TLS on it, where this node has that. Raises `OSError`."""
        if self.place.tls is None:
            return sock
        return await tls.shake_hands(sock, self.place.tls, is_server=is_server)


class StreamLink:
    """A `KVLink` of a `StreamConnector`, to the peer that listens at `address`."""

    def __init__(self, connector: StreamConnector, address: str, token: str, num_peer_blocks: int) -> None:
        self.name = connector.name
        self.closed = False
        self.is_lost = False
        self._connector = connector
        self._address = address
        self._token = token
        self._num_peer_blocks = num_peer_blocks
        self._turn = asyncio.Lock()
        self._channel: Channel | None = None
        self._push: Push | None = None
        self._num_sent_bytes = 0  # on this connection

    async def probe(self) -> None:
        """Dials now. Raises `ConnectorUnavailable`."""
        self._channel, self._push = await self._connector.dial(self._address, self._token)
        self._num_sent_bytes = 0

    async def send_blocks(self, transfer_id: str, token: str, copies: Sequence[Copy]) -> TransferStats:
        """See `KVLink.send_blocks`."""
        stray = find_stray(copies, self._connector.pool.num_blocks, self._num_peer_blocks)
        if stray is not None:
            raise TransferFailed(f"{stray} is outside the pools")
        block_bytes = self._connector.pool.layout.block_bytes
        max_blocks = min(_MAX_TRANSFER_BLOCKS, max(1, _MAX_TRANSFER_BYTES // block_bytes))
        num_calls = 0
        async with self._turn:
            for part in cut(copies, max_blocks):
                num_calls += await self._exchange(Transfer(transfer_id=transfer_id, token=token, copies=part))
        return TransferStats(
            num_bytes=sum(copy.length for copy in copies) * block_bytes,
            num_copies=len(copies),
            num_calls=num_calls,
        )

    async def close(self) -> None:
        """See `KVLink.close`."""
        self.closed = True
        async with self._turn:
            self._hang_up()

    async def _exchange(self, transfer: Transfer) -> int:
        """Sends one frame and its bytes, and waits for the confirmation; returns calls made on both sides."""
        try:
            channel = await self._connected()
            self._num_sent_bytes += self._connector.pool.layout.block_bytes * sum(
                copy.length for copy in transfer.copies
            )
            await channel.send_frame(transfer)
            num_pushed = await self._push(transfer.copies) if self._push is not None else 0
            return num_pushed + (await channel.expect_yes()).num_calls
        except Refused as refusal:
            raise TransferFailed(f"{self.name}: refused: {refusal}") from refusal
        except (OSError, ConnectorUnavailable) as error:
            self.is_lost = isinstance(error, ConnectorUnavailable)
            self._hang_up()
            raise TransferFailed(f"{self.name}: {error}") from error
        except BaseException:  # cancelled, maybe with half a frame on the wire
            self._hang_up()
            raise

    async def _connected(self) -> Channel:
        if self.closed:
            raise TransferFailed(f"{self.name}: the link is closed")
        if self._channel is not None and not (self._channel.is_quiet() and self._has_good_keys()):
            self._hang_up()
        if self._channel is None:
            await self.probe()
            self.is_lost = False
        assert self._channel is not None
        return self._channel

    def _has_good_keys(self) -> bool:
        """Whether the connection's keys may encrypt more, where it has keys."""
        assert self._channel is not None
        is_encrypted = isinstance(self._channel.sock, ssl.SSLSocket)
        return not is_encrypted or self._num_sent_bytes < tls.MAX_BYTES_PER_CONNECTION

    def _hang_up(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = self._push = None


def open_thread(channel: Channel, name: str) -> ThreadPoolExecutor:
    """A thread that ends with the channel. One each: where work waits for a peer, it holds up no other's."""
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"flowkv-{name}")
    channel.lifetime.callback(thread.shutdown, wait=False)
    return thread


async def finish_thread(working: asyncio.Future[T], abandon: Callable[[], object]) -> T:
    """The result of a thread. A cancel calls `abandon`, for the thread to see, and waits until it has left.

    A thread can't be interrupted, and blocks that it may still write must not be given out
    (docs/architecture.md, rule 4).
    """
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        abandon()
        while not working.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([working])
        if not working.cancelled():
            working.exception()  # has been looked at: the cancel is what counts
        raise
