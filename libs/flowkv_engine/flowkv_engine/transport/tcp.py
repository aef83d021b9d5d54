"""KV blocks over TCP, between any two hosts: out of one pool's memory, straight into the other's.

The sender lends the kernel its pages instead of copying them. Blocks that it frees before the confirmation
may arrive with other bytes, and are not committed then. With TLS it encrypts them into the socket instead.
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
from dataclasses import dataclass

from flowkv_common.wire.messages import Run
from flowkv_engine.kv.pool import KVPool
from flowkv_engine.kv.reservations import Reservation
from flowkv_engine.kv.segments import Copy
from flowkv_engine.transport.stream import Channel, Hello, Land, Push, Reply, StreamConnector, finish_thread

# One system call, on either side: as much may still be read after a reservation has ended.
_STEP_BYTES = 1 << 20
# A receiver that is woken for every packet spends its time on waking up.
_WAKE_BYTES = 512 << 10
# So much of what is still to come OpenSSL may have taken off the socket: a record.
_RECORD_BYTES = 17 << 10


@dataclass(eq=False)
class TcpConnector(StreamConnector):
    name = "tcp"
    is_local = False

    pool: KVPool

    async def introduce(self, channel: Channel) -> Push:
        async def push(copies: list[Copy]) -> int:
            await channel.expect_yes()  # asked first, so that a refusal costs no bytes
            block_bytes = self.pool.layout.block_bytes
            steps: list[tuple[int, int]] = []  # of each system call: where it begins in the pool, and ends
            for copy in copies:
                begin, end = copy.src * block_bytes, (copy.src + copy.length) * block_bytes
                steps += [(at, min(at + _STEP_BYTES, end)) for at in range(begin, end, _STEP_BYTES)]
            if isinstance(channel.sock, ssl.SSLSocket):
                await _in_thread(channel.sock, _send_encrypted, self.pool.buffer, steps, self.io_timeout_s)
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


async def _in_thread(sock: socket.socket, work: Callable[..., None], *args: object) -> None:
    """Waits for `work(sock, *args)`, which other tasks would slow down. A cancel ends the connection.

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
        await finish_thread(working, shut_down)
    finally:
        thread.shutdown(wait=False)


def _send(sock: socket.socket, pool_fd: int, steps: list[tuple[int, int]], io_timeout_s: float) -> None:
    """Hands one step after the other to the kernel. Raises `OSError`."""
    poller = select.poll()
    poller.register(sock, select.POLLOUT)
    for offset, end in steps:
        while offset < end:
            _await_event(poller, io_timeout_s)
            with contextlib.suppress(BlockingIOError):
                offset += os.sendfile(sock.fileno(), pool_fd, offset, end - offset)


def _send_encrypted(
    sock: ssl.SSLSocket, pool: memoryview, steps: list[tuple[int, int]], io_timeout_s: float
) -> None:
    """Encrypts one step after the other. Raises `OSError`."""
    poller = select.poll()
    for offset, end in steps:
        while offset < end:
            try:
                offset += sock.send(pool[offset:end])
            except ssl.SSLWantReadError:
                poller.register(sock, select.POLLIN)
                _await_event(poller, io_timeout_s)
            except ssl.SSLWantWriteError:
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
