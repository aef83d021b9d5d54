"""KV blocks over NCCL, between GPUs on any hosts: each link has a communicator of two ranks.

It is made with the link's first transfer: among n nodes most of the n x n links never carry one, and each
communicator holds buffers on both GPUs. A pair whose communicator could not be made has to show that it can,
when it links the next time.

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
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from flowkv_common.errors import Stale
from flowkv_common.wire.messages import Run
from flowkv_engine.kv.reservations import Reservation
from flowkv_engine.kv.segments import Copy
from flowkv_engine.transport.base import ConnectorUnavailable
from flowkv_engine.transport.stream import (
    Channel,
    Frame,
    FrameError,
    Hello,
    Land,
    Push,
    Refused,
    Reply,
    StreamConnector,
    finish_thread,
)

log = logging.getLogger(__name__)

SENDER, RECEIVER = 0, 1

# Making a communicator took 55 s on a host of eight B200, most of it to load kernels (NVIDIA/nccl#1646).
_JOIN_TIMEOUT_S = 120.0
# A request waits so long for it. If that is too short, the pair is joined without a request.
_JOIN_FOR_REQUEST_S = 30.0
# A link below a quarter of 1 Gbit/s counts as broken: so much longer than a step may a copy take.
_SLOWEST_BYTES_PER_S = 32 << 20
_FIRST_POLL_S = 20e-6
_LONGEST_POLL_S = 1e-3


_Job = tuple[Callable[[], None], concurrent.futures.Future[None]]
Move = Callable[[list[Run], Callable[[], bool]], Awaitable[None]]


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

    def exchange(self, spans: Sequence[Span]) -> None:
        """Queues a group: a `SENDER` sends each span, a `RECEIVER` receives into each.

        The n-th span of a group meets the n-th of the other end's, which has the same length.
        """

    def poll(self) -> bool:
        """Whether all that was queued has ended. Raises `NcclFailed` if it never will."""

    def abort(self) -> None:
        """Ends the communicator. What it was to write it has written, or never will. Idempotent."""


class Invitation(Frame, frozen=True, kw_only=True):
    """What the receiver is to join, at once; without an id nothing yet: another one follows a `Transfer`.

    A process that knows the id could join in its place: it is a secret.
    """

    unique_id: bytes
    version: str


@dataclass(eq=False)
class NcclConnector(StreamConnector):
    name = "nccl"
    is_local = False

    new_backend: Callable[[], NcclBackend] = field(kw_only=True)  # makes one end of a communicator
    _communicators: set[Communicator] = field(default_factory=set, init=False)
    _failed_ways: set[str] = field(default_factory=set, init=False)  # where no communicator could be made

    @property
    def connect_timeout_s(self) -> float:
        return super().connect_timeout_s + _JOIN_TIMEOUT_S

    async def __aexit__(self, *error: object) -> None:
        try:
            await super().__aexit__(*error)
        finally:
            for communicator in self._communicators:
                communicator.abort()
                if not await communicator.ended(self.io_timeout_s):
                    log.error("nccl: a communicator does not end; the pool's memory is not safe to free")

    async def introduce(self, channel: Channel) -> Push:
        if channel.way in self._failed_ways:
            move = await self._invite(channel, _JOIN_TIMEOUT_S)
            self._failed_ways.discard(channel.way)
        else:
            move = None
            await self._send_invitation(channel, self.new_backend(), b"")

        async def push(copies: list[Copy]) -> int:
            nonlocal move
            await channel.expect_yes()  # asked first, so that a refusal costs no bytes
            if move is None:
                try:
                    move = await self._invite(channel, _JOIN_FOR_REQUEST_S)
                except (OSError, Refused) as error:
                    self._failed_ways.add(channel.way)
                    raise ConnectorUnavailable(str(error)) from error
            await move([Run(copy.src, copy.length) for copy in copies], lambda: False)
            return len(copies)

        return push

    async def welcome(self, channel: Channel, hello: Hello) -> Land:
        move = await self._accept_invitation(channel)

        async def land(copies: list[Copy], reservation: Reservation) -> int:
            """The receives have ended, or the abort has returned, when this returns or raises."""
            nonlocal move
            if reservation.revoked:
                raise Stale("the reservation has ended")
            await channel.send_frame(Reply())
            while move is None:
                move = await self._accept_invitation(channel)
            await move([Run(copy.dst, copy.length) for copy in copies], lambda: reservation.revoked)
            return 0

        return land

    async def _invite(self, channel: Channel, timeout_s: float) -> Move:
        """The sender's part in making a communicator."""
        backend = self.new_backend()
        unique_id = backend.get_unique_id()
        await self._send_invitation(channel, backend, unique_id)
        move = await self._join(backend, SENDER, unique_id, channel, timeout_s)
        await channel.expect_yes()
        return move

    async def _send_invitation(self, channel: Channel, backend: NcclBackend, unique_id: bytes) -> None:
        await channel.send_frame(Invitation(unique_id=unique_id, version=backend.version))
        await channel.expect_yes()

    async def _accept_invitation(self, channel: Channel) -> Move | None:
        """The receiver's part in making a communicator; None if it is not to be made yet."""
        invitation = await channel.receive_frame(Invitation)
        backend = self.new_backend()
        if invitation.version != backend.version:
            reason = f"NCCL versions differ: receiver {backend.version}, sender {invitation.version}"
            await channel.send_frame(Reply(error=reason))
            raise FrameError(reason)
        await channel.send_frame(Reply())
        if not invitation.unique_id:
            return None
        move = await self._join(backend, RECEIVER, invitation.unique_id, channel, _JOIN_TIMEOUT_S)
        await channel.send_frame(Reply())
        return move

    async def _join(
        self, backend: NcclBackend, rank: int, unique_id: bytes, channel: Channel, timeout_s: float
    ) -> Move:
        """Makes a communicator that ends with the channel. Returns what moves runs of blocks by it."""
        communicator = Communicator(backend, rank)
        self._communicators = {other for other in self._communicators if other.thread.is_alive()}
        self._communicators.add(communicator)
        channel.lifetime.callback(communicator.abort)

        def arrived() -> None:
            # A sender has nothing to say meanwhile. A receiver's reply may come early: only its end counts.
            if rank == RECEIVER or channel.has_ended():
                communicator.abort()

        async def move(runs: list[Run], should_stop: Callable[[], bool]) -> None:
            start, size = self.pool.tensor.data_ptr(), self.pool.layout.block_bytes
            spans = [Span(start + run.start * size, run.length * size) for run in runs]
            timeout_s = self.io_timeout_s + sum(span.num_bytes for span in spans) / _SLOWEST_BYTES_PER_S
            with channel.watching(arrived):
                await communicator.exchange(spans, timeout_s, should_stop)

        with channel.watching(arrived):
            await communicator.join(unique_id, timeout_s)
        return move


