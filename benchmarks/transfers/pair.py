"""Two processes with a pool each, which move blocks from one to the other as their parent asks.

Each request has a deadline; both processes end with the `with` block, and die with the parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import multiprocessing
import os
import resource
import signal
import time
import zlib
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.report import cache_bytes, time_s
from benchmarks.shapes import Shape
from benchmarks.transfers.transports import TRANSPORTS, Transport, Unavailable
from flowkv_common.wire.messages import Run
from flowkv_engine.kv.pool import KVPool
from flowkv_engine.kv.segments import Copy

START_TIMEOUT_S = 120.0
TIMEOUT_S = 180.0
PR_SET_PDEATHSIG = 1
PATTERN_BYTES = 16 << 20
# Other people's libraries report their start, each in its own way.
QUIET = {"NIXL_LOG_LEVEL": "ERROR", "GLOG_minloglevel": "3", "MC_LOG_LEVEL": "ERROR"}


class WorkerFailed(Exception):
    """A worker answered with an error, died, or was out of time."""


class Timing(NamedTuple):
    """From the sender's start until both sides know the end; CPU seconds of both processes."""

    duration_s: float
    cpu_s: float
    num_calls: int


class Peer:
    """One worker process, as the parent sees it. All methods raise WorkerFailed or Unavailable."""

    def __init__(self, connection: Connection[Any, Any]) -> None:
        self._connection = connection

    def ask(self, method: str, *arguments: object) -> Any:
        self.begin(method, *arguments)
        return self.answer()

    def begin(self, method: str, *arguments: object) -> None:
        self._connection.send((method, arguments))

    def answer(self, timeout_s: float = TIMEOUT_S) -> Any:
        try:
            if not self._connection.poll(timeout_s):
                raise WorkerFailed(f"no answer within {timeout_s:.0f} s")
            kind, value = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            raise WorkerFailed("the worker has died") from error
        if kind == "unavailable":
            raise Unavailable(value)
        if kind == "failed":
            raise WorkerFailed(value)
        return value


@contextlib.contextmanager
def start_peer(shape: Shape, num_blocks: int) -> Iterator[Peer]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, os.getpid(), shape, num_blocks), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Peer(ours)
    finally:
        ours.close()
        process.join(5.0)
        process.kill()
        process.join()


class Pair:
    """A sender and a receiver with a pool each."""

    def __init__(self, sender: Peer, receiver: Peer) -> None:
        self.sender, self.receiver = sender, receiver

    def connect(self, transport: str, is_layer_major: bool) -> None:
        """From now on copies are in blocks, or in pieces where the pools are layer-major."""
        address = self.receiver.ask("listen", transport, is_layer_major)
        self.sender.ask("connect", transport, is_layer_major, address)

    def transfer(self, copies: Sequence[Copy], one_by_one: bool) -> Timing:
        """One timed transfer out of memory that is not in the cache."""
        self.ask_both("evict")
        cpu_before_s = sum(self.ask_both("cpu_s"))
        self.receiver.begin("receive", copies, one_by_one)
        self.receiver.answer()  # it is ready
        sent = self.sender.ask("send", copies, one_by_one)
        received = self.receiver.answer()
        duration_s = max(sent.ended_s, received.ended_s) - sent.started_s
        return Timing(duration_s, sum(self.ask_both("cpu_s")) - cpu_before_s, sent.num_calls)

    def memcpy_s(self, src: Run, dst: Run) -> float:
        """Seconds of one copy of whole blocks within the receiver's pool."""
        self.ask_both("evict")
        seconds: float = self.receiver.ask("memcpy_s", src, dst)
        return seconds

    def erase(self, copies: Sequence[Copy]) -> None:
        self.receiver.ask("erase", [Run(copy.dst, copy.length) for copy in copies])

    def verify(self, copies: Sequence[Copy]) -> None:
        """Raises WorkerFailed unless the receiver holds the sender's bytes."""
        self.sender.begin("checksum", [Run(copy.src, copy.length) for copy in copies])
        self.receiver.begin("checksum", [Run(copy.dst, copy.length) for copy in copies])
        if self.sender.answer() != self.receiver.answer():
            raise WorkerFailed("other bytes arrived than were sent")

    def ask_both(self, method: str) -> tuple[Any, Any]:
        """Asks for something that takes no arguments."""
        self.sender.begin(method)
        self.receiver.begin(method)
        return self.sender.answer(), self.receiver.answer()


