"""Listening and dialling on the two kinds of sockets that nodes talk over. Knows no frames."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import select
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Self, TypeVar

import msgspec

from flowkv_engine.kv.segments import Copy

# A host that died without a word is found out after about a minute.
_KEEPALIVE = {socket.TCP_KEEPIDLE: 30, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 3}
# An address of a name that has not answered for so long gets company by the next one (RFC 8305).
_NEXT_ADDRESS_S = 0.25
# A Unix socket with a full queue says so at once, instead of letting wait.
_FULL_QUEUE_S = 0.01
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


class Place(NamedTuple):
    """Where a node's sockets are, and how its peers reach them."""

    host: str = "127.0.0.1"  # what TCP binds to, a name or an address
    port: int = 0  # 0: any free one
    reached_at: str = ""  # the name or address that peers dial; `host` if empty
    reached_on: int = 0  # the port that peers dial; the bound one if 0
    socket_dir: str | None = None  # holds the folders of Unix sockets; the system's temporary one if None


LOOPBACK = Place()


def bind_unix(place: Place, lifetime: contextlib.ExitStack) -> tuple[socket.socket, str]:
    """A socket bound in a folder that only this user can enter, which `lifetime` removes; and its path."""
    folder = lifetime.enter_context(tempfile.TemporaryDirectory(prefix="flowkv-", dir=place.socket_dir))
    address = str(Path(folder, "pool.sock"))
    return _bound(socket.AF_UNIX, address), address


async def dial_unix(address: str) -> socket.socket:
    """A non-blocking socket connected to a path. Raises `OSError`."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        while True:
            try:
                sock.connect(address)
            except BlockingIOError:  # asyncio would take the socket for connected
                await asyncio.sleep(_FULL_QUEUE_S)
            else:
                return sock
    except BaseException:
        sock.close()
        raise


async def bind_tcp(place: Place) -> tuple[socket.socket, str]:
    """A bound socket, and the `host:port` that leads to it. Raises `OSError`.

    Of a name's addresses it is the first that this host has: a name may have one of IPv6 where there is none.
    """
    found = await asyncio.get_running_loop().getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
    failed = OSError(f"{place.host} has no address")
    for family, _, _, _, address in found:
        try:
            listener = _bound(family, address)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            failed = error
            continue
        port = place.reached_on or listener.getsockname()[1]
        return listener, join_host_port(place.reached_at or place.host, port)
    raise failed


async def dial_tcp(address: str) -> socket.socket:
    """A non-blocking socket connected to `host:port`, by whichever of the host's addresses answers first.

    Raises `OSError`.
    """
    host, port = split_host_port(address)
    try:
        transport, _ = await asyncio.get_running_loop().create_connection(
            _Unread, host, port, happy_eyeballs_delay=_NEXT_ADDRESS_S
        )
    except ValueError as error:  # of a name with an empty label, one over 63 characters, or a NUL
        raise OSError(f"{host!r} is no name of a host: {error}") from error
    try:
        sock: socket.socket = transport.get_extra_info("socket").dup()
    finally:
        transport.abort()  # closes its own descriptor alone
    try:
        sock.setblocking(False)
        tune_tcp(sock)
    except BaseException:
        sock.close()
        raise
    return sock


class _Unread(asyncio.Protocol):
    """Leaves what the peer says to whoever takes the socket over."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.ReadTransport)
        transport.pause_reading()


def join_host_port(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_host_port(address: str) -> tuple[str, int]:
    """What `join_host_port` has joined. Raises `OSError` for anything else."""
    host, _, port = address.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    is_number = port.isascii() and port.isdigit() and len(port) <= 5
    if not is_number or int(port) > 65535 or (":" in host and not is_bracketed):
        raise OSError(f"{address[:300]!r} is not host:port")
    return host[1:-1] if is_bracketed else host, int(port)


def tune_tcp(sock: socket.socket) -> None:
    """Frames leave at once, and a peer that vanished is noticed."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def is_readable(sock: socket.socket) -> bool:
    """Whether something waits to be read or, at a listener, to be accepted."""
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(0))


def peek(sock: socket.socket) -> bytes | None:
    """The next byte of a non-blocking socket, left there: empty at its end, None if nothing has come."""
    try:
        return sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def _bound(family: int, address: str | tuple[object, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family != socket.AF_UNIX:
            # The kernel keeps a port for a minute after its connections have ended: also from the next life.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except BaseException:
        listener.close()
        raise
    return listener


MAX_FRAME_BYTES = 1 << 20
# Whoever says hello may be anybody: the frame takes a few hundred bytes.
MAX_HELLO_BYTES = 4096
_LENGTH_BYTES = 4
_PIECE_BYTES = 64 << 10


class FrameError(ConnectionError):
    """The peer broke the protocol; nothing that follows on this connection means anything."""


class Refused(Exception):
    """The peer understood and said no. The connection is good for more."""


class Frame(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag=True):
    """Base of all frames: only a frame of the expected type is read."""


class Hello(Frame, frozen=True, kw_only=True):
    """Opens a connection. `layout` must be the receiver's; `num_blocks` is the size of the sender's pool."""

    token: str
    layout: str
    num_blocks: int


class Transfer(Frame, frozen=True, kw_only=True):
    """Copies of one transfer, which bears the secret of its reservation."""

    transfer_id: str
    token: str
    copies: list[Copy]


class Reply(Frame, frozen=True, kw_only=True):
    """Yes, unless there is an `error`. `num_calls`: memory copies that the receiver made."""

    error: str | None = None
    num_calls: int = 0


F = TypeVar("F", bound=Frame)


class Channel:
    """A connected socket that belongs to one task at a time. What enters `lifetime` ends when it is closed.

    Raises `OSError` for all that ends a connection: closed, out of time, garbage.
    """

    def __init__(self, sock: socket.socket, io_timeout_s: float) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.lifetime = contextlib.ExitStack()
        self._io_timeout_s = io_timeout_s
        self._loop = asyncio.get_running_loop()

    async def send(self, frame: Frame) -> None:
        payload = msgspec.json.encode(frame)
        if len(payload) > MAX_FRAME_BYTES:
            raise FrameError(f"a frame of {len(payload)} bytes is over the limit of {MAX_FRAME_BYTES}")
        await self.write(memoryview(len(payload).to_bytes(_LENGTH_BYTES, "big") + payload))

    async def receive(self, kind: type[F], max_bytes: int = MAX_FRAME_BYTES) -> F:
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
        reply = await self.receive(Reply)
        if reply.error is not None:
            raise Refused(reply.error)
        return reply

    async def write(self, view: memoryview) -> None:
        """Hands all of `view` to the kernel, in one step."""
        async with self.deadline():
            await self._loop.sock_sendall(self.sock, view)

    async def arrival(self) -> None:
        """Returns when there is something to read, be it the end. The only wait without a deadline."""
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
        try:
            async with asyncio.timeout(self._io_timeout_s):
                yield
        except TimeoutError:
            raise TimeoutError(f"nothing came or went for {self._io_timeout_s} s") from None

    def is_quiet(self) -> bool:
        """Whether the connection stands and no unasked byte waits, so that a request may go out."""
        return peek(self.sock) is None

    def close(self) -> None:
        self.lifetime.close()
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _read(self, num_bytes: int) -> bytearray:
        """In one step. What is announced but never comes takes no memory."""
        data = bytearray()
        async with self.deadline():
            while missing := num_bytes - len(data):
                piece = await self._loop.sock_recv(self.sock, min(missing, _PIECE_BYTES))
                if not piece:
                    raise ConnectionResetError("closed by the peer")
                data += piece
        return data
