"""KV blocks between two processes on the GPUs of one host: the receiver opens the sender's pool and copies.

One handle per pool, shown when a link opens. Both processes must belong to one user, and see each other in
the IPC and PID namespaces of their containers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from flowkv_common.kv.connector import Landings, Pool
from flowkv_common.kv.connectors.frames import Channel, Frame
from flowkv_common.kv.connectors.mapped import MappedConnector, PeerPool
from flowkv_common.kv.connectors.sockets import LOOPBACK, Place


class IpcDevice(Protocol):
    """The part of a device's runtime that a pull needs. Called from any thread. Raises `OSError`."""

    def export(self, address: int) -> bytes:
        """The handle under which another process can open the allocation that begins at `address`."""

    def open(self, handle: bytes, num_bytes: int, target: int) -> PeerPool:
        """Maps a peer's pool of `num_bytes`, to be copied from into the pool that begins at `target`."""


class ShownPool(Frame, frozen=True, kw_only=True):
    """How to open the sender's pool."""

    handle: bytes


class CudaIpcConnector(MappedConnector):
    """`pool` lies in an allocation of its own, as `CudaPool` does: a handle names the whole allocation."""

    name = "cuda_ipc"

    def __init__(
        self,
        pool: Pool,
        landings: Landings,
        admits: Callable[[str], bool],
        *,
        device: IpcDevice,
        place: Place = LOOPBACK,
        io_timeout_s: float = 10.0,
    ) -> None:
        super().__init__(pool, landings, admits, place=place, io_timeout_s=io_timeout_s)
        self._device = device

    async def _show_pool(self, channel: Channel) -> None:
        await channel.send(ShownPool(handle=self._device.export(self._pool.tensor.data_ptr())))

    async def _map_pool(self, channel: Channel, num_bytes: int) -> PeerPool:
        shown = await channel.receive(ShownPool)
        # In the loop, for a mapping that a cancelled thread returns would never be closed. Once per link.
        return self._device.open(shown.handle, num_bytes, self._pool.tensor.data_ptr())
