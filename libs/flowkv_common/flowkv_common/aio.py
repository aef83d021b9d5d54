"""What asyncio lacks: tasks that end with a block, waits with an end, back-off, a fair queue."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import math
import random
import signal
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from typing import Any

from sortedcontainers import SortedDict


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


def freeze_objects() -> None:
    """Keep garbage collections from walking through what exists now: libraries alone take 20 ms.

    Call it when all that stays has been loaded.
    """
    gc.collect()
    gc.freeze()


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


def jittered(period_s: float) -> float:
    """Up to a tenth less, at random: so those that were woken at one moment drift apart."""
    return period_s * random.uniform(0.9, 1.0)


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
    """Seconds per phase; a phase that comes again adds up. `spans`: when each began and ended, monotonic."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.spans: list[tuple[str, float, float]] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds spent in the block."""
        began = time.monotonic()
        try:
            yield
        finally:
            ended = time.monotonic()
            self.spans.append((name, began, ended))
            self.add_seconds({name: ended - began})

    def add_seconds(self, seconds: Mapping[str, float]) -> None:
        for name, spent in seconds.items():
            self.seconds[name] = round(self.seconds.get(name, 0.0) + spent, 6)


class FairQueue:
    """A semaphore with an order: at most `max_holders` tasks hold it, of at most `max_weight` together.

    The next is always the task with the smallest place, also when it has to wait and a later one would fit.
    A task heavier than `max_weight` enters alone. A cancel takes the same time however many tasks wait.
    """

    def __init__(self, max_holders: int, max_weight: float = math.inf) -> None:
        self._max_holders = max_holders
        self._max_weight = max_weight
        # (place, arrival) -> weight, and what the task waits for
        self._waiting: SortedDict[tuple[float, int], tuple[int, asyncio.Future[None]]] = SortedDict()
        self._arrivals = itertools.count()
        self.num_holders = 0
        self.weight_held = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def is_overtaken(self, place: float) -> bool:
        """Whether a task waits that comes before `place`. A holder that can't go on may give way to it."""
        return bool(self._waiting) and self._waiting.peekitem(0)[0][0] < place

    @contextlib.asynccontextmanager
    async def hold(self, weight: int = 0, *, place: float | None = None) -> AsyncIterator[None]:
        """Wait for room, then hold `weight` of it while the context lasts.

        Without a `place` tasks enter in the order in which they come. With one, a task that leaves and comes
        back keeps its place. A queue is used in one of the two ways.
        """
        arrival = next(self._arrivals)
        key = (arrival if place is None else place, arrival)
        admission: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[key] = (weight, admission)
        self._admit()
        try:
            await admission
        except asyncio.CancelledError:
            if admission.cancelled():
                self._waiting.pop(key, None)
                self._admit()  # it may have kept others out
            else:  # admitted, then cancelled before it could run
                self._leave(weight)
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
        while self._waiting:
            key, (weight, admission) = self._waiting.peekitem(0)
            has_room = self.num_holders < self._max_holders and self.weight_held + weight <= self._max_weight
            if self.num_holders and not has_room and not admission.cancelled():
                return
            del self._waiting[key]
            if not admission.cancelled():
                self.num_holders += 1
                self.weight_held += weight
                admission.set_result(None)