class Communicator:
    """One end, as `rank`. Used from the event loop; what touches `backend` runs in the thread."""

    def __init__(self, backend: NcclBackend, rank: int) -> None:
        self._backend = backend
        self._rank = rank
        self._stop = threading.Event()
        self._aborted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        # A daemon: a thread that waits in `init` for a peer that never comes can't be ended, only left.
        self.thread = threading.Thread(target=self._run_jobs, name="flowkv-nccl", daemon=True)
        self.thread.start()

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
        await finish_thread(self._submit(work), self._stop.set)

    def abort(self) -> None:
        """Asks the thread to abort and end; `ended` waits for that. Idempotent. From the event loop."""
        if not self._aborted.done():
            self._aborted.set_result(None)
            self._stop.set()
            self._jobs.put(None)

    async def ended(self, timeout_s: float) -> bool:
        """Whether the thread has ended, after at most `timeout_s`."""
        await asyncio.to_thread(self.thread.join, timeout_s)
        return not self.thread.is_alive()

    def _submit(self, work: Callable[[], None]) -> asyncio.Future[None]:
        if self._aborted.done():
            raise NcclFailed("aborted")
        result: concurrent.futures.Future[None] = concurrent.futures.Future()
        result.set_running_or_notify_cancel()
        self._jobs.put((work, result))
        return asyncio.wrap_future(result)

    def _run_jobs(self) -> None:
        """The thread."""
        for work, result in iter(self._jobs.get, None):
            try:
                work()
            except BaseException as error:
                result.set_exception(error)
            else:
                result.set_result(None)
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
            self._backend.exchange(spans)
            pause_s = _FIRST_POLL_S
            while not self._backend.poll():
                check()
                self._stop.wait(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_POLL_S)
        except BaseException:
            self._stop.set()
            self._backend.abort()
            raise
