"""Two worker processes as their parent sees them. Each request has a deadline; both end with the block."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, NamedTuple, Self

from benchmarks.transfer import worker
from benchmarks.transfer.shapes import Shape
from benchmarks.transfer.transports import Unavailable
from flowkv_common.wire.messages import Run
from flowkv_engine.kv.segments import Copy

_START_TIMEOUT_S = 120.0
_TIMEOUT_S = 180.0


class WorkerFailed(Exception):
    """A worker answered with an error, died, or was out of time."""


class Timing(NamedTuple):
    """From the sender's start until both sides know the end; CPU seconds of both processes."""

    duration_s: float
    cpu_s: float
    num_calls: int


class Peer:
    """One worker."""

    def __init__(self, shape: Shape, num_blocks: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=worker.main, args=(theirs, os.getpid(), shape, num_blocks), daemon=True
        )
        self._process.start()
        theirs.close()

    def ask(self, method: str, *arguments: object) -> Any:
        """Raises `WorkerFailed`, `Unavailable`."""
        self.begin(method, *arguments)
        return self.answer()

    def begin(self, method: str, *arguments: object) -> None:
        self._connection.send((method, arguments))

    def answer(self, timeout_s: float = _TIMEOUT_S) -> Any:
        kind, value = self._received(timeout_s)
        if kind == "unavailable":
            raise Unavailable(value)
        if kind == "failed":
            raise WorkerFailed(value)
        return value

    def stop(self) -> None:
        self._connection.close()
        self._process.join(5.0)
        self._process.kill()
        self._process.join()

    def _received(self, timeout_s: float) -> tuple[str, Any]:
        connection: Connection[Any, Any] = self._connection
        try:
            if not connection.poll(timeout_s):
                raise WorkerFailed(f"no answer within {timeout_s:.0f} s")
            received: tuple[str, Any] = connection.recv()
        except (EOFError, ConnectionError) as error:
            raise WorkerFailed("the worker has died") from error
        return received


class Pair:
    """A sender and a receiver with a pool of `num_blocks` blocks each."""

    def __init__(self, shape: Shape, num_blocks: int) -> None:
        self.sender, self.receiver = (Peer(shape, num_blocks) for _ in range(2))

    def __enter__(self) -> Self:
        try:
            for number, peer in enumerate(self._both()):
                peer.answer(_START_TIMEOUT_S)
                peer.begin("fill", number)
            for peer in self._both():
                peer.answer()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def connect(self, transport: str, is_layer_major: bool) -> None:
        """From now on copies are in blocks, or in pieces where the pools are layer-major."""
        address = self.receiver.ask("listen", transport, is_layer_major)
        self.sender.ask("connect", transport, is_layer_major, address)

    def disconnect(self) -> None:
        for peer in self._both():
            peer.begin("disconnect")
        for peer in self._both():
            peer.answer()

    def transfer(self, copies: Sequence[Copy], one_by_one: bool) -> Timing:
        """One timed transfer out of memory that is not in the cache."""
        self._evict()
        cpu_before_s = self._cpu_s()
        self.receiver.begin("receive", copies, one_by_one)
        self.receiver.answer()  # it is ready
        sent = self.sender.ask("send", copies, one_by_one)
        received = self.receiver.answer()
        duration_s = max(sent.ended_s, received.ended_s) - sent.started_s
        return Timing(duration_s, self._cpu_s() - cpu_before_s, sent.num_calls)

    def memcpy(self, src: Run, dst: Run) -> Timing:
        """One timed copy of whole blocks within the receiver's pool."""
        self._evict()
        cpu_before_s = self._cpu_s()
        copied = self.receiver.ask("memcpy", src, dst)
        return Timing(copied.ended_s - copied.started_s, self._cpu_s() - cpu_before_s, copied.num_calls)

    def erase(self, copies: Sequence[Copy]) -> None:
        self.receiver.ask("erase", [Run(copy.dst, copy.length) for copy in copies])

    def verify(self, copies: Sequence[Copy]) -> None:
        """Raises `WorkerFailed` unless the receiver holds the sender's bytes."""
        self.sender.begin("checksum", [Run(copy.src, copy.length) for copy in copies])
        self.receiver.begin("checksum", [Run(copy.dst, copy.length) for copy in copies])
        if self.sender.answer() != self.receiver.answer():
            raise WorkerFailed("other bytes arrived than were sent")

    def _evict(self) -> None:
        for peer in self._both():
            peer.begin("evict")
        for peer in self._both():
            peer.answer()

    def _cpu_s(self) -> float:
        used: list[float] = [peer.ask("cpu_s") for peer in self._both()]
        return sum(used)

    def _both(self) -> tuple[Peer, Peer]:
        return self.sender, self.receiver

    def _stop(self) -> None:
        for peer in self._both():
            peer.stop()
