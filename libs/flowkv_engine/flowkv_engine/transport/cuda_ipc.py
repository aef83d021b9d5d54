"""KV blocks between two GPUs of one host: the receiver maps the sender's pool and copies out of it.

The sender shows its pool once, when it connects, and afterwards only names blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Protocol

from flowkv_engine.kv.pool import Pool
from flowkv_engine.kv.reservations import Reservations
from flowkv_engine.kv.segments import Copy
from flowkv_engine.transport.sockets import LOOPBACK, Place
from flowkv_engine.transport.stream import Channel, Frame, Hello, Reply, StreamConnector, copying_in_thread

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


class IpcDevice(Protocol):
    """The part of a device's runtime that a pull needs. Called from any thread. Raises `OSError`."""

    def export_pool(self, address: int) -> bytes:
        """The handle under which another process can open the allocation that begins at `address`."""

    def open_pool(self, handle: bytes, num_bytes: int, target: int) -> PeerPool:
        """Maps a peer's pool of `num_bytes`, to be copied from into the pool that begins at `target`."""


class ShownPool(Frame, frozen=True, kw_only=True):
    """How to open the sender's pool."""

    handle: bytes


class CudaIpcConnector(StreamConnector[Pool]):
    """`pool` has an allocation of its own, as `CudaPool` does: a handle names the whole allocation.

    A sender waits for nothing: a step is reported after the device has ended it (`engine/runner.py`), so what
    is sent has been written. An event recorded now would stand behind the next step, which is queued already:
    each link would do one handoff per step.
    """

    name = "cuda_ipc"
    is_local = True

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

    async def introduce(self, channel: Channel) -> None:
        await channel.send_frame(ShownPool(handle=self._device.export_pool(self._pool.tensor.data_ptr())))
        await channel.expect_yes()

    async def serve_sender(self, channel: Channel, hello: Hello) -> None:
        block_bytes = self._pool.layout.block_bytes
        shown = await channel.receive_frame(ShownPool)
        # In the loop, since a mapping that a cancelled thread returns would never be closed. Once per link.
        peer = self._device.open_pool(
            shown.handle, hello.num_blocks * block_bytes, self._pool.tensor.data_ptr()
        )
        with contextlib.closing(peer):
            await channel.send_frame(Reply())

            def copy(copies: list[Copy], should_stop: Callable[[], bool]) -> int:
                return _copy_all(peer, copies, block_bytes, should_stop)

            await self.answer_transfers(channel, hello, copying_in_thread(channel, copy))


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
