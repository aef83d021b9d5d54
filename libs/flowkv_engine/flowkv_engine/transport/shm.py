"""KV blocks between two processes of one host: the receiver maps the sender's pool and copies out of it.

One memory copy is all; the sender spends no CPU on it. The mapping keeps the pages alive if the sender dies.
"""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import socket
import threading
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from flowkv_engine.kv.pool import KVPool
from flowkv_engine.kv.segments import Copy
from flowkv_engine.transport.stream import (
    Channel,
    FrameError,
    Hello,
    Reply,
    StreamConnector,
    copying_in_thread,
    finish_thread,
)

# Above a size that depends on the CPU's cache, memory copies write past it and take a third less time.
# A step is at least that long where the copy is, and under 0.1 s: a cancel waits for it.
_STEP_BYTES = 256 << 20

Bytes = npt.NDArray[np.uint8]


class ShmConnector(StreamConnector[KVPool]):
    name = "shm"
    is_local = True

    async def introduce(self, channel: Channel) -> None:
        socket.send_fds(channel.sock, [b"\0"], [self._pool.fd])
        await channel.expect_yes()

    async def serve_sender(self, channel: Channel, hello: Hello) -> None:
        block_bytes = self._pool.layout.block_bytes
        async with channel.deadline():
            await channel.wait_readable()
        _, fds, _, _ = socket.recv_fds(channel.sock, 1, 1, socket.MSG_CMSG_CLOEXEC)
        if not fds:
            raise FrameError("no pool was passed")
        mapped = asyncio.get_running_loop().run_in_executor(
            None, _map, fds[0], hello.num_blocks * block_bytes
        )
        source = await finish_thread(mapped, threading.Event())
        await channel.send_frame(Reply())

        def copy(copies: list[Copy], should_stop: Callable[[], bool]) -> int:
            target = np.frombuffer(self._pool.buffer, dtype=np.uint8)
            return _copy_steps(source, target, _steps(copies, block_bytes), should_stop)

        await self.answer_transfers(channel, hello, copying_in_thread(channel, copy))


def _steps(copies: list[Copy], block_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Source offset, target offset and length, in bytes, of each memory copy."""
    for copy in copies:
        num_bytes = copy.length * block_bytes
        step = -(-num_bytes // max(1, num_bytes // _STEP_BYTES))
        for done in range(0, num_bytes, step):
            src, dst = copy.src * block_bytes + done, copy.dst * block_bytes + done
            yield src, dst, min(step, num_bytes - done)


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


def _map(fd: int, num_bytes: int) -> Bytes:
    """The sender's pool, read only. Closes `fd`. Raises `FrameError` if it is not what was announced.

    The mapping ends with the array. Its pages are looked up now, in a thread: that takes time once, and the
    first transfer would pay for it.
    """
    try:
        if os.fstat(fd).st_size != num_bytes or not _is_sealed(fd):
            raise FrameError(f"the pool passed is not a sealed memfd of {num_bytes} bytes")
        mapping = mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
        return np.frombuffer(mapping, dtype=np.uint8)
    finally:
        os.close(fd)


def _is_sealed(fd: int) -> bool:
    """Whether the file can't be shrunk under us, which would kill this process with SIGBUS."""
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:
        return False
