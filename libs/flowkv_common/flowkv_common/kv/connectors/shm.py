"""KV blocks between two processes of one host: the receiver maps the sender's pool and copies out of it.

One memory copy is all; the sender spends no CPU on it. The mapping keeps the pages alive if the sender dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import mmap
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flowkv_common.kv.alignment import Copy
from flowkv_common.kv.connector import Landing
from flowkv_common.kv.connectors.frames import Channel, FrameError, Hello, Reply
from flowkv_common.kv.connectors.stream import StreamConnector

_STEP_BYTES = 4 << 20

Bytes = npt.NDArray[np.uint8]


class ShmConnector(StreamConnector):
    """Listens on a Unix socket in a folder that only this user can enter."""

    name = "shm"

    async def _bind(self) -> tuple[socket.socket, str]:
        folder = self._resources.enter_context(tempfile.TemporaryDirectory(prefix="flowkv-"))
        address = str(Path(folder, "pool.sock"))
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
        return listener, address

    async def _open_socket(self, address: str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, address)
        except BaseException:
            sock.close()
            raise
        return sock

    async def _introduce(self, channel: Channel) -> None:
        socket.send_fds(channel.sock, [b"\0"], [self._pool.fd])
        await channel.expect_yes()

    async def _push(self, channel: Channel, copies: list[Copy]) -> int:
        """Nothing to do: the receiver pulls."""
        return 0

    async def _receive_from(self, channel: Channel, hello: Hello) -> None:
        with _mapped(await _receive_fd(channel), hello.num_blocks * self._pool.layout.block_bytes) as source:
            await channel.send(Reply())
            await self._answer(channel, hello, functools.partial(self._pull, channel, source))

    async def _pull(self, channel: Channel, source: Bytes, copies: list[Copy], landing: Landing) -> int:
        """Copies in a worker thread, which has left the pool alone by the time this returns or raises."""
        abandoned = threading.Event()
        target = np.frombuffer(self._pool.buffer, dtype=np.uint8)
        work = functools.partial(
            _copy_steps,
            source,
            target,
            _steps(copies, self._pool.layout.block_bytes),
            lambda: landing.revoked or abandoned.is_set(),
        )
        with channel.watching(abandoned.set):
            num_calls = await _outlived(asyncio.get_running_loop().run_in_executor(None, work), abandoned)
        if abandoned.is_set():
            raise ConnectionAbortedError("the sender hung up during the copy")
        return num_calls


def _steps(copies: list[Copy], block_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Source offset, target offset and length, in bytes, of each memory copy."""
    for copy in copies:
        for done in range(0, copy.length * block_bytes, _STEP_BYTES):
            num_bytes = min(_STEP_BYTES, copy.length * block_bytes - done)
            yield copy.src * block_bytes + done, copy.dst * block_bytes + done, num_bytes


def _copy_steps(
    source: Bytes, target: Bytes, steps: Iterator[tuple[int, int, int]], should_stop: Callable[[], bool]
) -> int:
    """Runs in a thread; numpy releases the GIL for the bytes. Returns the number of memory copies."""
    num_calls = 0
    for src, dst, num_bytes in steps:
        if should_stop():
            break
        np.copyto(target[dst : dst + num_bytes], source[src : src + num_bytes])
        num_calls += 1
    return num_calls


async def _outlived(copying: asyncio.Future[int], abandoned: threading.Event) -> int:
    """The result of a thread. A cancel waits for its step, of milliseconds: a thread can't be interrupted."""
    try:
        return await asyncio.shield(copying)
    except asyncio.CancelledError:
        abandoned.set()
        while not copying.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([copying])
        raise


async def _receive_fd(channel: Channel) -> int:
    """The one file descriptor that the sender passes. Raises `FrameError` if none comes."""
    async with channel.deadline():
        await channel.arrival()
    _, fds, _, _ = socket.recv_fds(channel.sock, 1, 1, socket.MSG_CMSG_CLOEXEC)
    if not fds:
        raise FrameError("no pool was passed")
    return fds[0]


@contextlib.contextmanager
def _mapped(fd: int, num_bytes: int) -> Iterator[Bytes]:
    """The sender's pool, read only. Closes `fd`. Raises `FrameError` if it is not what was announced."""
    try:
        if os.fstat(fd).st_size != num_bytes or not _is_sealed(fd):
            raise FrameError(f"the pool passed is not a sealed memfd of {num_bytes} bytes")
        mapping = mmap.mmap(fd, num_bytes, prot=mmap.PROT_READ)
    finally:
        os.close(fd)
    source = np.frombuffer(mapping, dtype=np.uint8)
    try:
        yield source
    finally:
        del source
        with contextlib.suppress(BufferError):  # a traceback still looks at it: goes with that
            mapping.close()


def _is_sealed(fd: int) -> bool:
    """Whether nobody can shrink the file under us, which would kill this process with SIGBUS."""
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:
        return False
