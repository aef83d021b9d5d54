"""Staging: a pool on a GPU by way of pinned host memory, for transports that reach nothing else.

The bytes of a transfer are cut into pieces, each as large as a buffer. A piece is copied between the pool and
its buffer while the transport moves another one.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, Self

import numpy as np
import torch

from flowkv_engine.kv.segments import Copy, cut

# Of each connection, at each end that stages: large enough that what tells of a piece doesn't count.
NUM_BUFFERS = 2
BUFFER_BYTES = 8 << 20


class StagingDevice(Protocol):
    """The part of a device's runtime that staging needs. Called from any thread. Raises `OSError`."""

    def pin(self, address: int, num_bytes: int) -> None:
        """Locks host memory, so that the device can copy from and to it by itself."""

    def unpin(self, address: int) -> None:
        """Ends what `pin` began there."""

    def new_queue(self) -> CopyQueue:
        """For copies between pinned memory and the device, beside whatever else the device does."""


class CopyQueue(Protocol):
    """Used by one worker thread at a time. Raises `OSError`."""

    def copy(self, source: int, target: int, num_bytes: int) -> None:
        """Queues a copy from one address to another."""

    def settle(self) -> None:
        """Returns when all queued copies have ended."""


class StagingBuffers:
    """Pinned host memory for the pieces of what goes out of `pool`, or into it. Raises `OSError`.

    `memory`: the buffers, [NUM_BUFFERS * buffer_bytes] uint8, which are `view`, too. The pieces of a transfer
    take them in turn. The copies of a piece are in bytes of the pools. Used by one worker thread at a time.
    """

    def __init__(self, device: StagingDevice, pool: torch.Tensor, buffer_bytes: int = BUFFER_BYTES) -> None:
        self.buffer_bytes = buffer_bytes
        self._pool = pool.data_ptr()
        self._device = device
        self._queue = device.new_queue()
        # Shared memory: a fork leaves its pages where the device and the transport know them.
        pages = mmap.mmap(-1, NUM_BUFFERS * buffer_bytes)
        self.view = memoryview(pages)
        self.memory = torch.from_numpy(np.frombuffer(pages, dtype=np.uint8))
        device.pin(self.memory.data_ptr(), self.memory.nbytes)

    def start_of(self, number: int) -> int:
        """Where in `memory` the piece of this number begins."""
        return start_of(number, NUM_BUFFERS, self.buffer_bytes)

    def gather(self, number: int, piece: Sequence[Copy]) -> None:
        """Queues the copies of a piece out of the pool."""
        for copy, at in placed(piece, self.start_of(number)):
            self._queue.copy(self._pool + copy.src, self.memory.data_ptr() + at, copy.length)

    def scatter(self, number: int, piece: Sequence[Copy]) -> None:
        """Queues the copies of a piece into the pool."""
        for copy, at in placed(piece, self.start_of(number)):
            self._queue.copy(self.memory.data_ptr() + at, self._pool + copy.dst, copy.length)

    def settle(self) -> None:
        """Returns when all queued copies have ended."""
        self._queue.settle()

    def close(self) -> None:
        """No copy is queued then, and nothing else may use the memory."""
        self._device.unpin(self.memory.data_ptr())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def pieces(copies: Iterable[Copy], block_bytes: int, buffer_bytes: int) -> Iterator[list[Copy]]:
    """The pieces of a transfer: copies of bytes instead of blocks, as many in each as a buffer holds."""
    return cut((Copy(*(block_bytes * number for number in copy)) for copy in copies), buffer_bytes)


def start_of(number: int, num_buffers: int, buffer_bytes: int) -> int:
    """Where the piece of this number begins among buffers that are taken in turn."""
    return number % num_buffers * buffer_bytes


def placed(piece: Iterable[Copy], start: int) -> Iterator[tuple[Copy, int]]:
    """Each copy, and where its bytes begin in a buffer: from `start` on, one behind the other."""
    for copy in piece:
        yield copy, start
        start += copy.length
