"""KV blocks over TCP, between any two hosts: out of one pool's memory, straight into the other's.

The sender lends the kernel its pages instead of copying them. Blocks that it frees before the confirmation
may arrive with other bytes, and are not committed then. With TLS it encrypts them into the socket instead. A
pool on a GPU is staged at both ends (`staging.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from flowkv_common.wire.messages import Run
from flowkv_engine.kv.pool import KVPool
from flowkv_engine.kv.reservations import Reservation
from flowkv_engine.kv.segments import Copy
from flowkv_engine.transport.staging import StagingBuffers, StagingDevice, pieces
from flowkv_engine.transport.stream import (
    Channel,
    Hello,
    Land,
    Push,
    Reply,
    StreamConnector,
    finish_thread,
    open_thread,
)

# One system call, on either side: as much may still be read after a reservation has ended.
_STEP_BYTES = 1 << 20
_Step = tuple[int, int]  # where it begins in memory, and ends
# A receiver that is woken for every packet spends its time on waking up.
_WAKE_BYTES = 512 << 10
# So much of what is still to come OpenSSL may have taken off the socket: a record.
_RECORD_BYTES = 17 << 10

T = TypeVar("T")


@dataclass(eq=False)
class TcpConnector(StreamConnector):
    name = "tcp"
    is_local = False

    pool: KVPool

    async def introduce(self, channel: Channel) -> Push:
        async def push(copies: list[Copy]) -> int:
            await channel.expect_yes()  # asked first, so that a refusal costs no bytes
            block_bytes = self.pool.layout.block_bytes
            steps: list[_Step] = []
            for copy in copies:
                steps += _steps(copy.src * block_bytes, (copy.src + copy.length) * block_bytes)
            if isinstance(channel.sock, ssl.SSLSocket):
                await _in_thread(channel.sock, _send_copied, self.pool.buffer, steps, self.io_timeout_s)
            else:
                await _in_thread(channel.sock, _send, self.pool.fd, steps, self.io_timeout_s)
            return len(steps)

        return push

    async def welcome(self, channel: Channel, hello: Hello) -> Land:
        async def land(copies: list[Copy], reservation: Reservation) -> int:
            """A revocation ends the connection: the bytes are on the way."""
            views = [self.pool.bytes_of(Run(copy.dst, copy.length)) for copy in copies]
            await channel.send_frame(Reply())
            await _in_thread(channel.sock, _receive, views, lambda: reservation.revoked, self.io_timeout_s)
            return 0

        return land


@dataclass(eq=False)
class StagedTcpConnector(StreamConnector):
    """For a pool on `device`. Its receiver also says whether it has buffers."""

    name = "tcp"
    is_local = False

    device: StagingDevice = field(kw_only=True)

    async def introduce(self, channel: Channel) -> Push:
        buffers = await self._open_buffers(channel)
        await channel.expect_yes()

        async def push(copies: list[Copy]) -> int:
            await channel.expect_yes()
            transfer = list(pieces(copies, self.pool.layout.block_bytes, buffers.buffer_bytes))
            return await _in_thread(channel.sock, _send_staged, buffers, transfer, self.io_timeout_s)

        return push

    async def welcome(self, channel: Channel, hello: Hello) -> Land:
        try:
            buffers = await self._open_buffers(channel)
        except OSError as error:
            await channel.send_frame(Reply(error=str(error)))
            raise
        await channel.send_frame(Reply())

        async def land(copies: list[Copy], reservation: Reservation) -> int:
            """A revocation ends the connection, as without staging."""
            transfer = list(pieces(copies, self.pool.layout.block_bytes, buffers.buffer_bytes))
            await channel.send_frame(Reply())
            work = _receive_staged, buffers, transfer, lambda: reservation.revoked, self.io_timeout_s
            return await _in_thread(channel.sock, *work)

        return land

    async def _open_buffers(self, channel: Channel) -> StagingBuffers:
        """Buffers that end with the channel. Raises `OSError`."""
        thread = open_thread(channel, self.name)

        def open_in_thread() -> StagingBuffers:
            buffers = StagingBuffers(self.device, self.pool.tensor)
            channel.lifetime.callback(thread.submit, buffers.close)
            return buffers

        opening = asyncio.get_running_loop().run_in_executor(thread, open_in_thread)
        return await finish_thread(opening, lambda: None)


async def _in_thread(sock: socket.socket, work: Callable[..., T], *args: object) -> T:
    """What `work(sock, *args)` returns, which other tasks would slow down. A cancel ends the connection.

    A thread for each, since each waits for one of the peer's: in pools of a fixed size, two nodes that send
    to each other could hold all threads and wait for none.
    """

    def shut_down() -> None:
        with contextlib.suppress(OSError):
            # Wakes the thread, which then fails. The method of `SSLSocket` would take TLS off before.
            socket.socket.shutdown(sock, socket.SHUT_RDWR)

    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="flowkv-tcp")
    try:
        working = asyncio.get_running_loop().run_in_executor(thread, work, sock, *args)
        return await finish_thread(working, shut_down)
    finally:
        thread.shutdown(wait=False)


def _steps(begin: int, end: int) -> list[_Step]:
    return [(at, min(at + _STEP_BYTES, end)) for at in range(begin, end, _STEP_BYTES)]


def _send(sock: socket.socket, pool_fd: int, steps: list[_Step], io_timeout_s: float) -> None:
    """Hands one step after the other to the kernel. Raises `OSError`."""
    poller = select.poll()
    poller.register(sock, select.POLLOUT)
    for offset, end in steps:
        while offset < end:
            _await_event(poller, io_timeout_s)
            with contextlib.suppress(BlockingIOError):
                offset += os.sendfile(sock.fileno(), pool_fd, offset, end - offset)


def _send_copied(sock: socket.socket, memory: memoryview, steps: list[_Step], io_timeout_s: float) -> None:
    """Copies one step after the other into the socket, encrypted if it is. Raises `OSError`."""
    poller = select.poll()
    for offset, end in steps:
        while offset < end:
            try:
                offset += sock.send(memory[offset:end])
            except ssl.SSLWantReadError:
                poller.register(sock, select.POLLIN)
                _await_event(poller, io_timeout_s)
            except (BlockingIOError, ssl.SSLWantWriteError):
                poller.register(sock, select.POLLOUT)
                _await_event(poller, io_timeout_s)


def _receive(
    sock: socket.socket, views: list[memoryview], is_revoked: Callable[[], bool], io_timeout_s: float
) -> None:
    """Fills `views`, and asks before each read whether it still may. Raises `OSError`."""
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    is_encrypted = isinstance(sock, ssl.SSLSocket)
    for view in views:
        while view:
            if not is_encrypted:  # where it is, OpenSSL may have more than the socket
                _await_bytes(sock, poller, len(view), io_timeout_s)
            if is_revoked():
                raise ConnectionAbortedError("the reservation ended during the copy")
            try:
                num_received = sock.recv_into(view[:_STEP_BYTES])
            except BlockingIOError:
                continue
            except ssl.SSLWantReadError:
                _await_bytes(sock, poller, len(view) - _RECORD_BYTES, io_timeout_s)
                continue
            if not num_received:
                raise ConnectionResetError("closed by the peer")
            view = view[num_received:]
    _wake_at(sock, 1)


def _send_staged(
    sock: socket.socket, buffers: StagingBuffers, transfer: list[list[Copy]], io_timeout_s: float
) -> int:
    """Sends each piece while the next one is copied out of the pool. Returns the calls. Raises `OSError`."""
    num_calls = 0
    try:
        buffers.gather(0, transfer[0])
        for number, piece in enumerate(transfer):
            buffers.settle()
            for following in transfer[number + 1 : number + 2]:
                buffers.gather(number + 1, following)
            start = buffers.start_of(number)
            steps = _steps(start, start + sum(copy.length for copy in piece))
            _send_copied(sock, buffers.view, steps, io_timeout_s)
            num_calls += len(piece) + len(steps)
    finally:
        buffers.settle()
    return num_calls


def _receive_staged(
    sock: socket.socket,
    buffers: StagingBuffers,
    transfer: list[list[Copy]],
    is_revoked: Callable[[], bool],
    io_timeout_s: float,
) -> int:
    """Receives each piece while the one before is copied into the pool. As `_send_staged`."""
    try:
        for number, piece in enumerate(transfer):
            start = buffers.start_of(number)
            view = buffers.view[start : start + sum(copy.length for copy in piece)]
            _receive(sock, [view], is_revoked, io_timeout_s)
            buffers.settle()
            if is_revoked():
                raise ConnectionAbortedError("the reservation ended during the copy")
            buffers.scatter(number, piece)
    finally:
        buffers.settle()
    return sum(len(piece) for piece in transfer)


def _await_bytes(sock: socket.socket, poller: select.poll, num_bytes: int, io_timeout_s: float) -> None:
    """Returns when many bytes can be read at once, at most `num_bytes`. Raises `TimeoutError`."""
    _wake_at(sock, max(1, min(_WAKE_BYTES, num_bytes)))
    _await_event(poller, io_timeout_s)


def _await_event(poller: select.poll, io_timeout_s: float) -> None:
    if not poller.poll(io_timeout_s * 1000):
        raise TimeoutError(f"nothing came or went for {io_timeout_s} s")


def _wake_at(sock: socket.socket, num_bytes: int) -> None:
    """The socket counts as readable once it holds that much, or has ended."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, num_bytes)
