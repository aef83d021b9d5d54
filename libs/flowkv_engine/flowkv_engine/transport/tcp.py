"""KV blocks over TCP, between any two hosts: out of one pool's memory, straight into the other's.

The sender lends the kernel its pages instead of copying them. Blocks that it frees before the confirmation
may arrive with other bytes, and are not committed then.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from flowkv_common.wire.messages import Run
from flowkv_engine.kv.pool import KVPool
from flowkv_engine.kv.reservations import Reservation
from flowkv_engine.kv.segments import Copy
from flowkv_engine.transport.stream import Channel, Hello, Reply, StreamConnector, finish_thread

# One system call, on either side: as much may still be read after a reservation has ended.
_STEP_BYTES = 1 << 20
# A receiver that is woken for every packet spends its time on waking up.
_WAKE_BYTES = 512 << 10


class TcpConnector(StreamConnector[KVPool]):
    name = "tcp"
    is_local = False

    async def introduce(self, channel: Channel) -> None:
        """Nothing to say: the greeting was all."""

    async def push(self, channel: Channel, copies: list[Copy]) -> int:
        await channel.expect_yes()  # asked first, so that a refusal costs no bytes
        block_bytes = self._pool.layout.block_bytes
        steps: list[tuple[int, int]] = []  # of each system call: where it begins in the pool, and ends
        for copy in copies:
            begin, end = copy.src * block_bytes, (copy.src + copy.length) * block_bytes
            steps += [(at, min(at + _STEP_BYTES, end)) for at in range(begin, end, _STEP_BYTES)]
        fd, io_timeout_s = self._pool.fd, self._io_timeout_s
        await _in_thread(channel.sock, lambda: _send(channel.sock, fd, steps, io_timeout_s))
        return len(steps)

    async def serve_sender(self, channel: Channel, hello: Hello) -> None:
        async def land(copies: list[Copy], reservation: Reservation) -> int:
            """A revocation ends the connection: the bytes are on the way."""
            views = [self._pool.bytes_of(Run(copy.dst, copy.length)) for copy in copies]
            await channel.send_frame(Reply())
            await _in_thread(
                channel.sock,
                lambda: _receive(channel.sock, views, lambda: reservation.revoked, self._io_timeout_s),
            )
            return 0

        await self.answer_transfers(channel, hello, land)


async def _in_thread(sock: socket.socket, work: Callable[[], None]) -> None:
    """Waits for `work`, which the loop's other tasks would slow down. A cancel ends the connection.

    A thread for each, since each waits for one of the peer's: in pools of a fixed size, two nodes that send
    to each other could hold all threads and wait for none.
    """
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="flowkv-tcp")
    working = asyncio.get_running_loop().run_in_executor(thread, work)
    try:
        await asyncio.shield(working)
    except asyncio.CancelledError:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)  # wakes the thread, which then fails
        with contextlib.suppress(OSError):
            await finish_thread(working, threading.Event())
        raise
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


def _receive(
    sock: socket.socket, views: list[memoryview], is_revoked: Callable[[], bool], io_timeout_s: float
) -> None:
    """Fills `views`, and asks before each read whether it still may. Raises `OSError`."""
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    for view in views:
        while view:
            _wake_at(sock, min(_WAKE_BYTES, len(view)))
            _await_event(poller, io_timeout_s)
            if is_revoked():
                raise ConnectionAbortedError("the reservation ended during the copy")
            with contextlib.suppress(BlockingIOError):
                num_received = sock.recv_into(view[:_STEP_BYTES])
                if not num_received:
                    raise ConnectionResetError("closed by the peer")
                view = view[num_received:]
    _wake_at(sock, 1)


def _await_event(poller: select.poll, io_timeout_s: float) -> None:
    if not poller.poll(io_timeout_s * 1000):
        raise TimeoutError(f"nothing came or went for {io_timeout_s} s")


def _wake_at(sock: socket.socket, num_bytes: int) -> None:
    """The socket counts as readable once it holds that much, or has ended."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, num_bytes)
