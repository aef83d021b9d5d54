"""One side of a pair in a process of its own: pool, blocks, reservations and connector, told what to do.

Reads `(method, arguments)` from a pipe. Answers `("reply", value)` or `("error", text)`, and reports what
happens in between as `(name of the event, detail)`. Can be held at a point of a transfer.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from flowkv_common.errors import FlowKVError, TransferFailed
from flowkv_common.wire.messages import Run
from flowkv_engine.kv.blocks import Blocks, OutOfBlocks
from flowkv_engine.kv.pool import KVPool
from flowkv_engine.kv.reservations import Reservation, Reservations
from flowkv_engine.kv.segments import Copy, align
from flowkv_engine.transport.base import ConnectorUnavailable, KVLink
from tests.contract.kv_nodes import LARGE, LINK_TOKEN, connector_on_host

IO_TIMEOUT_S = 1.0

NUM_RUNS, RUN_BLOCKS = 8, 24
NUM_USED = NUM_RUNS * RUN_BLOCKS  # blocks of 1 MiB, free at first
NUM_BLOCKS = NUM_USED + NUM_RUNS + 1
GUARDS = range(0, NUM_BLOCKS, RUN_BLOCKS + 1)  # one before and one after each run: nobody may write them

# Of the looks at a reservation's `revoked`: some bytes have been copied by then, and most have not.
AMID = 4


class Reports:
    """The pipe back. Used from the event loop and from threads that copy."""

    def __init__(self, pipe: Connection, gate: Connection) -> None:
        self._pipe = pipe
        self._gate = gate
        self._lock = threading.Lock()
        self.hold_at: str | None = None

    def say(self, name: str, detail: object = None) -> None:
        with self._lock:
            self._pipe.send((name, detail))

    def reach(self, point: str) -> None:
        """Reports the point, and stays there until the gate opens if it is the one to hold at."""
        self.say(point)
        if self.hold_at == point:
            self.hold_at = None
            self._gate.recv_bytes()


class WatchedReservation:
    """What a copy sees of its reservation, which reports when it is halfway."""

    def __init__(self, reservation: Reservation, reports: Reports) -> None:
        self._reservation = reservation
        self._reports = reports
        self._num_looks = 0

    @property
    def revoked(self) -> bool:
        self._num_looks += 1
        if self._num_looks == AMID:
            self._reports.reach("copying")
        return self._reservation.revoked


class WatchedReservations(Reservations):
    """Reservations that report when a copy is whole but not yet confirmed, and when none is left."""

    def __init__(self, blocks: Blocks, reports: Reports) -> None:
        super().__init__(blocks)
        self._reports = reports
        self._num_copies = 0
        self.none_open = asyncio.Event()
        self.none_open.set()

    @contextlib.contextmanager
    def copying(self, transfer_id: str, token: str, dst_blocks: Sequence[int]) -> Iterator[Any]:
        with self._counted(), super().copying(transfer_id, token, dst_blocks) as reservation:
            yield WatchedReservation(reservation, self._reports)
        self._reports.reach("landed")

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self._num_copies += 1
        self.none_open.clear()
        try:
            yield
        finally:
            self._num_copies -= 1
            if not self._num_copies:
                self.none_open.set()


class ErrorsSeen(logging.Handler):
    """What the code says it did not expect."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))


