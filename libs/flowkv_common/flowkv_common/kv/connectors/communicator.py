"""Two ranks that exchange bytes, and the one thread of each that may touch its end. Knows no blocks.

No wait in that thread is bare: it polls, and aborts when it is told to stop, when the backend reports an
error, and when its time is up.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from flowkv_common.kv.connectors.worker import outlived

SENDER, RECEIVER = 0, 1

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
    scratch: Span  # bytes that belong to nobody, valid from `init` to `abort`

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


class Communicator:
    """One end, as `rank`. Used from the event loop; what touches `backend` runs in the thread."""

    def __init__(self, backend: NcclBackend, rank: int) -> None:
        self._backend = backend
        self._rank = rank
        self._stop = threading.Event()
        self._aborted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # A daemon: a thread that waits in `init` for a peer that never comes can't be ended, only left.
        self._thread = threading.Thread(target=self._work, name="flowkv-nccl", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    async def open(self, unique_id: bytes, timeout_s: float) -> None:
        """Joins, and moves first bytes, so that the first request doesn't pay for the connection.

        Raises `NcclFailed` also when the other end has not joined after `timeout_s`; then this end is lost.
        """
        joined = self._submit(functools.partial(self._join, unique_id, timeout_s))
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
        await outlived(self._submit(work), self._stop)

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

    # --- in the thread -----------------------------------------------------------------------------

    def _work(self) -> None:
        for job in iter(self._jobs.get, None):
            job()
        self._backend.abort()

    def _join(self, unique_id: bytes, timeout_s: float) -> None:
        self._backend.init(unique_id, self._rank)
        self._exchange([self._backend.scratch], timeout_s, lambda: False)

    def _exchange(self, spans: Sequence[Span], timeout_s: float, should_stop: Callable[[], bool]) -> None:
        ends_at = time.monotonic() + timeout_s
        try:
            self._check(ends_at, timeout_s, should_stop)
            self._queue(spans)
            pause_s = _FIRST_POLL_S
            while not self._backend.poll():
                self._check(ends_at, timeout_s, should_stop)
                self._stop.wait(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_POLL_S)
        except BaseException:
            self._stop.set()
            self._backend.abort()
            raise

    def _queue(self, spans: Sequence[Span]) -> None:
        move = self._backend.send if self._rank == SENDER else self._backend.recv
        self._backend.group_start()
        try:
            for span in spans:
                move(span.address, span.num_bytes)
        finally:
            self._backend.group_end()  # an abort inside of a group would wait for its end

    def _check(self, ends_at: float, timeout_s: float, should_stop: Callable[[], bool]) -> None:
        if self._stop.is_set() or should_stop():
            raise NcclFailed("aborted")
        if time.monotonic() > ends_at:
            raise NcclFailed(f"not done within {timeout_s} s")

    # --- in the loop -------------------------------------------------------------------------------

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
