"""What asyncio lacks: tasks that end with a block, waits with an end, back-off, a fair queue."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import math
import signal
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from typing import Any, NamedTuple


@contextlib.asynccontextmanager
async def running(*coroutines: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `coroutines` while the block runs, cancel them when it ends; if one fails, so does the block.

    A single error leaves as itself, whoever raised it, and several as a group.
    """
    async with group() as tasks:
        mine = [tasks.create_task(coroutine) for coroutine in coroutines]
        try:
            yield
        finally:
            for task in mine:
                task.cancel()


@contextlib.asynccontextmanager
async def group() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group that a single error leaves as itself: several leave as a group."""
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except BaseExceptionGroup as errors:
        if len(errors.exceptions) == 1:
            raise errors.exceptions[0] from None
        raise


def stop_on_signals() -> asyncio.Event:
    """An event that SIGTERM or SIGINT sets: the service then drains and ends."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


async def wait_event(event: asyncio.Event, timeout_s: float | None) -> bool:
    """Wait until `event` is set, at most `timeout_s`; returns whether it is set."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
    return event.is_set()


class Backoff:
    """The pauses between failed attempts: each twice as long as the one before, at most `longest_s`."""

    def __init__(self, first_s: float, longest_s: float) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self.next_s = first_s  # the pause that is due next

    def reset(self) -> None:
        """An attempt has worked."""
        self.next_s = self._first_s

    def advance(self) -> float:
        """Returns the pause that is due and doubles the next one."""
        pause_s = self.next_s
        self.next_s = min(2 * pause_s, self._longest_s)
        return pause_s

    async def sleep(self) -> None:
        await asyncio.sleep(self.advance())


class Phases:
    """Seconds per phase; a phase that comes again adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds spent in the block."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.add_seconds({name: time.monotonic() - began})

    def add_seconds(self, seconds: Mapping[str, float]) -> None:
        for name, spent in seconds.items():
            self.seconds[name] = round(self.seconds.get(name, 0.0) + spent, 6)


class _Waiting(NamedTuple):
    place: int
    arrival: int  # orders those of one place; no two are equal
    weight: int
    admission: asyncio.Future[None]


class FairQueue:
    """A semaphore with an order: at most `max_holders` tasks hold it, of at most `max_weight` together.

    The next is always the task with the smallest place, also when it has to wait and a later one would fit.
    A task heavier than `max_weight` enters alone. A cancel takes the same time however many tasks wait.
    """

    def __init__(self, max_holders: int, max_weight: float = math.inf) -> None:
        self._max_holders = max_holders
        self._max_weight = max_weight
        self._heap: list[_Waiting] = []  # all that wait, and some that are cancelled
        self._arrivals = itertools.count()
        self.num_waiting = 0
        self.num_holders = 0
        self.weight_held = 0

    @contextlib.asynccontextmanager
    async def hold(self, weight: int = 0, *, place: int | None = None) -> AsyncIterator[None]:
        """Wait for room, then hold `weight` of it while the context lasts.

        Without a `place` tasks enter in the order in which they come. With one, a task that leaves and comes
        back keeps its place. A queue is used in one of the two ways.
        """
        arrival = next(self._arrivals)
        admission: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._heap, _Waiting(arrival if place is None else place, arrival, weight, admission))
        self.num_waiting += 1
        self._admit()
        try:
            await admission
        except asyncio.CancelledError:
            if not admission.cancelled():  # admitted, then cancelled before it could run
                self._leave(weight)
                raise
            self.num_waiting -= 1
            # The cancelled are removed only when they are half of the heap: so each cancel costs the same.
            if len(self._heap) > 2 * self.num_waiting:
                self._heap = [waiting for waiting in self._heap if not waiting.admission.done()]
                heapq.heapify(self._heap)
            self._admit()  # it may have kept others out
            raise
        try:
            yield
        finally:
            self._leave(weight)

    def _leave(self, weight: int) -> None:
        self.num_holders -= 1
        self.weight_held -= weight
        self._admit()

    def _admit(self) -> None:
        """Admit the first ones while there is room."""
        while self._heap:
            first = self._heap[0]
            if first.admission.done():  # cancelled: its task counts it, when it runs
                heapq.heappop(self._heap)
                continue
            has_room = (
                self.num_holders < self._max_holders and self.weight_held + first.weight <= self._max_weight
            )
            if self.num_holders and not has_room:
                return
            heapq.heappop(self._heap)
            self.num_waiting -= 1
            self.num_holders += 1
            self.weight_held += first.weight
            first.admission.set_result(None)
