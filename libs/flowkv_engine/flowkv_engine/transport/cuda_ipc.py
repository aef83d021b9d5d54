"""KV blocks pulled out of a peer's pool that is mapped here: the flow, whatever maps and copies.

The sender shows its pool once, when it connects, and afterwards only names blocks; the receiver copies.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import functools
import socket
import threading
from collections.abc import Callable
from typing import Protocol

from flowkv_engine.kv.pool import Pool
from flowkv_engine.kv.reservations import Reservation, Reservations
from flowkv_engine.kv.segments import Copy
from flowkv_engine.transport import sockets
from flowkv_engine.transport.sockets import LOOPBACK, Channel, Frame, Hello, Place, Reply
from flowkv_engine.transport.stream import StreamConnector, outlived

# What is queued can't be called back: so much that waiting for it costs nothing, over any link between GPUs,
# and little enough that a revocation is heeded within tens of milliseconds.
_MAX_QUEUED_BYTES = 256 << 20


class PeerPool(Protocol):
    """A peer's pool as it is seen from here. One worker thread at a time uses it. Raises `OSError`."""

    def copy(self, src: int, dst: int, num_bytes: int) -> None:
        """Copies from byte `src` of the peer's pool to byte `dst` of ours; may only queue the copy."""

    def settle(self) -> None:
        """Returns when all queued copies have ended; whether it raises or not, none of them is left."""

    def close(self) -> None:
        """Ends the mapping."""


class MappedConnector(StreamConnector[Pool]):
    """Listens on a Unix socket: only processes of this host can map each other's memory."""

    async def _bind(self) -> tuple[socket.socket, str]:
        return sockets.bind_unix(self._place, self._resources)

    async def _open_socket(self, address: str) -> socket.socket:
        return await sockets.dial_unix(address)

    # --- what a kind of memory brings --------------------------------------------------------------

    @abc.abstractmethod
    async def _show_pool(self, channel: Channel) -> None:
        """Sends what the receiver needs to map this pool. Raises `OSError`."""

    @abc.abstractmethod
    async def _map_pool(self, channel: Channel, num_bytes: int) -> PeerPool:
        """Receives that and maps the pool, of `num_bytes`. Raises `OSError`."""

    # --- the flow ----------------------------------------------------------------------------------

    async def _introduce(self, channel: Channel) -> None:
        await self._show_pool(channel)
        await channel.expect_yes()

    async def _push(self, channel: Channel, copies: list[Copy]) -> int:
        """Nothing to do: the receiver pulls."""
        # Nothing to wait for either: a step is told of after the device has ended it (`engine/runner.py`), so
        # what is sent has been written. An event recorded now would stand behind the next step, which
        # is queued already: each link would do one handoff per step.
        return 0

    async def _receive_from(self, channel: Channel, hello: Hello) -> None:
        with contextlib.closing(
            await self._map_pool(channel, hello.num_blocks * self._pool.layout.block_bytes)
        ) as peer:
            await channel.send(Reply())
            await self._answer(channel, hello, functools.partial(self._pull, channel, peer))

    async def _pull(
        self, channel: Channel, peer: PeerPool, copies: list[Copy], reservation: Reservation
    ) -> int:
        """Copies in a worker thread, which has left the pool alone by the time this returns or raises."""
        abandoned = threading.Event()
        work = functools.partial(
            _copy_all,
            peer,
            copies,
            self._pool.layout.block_bytes,
            lambda: reservation.revoked or abandoned.is_set(),
        )
        with channel.watching(abandoned.set):
            num_calls = await outlived(asyncio.get_running_loop().run_in_executor(None, work), abandoned)
        if abandoned.is_set():
            raise ConnectionAbortedError("the sender hung up during the copy")
        return num_calls


def _copy_all(peer: PeerPool, copies: list[Copy], block_bytes: int, should_stop: Callable[[], bool]) -> int:
    """Queues copies until it should stop, waits for those queued, and returns how many there were."""
    num_calls = num_queued_bytes = 0
    try:
        for src, dst, length in copies:
            if num_queued_bytes >= _MAX_QUEUED_BYTES:
                peer.settle()
                num_queued_bytes = 0
            if should_stop():
                break
            peer.copy(src * block_bytes, dst * block_bytes, length * block_bytes)
            num_queued_bytes += length * block_bytes
            num_calls += 1
    finally:
        peer.settle()
    return num_calls


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
        reservations: Reservations,
        admits: Callable[[str], bool],
        *,
        device: IpcDevice,
        place: Place = LOOPBACK,
        io_timeout_s: float = 10.0,
    ) -> None:
        super().__init__(pool, reservations, admits, place=place, io_timeout_s=io_timeout_s)
        self._device = device

    async def _show_pool(self, channel: Channel) -> None:
        await channel.send(ShownPool(handle=self._device.export(self._pool.tensor.data_ptr())))

    async def _map_pool(self, channel: Channel, num_bytes: int) -> PeerPool:
        shown = await channel.receive(ShownPool)
        # In the loop, for a mapping that a cancelled thread returns would never be closed. Once per link.
        return self._device.open(shown.handle, num_bytes, self._pool.tensor.data_ptr())