class FaultNode:
    """Its public methods are what may be asked of it."""

    def __init__(
        self,
        kind: str,
        seed: int,
        reports: Reports,
        stack: contextlib.AsyncExitStack,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._reports = reports
        self._stack = stack
        self._tasks = tasks
        self._pool = stack.enter_context(KVPool(LARGE, NUM_BLOCKS))
        words = np.frombuffer(self._pool.buffer, dtype=np.uint64)
        words[:] = np.arange(
            seed << 40, (seed << 40) + len(words), dtype=np.uint64
        )  # no word twice, anywhere
        self._blocks = Blocks(NUM_BLOCKS)
        everything = self._blocks.allocate(NUM_BLOCKS)
        self._blocks.release(block for block in everything if block not in GUARDS)
        self._reservations = WatchedReservations(self._blocks, reports)
        self._connector = connector_on_host(
            kind, self._pool, self._reservations, LINK_TOKEN.__eq__, io_timeout_s=IO_TIMEOUT_S
        )
        self._link: KVLink | None = None
        self._tokens: dict[str, str] = {}
        self._sending: asyncio.Task[None] | None = None
        self._errors = ErrorsSeen()
        logging.getLogger().addHandler(self._errors)
        self._guarded = self.checksums(list(GUARDS))

    async def start(self) -> str:
        await self._stack.enter_async_context(self._connector)
        return await self._connector.listen()

    # --- as a receiver -----------------------------------------------------------------------------

    def reserve(self, transfer_id: str, num_blocks: int) -> tuple[str, list[int]]:
        reservation = self._reservations.reserve(transfer_id, num_blocks, [], [], 60.0)
        self._tokens[transfer_id] = reservation.token
        return reservation.token, reservation.block_ids

    def hold_at(self, point: str) -> None:
        self._reports.hold_at = point

    def let_expire(self, transfer_id: str, in_s: float) -> None:
        """Shortens what the reservation has left; a timer sweeps it and reports."""
        token = self._tokens[transfer_id]
        expires_at = self._reservations.extend(transfer_id, token, in_s).expires_at
        asyncio.get_running_loop().call_later(in_s, self._sweep, expires_at)

    def claim(self, transfer_id: str, token: str) -> list[int]:
        """The commit. Raises `Stale`."""
        return self._reservations.claim(transfer_id, token).block_ids

    def cancel(self, transfer_id: str) -> None:
        self._reservations.cancel(transfer_id)

    def release(self, block_ids: list[int]) -> None:
        self._blocks.release(block_ids)

    def overwrite(self, block_ids: list[int]) -> dict[int, int]:
        """What a new owner of the blocks does; returns their new checksums."""
        for block_id in block_ids:
            words = np.frombuffer(self._pool.bytes_of(Run(block_id, 1)), dtype=np.uint64)
            words[:] = ~np.uint64(block_id)
        return self.checksums(block_ids)

    async def settled(self) -> None:
        """Returns when no copy into this pool is under way any more."""
        await self._reservations.none_open.wait()

    # --- as a sender -------------------------------------------------------------------------------

    async def connect(self, address: str) -> None:
        if self._link is not None:
            await self._link.close()
        self._link = await self._connector.connect(address, LINK_TOKEN, NUM_BLOCKS)

    def send(self, transfer_id: str, token: str, target: list[int]) -> list[int]:
        """Begins to send; `sent`, `failed` or `aborted` follows. Returns the blocks that are read."""
        source = self._blocks.allocate(len(target))
        self._sending = self._tasks.create_task(self._send(transfer_id, token, source, target))
        return source

    def abort(self) -> None:
        assert self._sending is not None
        self._sending.cancel()

    async def _send(self, transfer_id: str, token: str, source: list[int], target: list[int]) -> None:
        assert self._link is not None
        started = time.monotonic()
        copies: list[Copy] = align(source, target)
        event, detail = "sent", ""
        try:
            await self._link.send_blocks(transfer_id, token, copies)
        except TransferFailed as error:
            event, detail = "failed", error.message
        except asyncio.CancelledError:
            event, detail = "aborted", "cancelled"
        self._blocks.release(source)
        self._reports.say(event, (time.monotonic() - started, detail))

    # --- either ------------------------------------------------------------------------------------

    def checksums(self, block_ids: list[int]) -> dict[int, int]:
        return {block_id: zlib.crc32(self._pool.bytes_of(Run(block_id, 1))) for block_id in block_ids}

    def check(self) -> None:
        """Raises AssertionError unless all is as at the start: books, guards, and nothing unexpected."""
        self._blocks.check_integrity()
        counts = self._blocks.counts()
        assert (counts.free, counts.leased, counts.quarantined) == (NUM_USED, len(GUARDS), 0), counts
        assert self._reservations.num_open == 0
        assert self.checksums(list(GUARDS)) == self._guarded, "guards were overwritten"
        assert not self._errors.texts, self._errors.texts

    def num_descriptors(self) -> int:
        return len(os.listdir("/proc/self/fd"))

    def _sweep(self, expires_at: float) -> None:
        if time.monotonic() < expires_at:  # timers may be early by the resolution of the clock
            asyncio.get_running_loop().call_soon(self._sweep, expires_at)
        else:
            self._reports.say("swept", self._reservations.sweep())


def run(kind: str, seed: int, pipe: Connection, gate: Connection) -> None:
    """The process: until the pipe is closed."""
    asyncio.run(_serve(kind, seed, pipe, gate))


async def _serve(kind: str, seed: int, pipe: Connection, gate: Connection) -> None:
    reports = Reports(pipe, gate)
    readable = asyncio.Event()
    asyncio.get_running_loop().add_reader(pipe.fileno(), readable.set)
    async with contextlib.AsyncExitStack() as stack:
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        node = FaultNode(kind, seed, reports, stack, tasks)
        reports.say("listening", await node.start())
        while True:
            await readable.wait()
            readable.clear()
            try:
                while pipe.poll():
                    await _obey(node, reports, *pipe.recv())
            except EOFError:
                return


async def _obey(node: FaultNode, reports: Reports, method: str, arguments: tuple[object, ...]) -> None:
    try:
        value = getattr(node, method)(*arguments)
        reports.say("reply", await value if inspect.isawaitable(value) else value)
    except (FlowKVError, ConnectorUnavailable, OutOfBlocks, AssertionError, ValueError) as error:
        reports.say("error", f"{type(error).__name__}: {error}")
