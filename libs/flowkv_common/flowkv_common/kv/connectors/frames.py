"""What sender and receiver say on a socket: JSON frames with a length in front, raw bytes between.

    sender    Hello             Transfer [bytes]         Transfer ...
    receiver         Reply                       Reply

Every wait but the one for the next transfer has a deadline. Knows no pool and no reservation.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Self, TypeVar

import msgspec

from flowkv_common.kv.alignment import Copy
from flowkv_common.kv.connectors import sockets

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
        return sockets.peek(self.sock) is None

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
