"""First come, first served, within bounds; a cancel in whatever moment leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import time
from contextlib import AsyncExitStack

import pytest

from flowkv_common.aio import FairQueue


async def settle() -> None:
    """Let every task that can run do so."""
    for _ in range(5):
        await asyncio.sleep(0)


class Line:
    """Tasks that enter and then stay until told to leave."""

    def __init__(self, tasks: asyncio.TaskGroup, queue: FairQueue) -> None:
        self.queue = queue
        self.entered: list[int] = []
        self._tasks = tasks
        self._leave = asyncio.Semaphore(0)

    def join(self, weight: int = 0, place: int | None = None) -> asyncio.Task[None]:
        return self._tasks.create_task(self._hold(weight, place))

    async def _hold(self, weight: int, place: int | None) -> None:
        async with self.queue.hold(weight, place=place):
            self.entered.append(weight if place is None else place)
            await self._leave.acquire()

    async def next(self) -> None:
        """Whoever has been in for longest leaves."""
        self._leave.release()
        await settle()


def counts(queue: FairQueue) -> tuple[int, int, int]:
    return queue.num_holders, queue.weight_held, queue.num_waiting


async def test_count_and_weight_bound_who_is_in() -> None:
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        line = Line(tasks, FairQueue(2, max_weight=100))
        for weight in (60, 30, 1, 2):
            line.join(weight)
        await settle()
        assert line.entered == [60, 30]
        assert counts(line.queue) == (2, 90, 2)
        for _ in range(4):
            await line.next()
    assert line.entered == [60, 30, 1, 2]
    assert counts(line.queue) == (0, 0, 0)


async def test_heavier_than_all_of_the_room_enters_alone() -> None:
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        line = Line(tasks, FairQueue(4, max_weight=100))
        line.join(500)
        line.join(1)
        await settle()
        assert counts(line.queue) == (1, 500, 1)
        await line.next()
        assert counts(line.queue) == (1, 1, 0)
        await line.next()


async def test_a_later_one_that_would_fit_waits_for_the_first() -> None:
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        line = Line(tasks, FairQueue(4, max_weight=100))
        for weight in (80, 50, 10):
            line.join(weight)
        await settle()
        assert line.entered == [80]
        for _ in range(3):
            await line.next()
    assert line.entered == [80, 50, 10]


async def test_the_smallest_place_is_next() -> None:
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        line = Line(tasks, FairQueue(1))
        for place in (5, 9, 3, 7):
            line.join(place=place)
        await settle()
        assert (line.entered, line.queue.num_waiting) == ([5], 3)
        for _ in range(4):
            await line.next()
    assert line.entered == [5, 3, 7, 9]


async def test_a_task_that_leaves_and_comes_back_keeps_its_place() -> None:
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        line = Line(tasks, FairQueue(1))
        waiting = {place: line.join(place=place) for place in (1, 2, 3)}
        await settle()
        waiting[2].cancel()
        await settle()
        line.join(place=2)
        await settle()
        for _ in range(3):
            await line.next()
    assert line.entered == [1, 2, 3]


async def test_cancelled_while_waiting_lets_a_lighter_one_in() -> None:
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        line = Line(tasks, FairQueue(4, max_weight=100))
        line.join(80)
        too_heavy = line.join(50)
        line.join(10)
        await settle()
        too_heavy.cancel()
        await settle()
        assert line.entered == [80, 10]
        assert counts(line.queue) == (2, 90, 0)
        await line.next()
        await line.next()


async def test_cancelled_in_the_moment_of_admission_gives_the_room_to_the_next() -> None:
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        line = Line(tasks, FairQueue(1))
        async with AsyncExitStack() as held:
            await held.enter_async_context(line.queue.hold(1))
            second = line.join(2)
            line.join(3)
            await settle()
            await held.aclose()  # admits the second ...
            second.cancel()  # ... which never gets to know
        await settle()
        assert line.entered == [3]
        await line.next()
    assert counts(line.queue) == (0, 0, 0)


@pytest.mark.parametrize("first_to_go", ["holder", "waiter"])
async def test_holder_and_waiter_cancelled_in_one_tick_leave_the_queue_empty(first_to_go: str) -> None:
    """As when clients, a gateway or a wedge end all attempts of a node together."""
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        line = Line(tasks, FairQueue(1, max_weight=100))
        both = [line.join(10), line.join(20)]
        await settle()
        for task in both if first_to_go == "holder" else reversed(both):
            task.cancel()
        await settle()
        assert counts(line.queue) == (0, 0, 0)
        line.join(30)
        await settle()
        assert line.entered == [10, 30]
        await line.next()


async def seconds_to_cancel(num_waiting: int) -> float:
    """Processor time until all of so many waiters have gone, the last one first."""
    queue = FairQueue(1)
    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks, queue.hold():
        line = Line(tasks, queue)
        waiters = [line.join() for _ in range(num_waiting)]
        await settle()
        assert queue.num_waiting == num_waiting
        gc.disable()  # it looks at all objects of all tests
        began = time.process_time()
        for task in reversed(waiters):
            task.cancel()
        await settle()
        gc.enable()
        assert queue.num_waiting == 0
        return time.process_time() - began


async def test_a_cancel_takes_the_same_time_however_many_wait() -> None:
    few = min([await seconds_to_cancel(1000) for _ in range(3)])
    assert await seconds_to_cancel(16_000) < 100 * few  # 16 times as many; each looking at all: 256


async def test_those_who_come_and_go_behind_one_that_waits_leave_nothing_behind() -> None:
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        line = Line(tasks, FairQueue(1))
        line.join(1)
        line.join(2)
        await settle()
        for _ in range(100):
            task = line.join(3)
            await settle()
            task.cancel()
            await settle()
        assert line.queue.num_waiting == 1
        await line.next()
        await line.next()
    assert line.entered == [1, 2]
