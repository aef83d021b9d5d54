"""Host memory in the part of a CUDA device: pools are opened by a handle of bytes, copies are queued."""

from __future__ import annotations

import ctypes
import mmap
import os

import numpy as np

from flowkv_engine.kv.pool import KVPool


class MemfdDevice:
    """An `IpcDevice` for `pool`. A handle is a path under /proc, so it works between processes too."""

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool

    def export_pool(self, address: int) -> bytes:
        assert address == self._pool.tensor.data_ptr()
        return f"/proc/{os.getpid()}/fd/{self._pool.fd}".encode()

    def open_pool(self, handle: bytes, num_bytes: int, target: int) -> MemfdPeerPool:
        fd = os.open(handle, os.O_RDONLY)
        try:
            if os.fstat(fd).st_size != num_bytes:
                raise OSError(f"not a pool of {num_bytes} bytes")
            return MemfdPeerPool(mmap.mmap(fd, num_bytes, prot=mmap.PROT_READ), target)
        finally:
            os.close(fd)


class MemfdPeerPool:
    """A `PeerPool`. Nothing moves before `settle`, so that a copy that nobody waits for never happens."""

    def __init__(self, mapping: mmap.mmap, target: int) -> None:
        self._mapping = mapping
        self._target = target
        self._queued: list[tuple[int, int, int]] = []

    def copy(self, src: int, dst: int, num_bytes: int) -> None:
        self._queued.append((src, dst, num_bytes))

    def settle(self) -> None:
        source = np.frombuffer(self._mapping, dtype=np.uint8)
        while self._queued:
            src, dst, num_bytes = self._queued.pop(0)
            ctypes.memmove(self._target + dst, source.ctypes.data + src, num_bytes)

    def close(self) -> None:
        self._mapping.close()
