"""KV blocks over NCCL, between GPUs on any hosts: each link has a communicator of two ranks.

A thread per communicator touches its end. No wait in that thread is bare: it polls, and aborts when it is
told to stop, when the backend reports an error, and when its time is up.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NamedTuple, Protocol

from flowkv_common.errors import Stale
from flowkv_engine.kv.pool import Pool
from flowkv_engine.kv.reservations import Reservation, Reservations
from flowkv_engine.kv.segments import Copy
from flowkv_engine.transport.sockets import LOOPBACK, Place
from flowkv_engine.transport.stream import Channel, Frame, Hello, Reply, StreamConnector, finish_thread

log = logging.getLogger(__name__)

SENDER, RECEIVER = 0, 1

# Making a communicator took 55 s on a host of eight B200, most of it to load kernels (NVIDIA/nccl#1646).
_JOIN_TIMEOUT_S = 120.0
# A link below a quarter of 1 Gbit/s counts as broken: so much longer than a step may a copy take.
_SLOWEST_BYTES_PER_S = 32 << 20
_FIRST_POLL_S = 20e-6
_LONGEST_POLL_S = 1e-3


class NcclFailed(ConnectionError):
    """The communicator broke, was aborted or ran out of time. A new one may work."""


class Span(NamedTuple):
    """Bytes at an address of the device."""

    address: int
    num_bytes: int


class NcclBackend(Protocol):
    """One end of one communicator of two ranks, used by one thread. Raises `NcclFailed`."""

    version: str
    scratch: Span  # bytes that nothing else uses, valid from `init` to `abort`

    def get_unique_id(self) -> bytes:
        """What both ends join under, once. The process that asked for it must be one of them."""

    def init(self, unique_id: bytes, rank: int) -> None:
        """Joins. Blocks until the other end has, for ever if it never does."""

    def group_start(self) -> None: ...

    def group_end(self) -> None: ...

    def send(self, address: int, num_bytes: int) -> None:
        """Queues a send to the other rank; the n-th send of a group meets the n-th `recv` there."""

    def recv(self, address: int, num_bytes: int) -> None: ...

    def poll(self) -> bool:
        """Whether all that was queued has ended. Raises `NcclFailed` if it never will."""

    def abort(self) -> None:
        """Ends the communicator. What it was to write it has written, or never will. Idempotent."""


class Invitation(Frame, frozen=True, kw_only=True):
    """What the receiver is to join. A process that knows the id could join in its place: it is a secret."""

    unique_id: bytes
    version: str


class NcclConnector(StreamConnector[Pool]):
    """`new_backend` makes one end of a communicator."""

    name = "nccl"
    is_local = False

    def __init__(
        self,
        pool: Pool,
        reservations: Reservations,
        admits: Callable[[str], bool],
        *,
        new_backend: Callable[[], NcclBackend],
        place: Place = LOOPBACK,
        io_timeout_s: float = 10.0,
    ) -> None:
        super().__init__(pool, reservations, admits, place=place, io_timeout_s=io_timeout_s)
        self._new_backend = new_backend
        self._sending: dict[Channel, Communicator] = {}
        self._communicators: set[Communicator] = set()

    @property
    def connect_timeout_s(self) -> float:
        return super().connect_timeout_s + _JOIN_TIMEOUT_S

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await super().__aexit__(kind, error, trace)
        finally:
            for communicator in self._communicators:
                communicator.abort()
                if not await communicator.ended(self._io_timeout_s):
                    log.error("nccl: a communicator does not end; the pool's memory is not safe to free")

    async def introduce(self, channel: Channel) -> None:
        backend = self._new_backend()
        unique_id = backend.get_unique_id()
        await channel.send_frame(Invitation(unique_id=unique_id, version=backend.version))
        await channel.expect_yes()
        communicator = self._start_communicator(backend, SENDER, channel)
        self._sending[channel] = communicator
        channel.lifetime.callback(self._sending.pop, channel)
        with channel.watching(functools.partial(_abort_if_gone, communicator, channel)):
            await communicator.join(unique_id, _JOIN_TIMEOUT_S)
        await channel.expect_yes()

    async def push(self, channel: Channel, copies: list[Copy]) -> int:
        await channel.expect_yes()  # asked first, so that a refusal costs no bytes
        communicator = self._sending[channel]
        with channel.watching(functools.partial(_abort_if_gone, communicator, channel)):
            spans = self._spans([(copy.src, copy.length) for copy in copies])
            await communicator.exchange(spans, self._timeout_s(spans))
        return len(copies)

    async def serve_sender(self, channel: Channel, hello: Hello) -> None:
        invitation = await channel.receive_frame(Invitation)
        backend = self._new_backend()
        if invitation.version != backend.version:
            reason = f"NCCL versions differ: receiver {backend.version}, sender {invitation.version}"
            await channel.send_frame(Reply(error=reason))
            return
        await channel.send_frame(Reply())
        communicator = self._start_communicator(backend, RECEIVER, channel)
        with channel.watching(communicator.abort):
            await communicator.join(invitation.unique_id, _JOIN_TIMEOUT_S)
        await channel.send_frame(Reply())

        async def land(copies: list[Copy], reservation: Reservation) -> int:
            """The receives have ended, or the abort has returned, when this returns or raises."""
            if reservation.revoked:
                raise Stale("the reservation has ended")
            await channel.send_frame(Reply())
            spans = self._spans([(copy.dst, copy.length) for copy in copies])
            with channel.watching(communicator.abort):
                await communicator.exchange(spans, self._timeout_s(spans), lambda: reservation.revoked)
            return 0

        await self.answer_transfers(channel, hello, land)

    def _start_communicator(self, backend: NcclBackend, rank: int, channel: Channel) -> Communicator:
        """It ends with the channel."""
        communicator = Communicator(backend, rank)
        self._communicators = {other for other in self._communicators if other.is_alive}
        self._communicators.add(communicator)
        channel.lifetime.callback(communicator.abort)
        return communicator

    def _timeout_s(self, spans: list[Span]) -> float:
        return self._io_timeout_s + sum(span.num_bytes for span in spans) / _SLOWEST_BYTES_PER_S

    def _spans(self, runs: list[tuple[int, int]]) -> list[Span]:
        start, size = self._pool.tensor.data_ptr(), self._pool.layout.block_bytes
        return [Span(start + first * size, length * size) for first, length in runs]


def _abort_if_gone(communicator: Communicator, channel: Channel) -> None:
    """A reply that comes early is no reason to abort, the end of the connection is."""
    if channel.peek() == b"":
        communicator.abort()


class Communicator:
    """One end, as `rank`. Used from the event loop; what touches `backend` runs in the thread."""

    def __init__(self, backend: NcclBackend, rank: int) -> None:
        self._backend = backend
        self._rank = rank
        self._stop = threading.Event()
        self._aborted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # A daemon: a thread that waits in `init` for a peer that never comes can't be ended, only left.
        self._thread = threading.Thread(target=self._run_jobs, name="flowkv-nccl", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    async def join(self, unique_id: bytes, timeout_s: float) -> None:
        """Joins, and moves first bytes, so that the first request doesn't pay for the connection.

        Raises `NcclFailed` also when the other end has not joined after `timeout_s`; then this end is lost.
        """

        def join_in_thread() -> None:
            self._backend.init(unique_id, self._rank)
            self._exchange([self._backend.scratch], timeout_s, lambda: False)

        joined = self._submit(join_in_thread)
        try:
            first = asyncio.FIRST_COMPLETED
            done, _ = await asyncio.wait([joined, self._aborted], timeout=timeout_s, return_when=first)
            if self._aborted in done:
                raise NcclFailed("aborted before both ends had joined")
            if not done:
                raise NcclFailed(f"the other end has not joined within {timeout_s} s")
            joined.result()
        except BaseException:
            joined.cancel()
            self.abort()
            raise

    async def exchange(
        self, spans: Sequence[Span], timeout_s: float, should_stop: Callable[[], bool] = lambda: False
    ) -> None:
        """Sends the spans, or receives into them, all in one group.

        When this returns or raises, also by a cancel, nothing touches them any more. `should_stop` is asked
        from the thread. Raises `NcclFailed`; then the communicator has been aborted.
        """
        work = functools.partial(self._exchange, spans, timeout_s, should_stop)
        await finish_thread(self._submit(work), self._stop)

    def abort(self) -> None:
        """Asks the thread to abort and end; `ended` waits for that. Idempotent. From the event loop."""
        if not self._aborted.done():
            self._aborted.set_result(None)
            self._stop.set()
            self._jobs.put(None)

    async def ended(self, timeout_s: float) -> bool:
        """Whether the thread has ended, after at most `timeout_s`."""
        await asyncio.to_thread(self._thread.join, timeout_s)
        return not self.is_alive

    def _submit(self, work: Callable[[], None]) -> asyncio.Future[None]:
        if self._aborted.done():
            raise NcclFailed("aborted")
        result: concurrent.futures.Future[None] = concurrent.futures.Future()
        result.set_running_or_notify_cancel()

        def job() -> None:
            try:
                work()
            except BaseException as error:
                result.set_exception(error)
            else:
                result.set_result(None)

        self._jobs.put(job)
        return asyncio.wrap_future(result)

    def _run_jobs(self) -> None:
        """The thread."""
        for job in iter(self._jobs.get, None):
            job()
        self._backend.abort()

    def _exchange(self, spans: Sequence[Span], timeout_s: float, should_stop: Callable[[], bool]) -> None:
        """In the thread."""
        ends_at = time.monotonic() + timeout_s

        def check() -> None:
            if self._stop.is_set() or should_stop():
                raise NcclFailed("aborted")
            if time.monotonic() > ends_at:
                raise NcclFailed(f"not done within {timeout_s} s")

        try:
            check()
            move = self._backend.send if self._rank == SENDER else self._backend.recv
            self._backend.group_start()
            try:
                for span in spans:
                    move(span.address, span.num_bytes)
            finally:
                self._backend.group_end()  # an abort inside of a group would wait for its end
            pause_s = _FIRST_POLL_S
            while not self._backend.poll():
                check()
                self._stop.wait(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_POLL_S)
        except BaseException:
            self._stop.set()
            self._backend.abort()
            raise
