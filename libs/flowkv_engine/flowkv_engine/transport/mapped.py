"""KV blocks between two processes of one host: the receiver maps the sender's pool and copies out of it.

The sender spends no CPU on them.
"""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import socket
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from flowkv_engine.kv.pool import KVPool
from flowkv_engine.transport.pull import PeerPool, PullConnector
from flowkv_engine.transport.stream import Channel, Frame, FrameError, finish_thread

# A cancel waits for under 0.1 s of host memory, or tens of milliseconds of any link between GPUs. Above a
# size that depends on the CPU's cache, memory copies write past it and take a third less time.
_STEP_BYTES = 256 << 20


# --- host memory ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class ShmConnector(PullConnector):
    """One memory copy is all. The mapping keeps the pages alive if the sender dies."""

    name = "shm"
    is_local = True
    step_bytes = _STEP_BYTES

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
class CudaIpcConnector(PullConnector):
    """`pool` has an allocation of its own, as `CudaPool` does: a handle names the whole allocation.

    A sender waits for nothing: a step is reported after the device has ended it (`engine/runner.py`), so what
    is sent has been written. An event recorded now would stand behind the next step, which is queued already:
    each link would do one handoff per step.
    """

    name = "cuda_ipc"
    is_local = True
    step_bytes = _STEP_BYTES

    device: IpcDevice = field(kw_only=True)

    async def show_pool(self, channel: Channel) -> None:
        await channel.send_frame(ShownPool(handle=self.device.export_pool(self.pool.tensor.data_ptr())))

    async def open_pool(self, channel: Channel, num_bytes: int) -> PeerPool:
        shown = await channel.receive_frame(ShownPool)
        # In the loop, since a mapping that a cancelled thread returns would never be closed. Once per link.
        return self.device.open_pool(shown.handle, num_bytes, self.pool.tensor.data_ptr())