@contextlib.contextmanager
def start_pair(shape: Shape, num_blocks: int) -> Iterator[Pair]:
    """Two processes whose pools of `num_blocks` blocks hold other bytes each."""
    with start_peer(shape, num_blocks) as sender, start_peer(shape, num_blocks) as receiver:
        for seed, peer in enumerate((sender, receiver)):
            peer.answer(START_TIMEOUT_S)
            peer.begin("fill", seed)
        sender.answer()
        receiver.answer()
        yield Pair(sender, receiver)


# --- in the worker process --------------------------------------------------------------------------


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
        self._open(name, is_layer_major)
        return await self._transport.listen()

    async def connect(self, name: str, is_layer_major: bool, address: Any) -> None:
        self._open(name, is_layer_major)
        await self._transport.connect(address)

    def _open(self, name: str, is_layer_major: bool) -> None:
        self._pool = self._pieces if is_layer_major else self._blocks
        try:
            self._transport = TRANSPORTS[name](name, self._pool)
        except ImportError as error:
            raise Unavailable(f"can't be imported: {error}") from error

    async def disconnect(self) -> None:
        await self._transport.close()

    async def send(self, copies: Sequence[Copy], one_by_one: bool) -> Span:
        started_s = time.monotonic()
        num_calls = await self._transport.send(copies, one_by_one)
        return Span(started_s, time.monotonic(), num_calls)

    async def receive(self, copies: Sequence[Copy], one_by_one: bool) -> Span:
        self._connection.send(("ready", None))
        started_s = time.monotonic()
        await self._transport.receive(copies, one_by_one)
        return Span(started_s, time.monotonic(), 0)

    async def memcpy_s(self, src: Run, dst: Run) -> float:
        """The limit: the C library's memory copy, once, of blocks within the pool."""
        base, size = self._blocks.tensor.data_ptr(), self._blocks.layout.block_bytes
        return time_s(
            lambda: ctypes.memmove(base + dst.start * size, base + src.start * size, src.length * size)
        )

    async def evict(self) -> None:
        """Streams through more memory than the cache holds, so that no block is in it."""
        self._scratch += 1

    async def fill(self, seed: int) -> None:
        """Random bytes, other ones in each block."""
        pattern = np.random.default_rng(seed).integers(0, 256, PATTERN_BYTES + 1, dtype=np.uint8)
        pool = np.frombuffer(self._blocks.buffer, dtype=np.uint8)
        for number, begin in enumerate(range(0, len(pool), len(pattern))):
            part = pool[begin : begin + len(pattern)]
            np.add(pattern[: len(part)], number % 251, out=part)

    async def erase(self, runs: Sequence[Run]) -> None:
        for run in runs:
            np.frombuffer(self._pool.bytes_of(run), dtype=np.uint8)[:] = 0

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


class Pieces(KVPool):
    """The memory of `pool` seen as a layer-major pool, whose blocks are pieces."""

    def __init__(self, pool: KVPool, shape: Shape) -> None:
        self.layout = shape.piece_layout
        self.num_blocks = pool.num_blocks * shape.pieces_per_block
        self.num_bytes, self.fd, self.buffer, self.tensor = pool.num_bytes, pool.fd, pool.buffer, pool.tensor


def work(connection: Connection, parent_pid: int, shape: Shape, num_blocks: int) -> None:
    """The process: answers requests `(method, arguments)` until the pipe ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        return  # the parent went before we asked to go with it
    os.environ.update(QUIET)
    torch.set_num_threads(1)
    with KVPool(shape.layout, num_blocks) as pool:
        asyncio.run(answer_requests(Worker(pool, Pieces(pool, shape), connection), connection))


async def answer_requests(worker: Worker, connection: Connection) -> None:
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
