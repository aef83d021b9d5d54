"""One side of a pair: a process with a pool, which does what the parent asks and dies with it."""

from __future__ import annotations

import asyncio
import ctypes
import os
import resource
import signal
import time
import zlib
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.host import cache_bytes
from benchmarks.transfer.shapes import Shape
from benchmarks.transfer.transports import Transport, Unavailable, make_transport
from flowkv_common.wire.messages import Run
from flowkv_engine.kv.pool import KVPool
from flowkv_engine.kv.segments import Copy

_PR_SET_PDEATHSIG = 1
_PATTERN_BYTES = 16 << 20
# Other people's libraries report their start, each in its own way.
_QUIET = {"NIXL_LOG_LEVEL": "ERROR", "GLOG_minloglevel": "3", "MC_LOG_LEVEL": "ERROR"}


class Span(NamedTuple):
    """When a side worked, on CLOCK_MONOTONIC, which processes of a host share; and the calls it made."""

    started_s: float
    ended_s: float
    num_calls: int


class Worker:
    """Each public method is a request of the parent. Copies are in blocks of the pool connected last."""

    _transport: Transport

    def __init__(self, blocks: KVPool, pieces: KVPool, connection: Connection) -> None:
        self._blocks, self._pieces = blocks, pieces
        self._pool = blocks
        self._connection = connection
        self._scratch = np.zeros(2 * cache_bytes(), dtype=np.uint8)

    async def listen(self, name: str, is_layer_major: bool) -> Any:
        self._pool = self._pieces if is_layer_major else self._blocks
        self._transport = make_transport(name, self._pool)
        return await self._transport.listen()

    async def connect(self, name: str, is_layer_major: bool, address: Any) -> None:
        self._pool = self._pieces if is_layer_major else self._blocks
        self._transport = make_transport(name, self._pool)
        await self._transport.connect(address)

    async def send(self, copies: Sequence[Copy], one_by_one: bool) -> Span:
        started_s = time.monotonic()
        num_calls = await self._transport.send(copies, one_by_one)
        return Span(started_s, time.monotonic(), num_calls)

    async def receive(self, copies: Sequence[Copy], one_by_one: bool) -> Span:
        self._connection.send(("ready", None))
        started_s = time.monotonic()
        await self._transport.receive(copies, one_by_one)
        return Span(started_s, time.monotonic(), 0)

    async def memcpy(self, src: Run, dst: Run) -> Span:
        """The limit: the C library's memory copy, once, of blocks within the pool."""
        base, size = self._blocks.tensor.data_ptr(), self._blocks.layout.block_bytes
        started_s = time.monotonic()
        ctypes.memmove(base + dst.start * size, base + src.start * size, src.length * size)
        return Span(started_s, time.monotonic(), 1)

    async def disconnect(self) -> None:
        await self._transport.close()

    async def evict(self) -> None:
        """Streams through more memory than the cache holds, so that no block is warm."""
        self._scratch += 1

    async def fill(self, seed: int) -> None:
        """Random bytes, other ones in each block."""
        pattern = np.random.default_rng(seed).integers(0, 256, _PATTERN_BYTES + 1, dtype=np.uint8)
        pool = np.frombuffer(self._pool.buffer, dtype=np.uint8)
        for number, begin in enumerate(range(0, len(pool), len(pattern))):
            part = pool[begin : begin + len(pattern)]
            np.add(pattern[: len(part)], number % 251, out=part)

    async def erase(self, runs: Sequence[Run]) -> None:
        for run in runs:
            view = np.frombuffer(self._pool.bytes_of(run), dtype=np.uint8)
            view[:] = 0

    async def checksum(self, runs: Sequence[Run]) -> int:
        """CRC-32 of all bytes of `runs`, in order."""
        crc = 0
        for run in runs:
            crc = zlib.crc32(self._pool.bytes_of(run), crc)
        return crc

    async def cpu_s(self) -> float:
        """CPU seconds of all threads of this process so far."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime


class _Pieces(KVPool):
    """The memory of `pool` seen as a layer-major pool, whose blocks are pieces."""

    def __init__(self, pool: KVPool, shape: Shape) -> None:
        self.layout = shape.piece_layout
        self.num_blocks = pool.num_blocks * shape.pieces_per_block
        self.num_bytes, self.fd, self.buffer, self.tensor = pool.num_bytes, pool.fd, pool.buffer, pool.tensor


def main(connection: Connection, parent_pid: int, shape: Shape, num_blocks: int) -> None:
    """The process: answers requests `(method, arguments)` until the pipe ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        return  # the parent went before we asked to go with it
    os.environ.update(_QUIET)
    torch.set_num_threads(1)
    with KVPool(shape.layout, num_blocks) as pool:
        asyncio.run(_serve(Worker(pool, _Pieces(pool, shape), connection), connection))


async def _serve(worker: Worker, connection: Connection) -> None:
    connection.send(("ready", None))
    while True:
        try:
            method, arguments = await asyncio.to_thread(connection.recv)
        except EOFError:
            return
        try:
            connection.send(("done", await getattr(worker, method)(*arguments)))
        except Unavailable as error:
            connection.send(("unavailable", str(error)))
        except Exception as error:
            connection.send(("failed", f"{type(error).__name__}: {error}"))
