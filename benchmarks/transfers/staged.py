"""FlowKV's connectors as they stage pools on GPUs, with a thread that copies host memory for a GPU."""

from __future__ import annotations

import ctypes
from concurrent.futures import Future, ThreadPoolExecutor

from flowkv_engine.kv.pool import KVPool
from flowkv_engine.kv.reservations import Reservations
from flowkv_engine.transport.base import KVConnector
from flowkv_engine.transport.nixl import NixlConnector
from flowkv_engine.transport.tcp import StagedTcpConnector
from tests.contract.unreachable_pool import library_without


class CopyingThread:
    """A `CopyQueue`."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._queued: list[Future[int]] = []

    def copy(self, source: int, target: int, num_bytes: int) -> None:
        self._queued.append(self._thread.submit(ctypes.memmove, target, source, num_bytes))

    def settle(self) -> None:
        while self._queued:
            self._queued.pop().result()


class CopyingDevice:
    """A `StagingDevice`, to which all memory is pinned."""

    def pin(self, address: int, num_bytes: int) -> None:
        pass

    def unpin(self, address: int) -> None:
        pass

    def new_queue(self) -> CopyingThread:
        return CopyingThread()


def make_staged(name: str, pool: KVPool, reservations: Reservations) -> KVConnector:
    """`nixl` or `tcp`, staged at both ends. Raises `CannotStart` without NIXL's library."""
    device = CopyingDevice()
    if name == "tcp":
        return StagedTcpConnector(pool, reservations, lambda _: True, device=device)
    library = library_without(pool.tensor)
    return NixlConnector(pool, reservations, lambda _: True, library=library, device=device)
