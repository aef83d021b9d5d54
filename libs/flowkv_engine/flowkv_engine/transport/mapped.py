"""KV blocks between two processes of one host: the receiver maps the sender's pool and copies out of it.

The sender shows its pool once, when it connects; afterwards it only names blocks and spends no CPU on them.
"""

from __future__ import annotations

import abc
import asyncio
import fcntl
import mmap
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from flowkv_engine.kv.pool import KVPool
from flowkv_engine.kv.reservations import Reservation
from flowkv_engine.kv.segments import Copy
from flowkv_engine.transport.stream import (
    Channel,
    Frame,
    FrameError,
    Hello,
    Land,
    Reply,
    StreamConnector,
    finish_thread,
)

# Copies are cut into steps of at least that much where they are longer, and so much is queued at once: a
# cancel waits for under 0.1 s of host memory, or tens of milliseconds of any link between GPUs. Above a size
# that depends on the CPU's cache, memory copies write past it and take a third less time.
_STEP_BYTES = 256 << 20


class PeerPool(Protocol):
    """A peer's pool as it is seen from here. One worker thread at a time uses it. Raises `OSError`."""

    def copy(self, src: int, dst: int, num_bytes: int) -> None:
        """Copies from byte `src` of the peer's pool to byte `dst` of ours; may only queue the copy."""

    def settle(self) -> None:
        """Returns when all queued copies have ended; whether it raises or not, none of them is left."""

    def close(self) -> None:
        """Ends the mapping."""


class MappingConnector(StreamConnector):
    is_local = True

    @abc.abstractmethod
    async def show_pool(self, channel: Channel) -> None:
        """Tells the receiver how to open our pool. Raises `OSError`."""

    @abc.abstractmethod
    async def open_pool(self, channel: Channel, num_bytes: int) -> PeerPool:
        """Opens the pool of `num_bytes` that the sender shows. Raises `OSError`."""

    async def introduce(self, channel: Channel) -> None:
        await self.show_pool(channel)
        await channel.expect_yes()

    async def welcome(self, channel: Channel, hello: Hello) -> Land:
        block_bytes = self.pool.layout.block_bytes
        peer = await self.open_pool(channel, hello.num_blocks * block_bytes)
        channel.lifetime.callback(peer.close)
        await channel.send_frame(Reply())

        async def land(copies: list[Copy], reservation: Reservation) -> int:
            """The thread has left the pool when this returns or raises."""
            abandoned = threading.Event()

            def should_stop() -> bool:
                return reservation.revoked or abandoned.is_set()

            with channel.watching(abandoned.set):
                loop = asyncio.get_running_loop()
                copied = loop.run_in_executor(None, copy_all, peer, copies, block_bytes, should_stop)
                num_calls = await finish_thread(copied, abandoned.set)
            if abandoned.is_set():
                raise ConnectionAbortedError("the sender hung up during the copy")
            return num_calls

        return land


def copy_all(peer: PeerPool, copies: list[Copy], block_bytes: int, should_stop: Callable[[], bool]) -> int:
    """Copies in even steps until it should stop, waits for those queued, returns how many there were."""
    num_calls = num_queued_bytes = 0
    try:
        for copy in copies:
            src, dst, num_bytes = copy.src * block_bytes, copy.dst * block_bytes, copy.length * block_bytes
            step = -(-num_bytes // max(1, num_bytes // _STEP_BYTES))
            for done in range(0, num_bytes, step):
                if num_queued_bytes >= _STEP_BYTES:
                    peer.settle()
                    num_queued_bytes = 0
                if should_stop():
                    return num_calls
                peer.copy(src + done, dst + done, min(step, num_bytes - done))
                num_queued_bytes += step
                num_calls += 1
    finally:
        peer.settle()
    return num_calls


# --- host memory ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class ShmConnector(MappingConnector):
    """One memory copy is all. The mapping keeps the pages alive if the sender dies."""

    name = "shm"

    pool: KVPool

    async def show_pool(self, channel: Channel) -> None:
        socket.send_fds(channel.sock, [b"\0"], [self.pool.fd])

    async def open_pool(self, channel: Channel, num_bytes: int) -> PeerPool:
        async with channel.deadline():
            await channel.wait_readable()
        _, fds, _, _ = socket.recv_fds(channel.sock, 1, 1, socket.MSG_CMSG_CLOEXEC)
        if not fds:
            raise FrameError("no pool was passed")
        loop = asyncio.get_running_loop()
        mapped = loop.run_in_executor(None, MappedPool, fds[0], num_bytes, self.pool.buffer)
        return await finish_thread(mapped, lambda: None)


class MappedPool:
    """A `PeerPool` behind a descriptor, which it closes. `target`: all bytes of our own.

    Its pages are looked up now, so make it in a thread: that takes time once, and the first transfer would
    pay for it. Raises `OSError` if it is not a pool of `num_bytes`.
    """

    def __init__(self, fd: int, num_bytes: int, target: memoryview) -> None:
        try:
            # Shrunk under us, a file would kill this process with SIGBUS.
            is_sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
            if os.fstat(fd).st_size != num_bytes or not is_sealed:
                raise FrameError(f"the pool passed is not a sealed memfd of {num_bytes} bytes")
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            mapping = mmap.mmap(fd, num_bytes, flags=flags, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self._source = np.frombuffer(mapping, dtype=np.uint8)
        self._target = np.frombuffer(target, dtype=np.uint8)

    def copy(self, src: int, dst: int, num_bytes: int) -> None:
        np.copyto(self._target[dst : dst + num_bytes], self._source[src : src + num_bytes])  # without the GIL

    def settle(self) -> None:
        """Nothing is ever queued."""

    def close(self) -> None:
        del self._source, self._target  # the mapping ends with its last array


# --- memory of GPUs ------------------------------------------------------------------------------------


class IpcDevice(Protocol):
    """The part of a device's runtime that a pull needs. Called from any thread. Raises `OSError`."""

    def export_pool(self, address: int) -> bytes:
        """The handle under which another process can open the allocation that begins at `address`."""

    def open_pool(self, handle: bytes, num_bytes: int, target: int) -> PeerPool:
        """Maps a peer's pool of `num_bytes`, to be copied from into the pool that begins at `target`."""


class ShownPool(Frame, frozen=True, kw_only=True):
    """How to open the sender's pool."""

    handle: bytes


@dataclass(eq=False)
class CudaIpcConnector(MappingConnector):
    """`pool` has an allocation of its own, as `CudaPool` does: a handle names the whole allocation.

    A sender waits for nothing: a step is reported after the device has ended it (`engine/runner.py`), so what
    is sent has been written. An event recorded now would stand behind the next step, which is queued already:
    each link would do one handoff per step.
    """

    name = "cuda_ipc"

    device: IpcDevice = field(kw_only=True)

    async def show_pool(self, channel: Channel) -> None:
        await channel.send_frame(ShownPool(handle=self.device.export_pool(self.pool.tensor.data_ptr())))

    async def open_pool(self, channel: Channel, num_bytes: int) -> PeerPool:
        shown = await channel.receive_frame(ShownPool)
        # In the loop, since a mapping that a cancelled thread returns would never be closed. Once per link.
        return self.device.open_pool(shown.handle, num_bytes, self.pool.tensor.data_ptr())
