"""Prompts take blocks in the order of their arrival, also those that had let others go first."""

from __future__ import annotations

import asyncio

from flowkv_prefill.turns import Turns


async def settle() -> None:
    """Let every task that can run do so."""
    for _ in range(5):
        await asyncio.sleep(0)


class Line:
    """Tasks that wait for a turn and then hold it until told to leave."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.turns = Turns()
        self.served: list[int] = []
        self._tasks = tasks
        self._leave = asyncio.Semaphore(0)

    def join(self, number: int) -> asyncio.Task[None]:
        return self._tasks.create_task(self._wait(number))

    async def _wait(self, number: int) -> None:
        async with self.turns.turn(number):
            self.served.append(number)
            await self._leave.acquire()

    async def next(self) -> None:
        """Whose turn it is leaves."""
        self._leave.release()
        await settle()


async def test_one_at_a_time_and_the_smallest_number_first() -> None:
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        line = Line(tasks)
        for number in (5, 9, 3, 7):
            line.join(number)
        await settle()
        assert (line.served, line.turns.num_waiting) == ([5], 3)
        for _ in range(4):
            await line.next()
    assert line.served == [5, 3, 7, 9]


async def test_who_leaves_and_comes_back_has_its_old_place() -> None:
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        line = Line(tasks)
        waiting = {number: line.join(number) for number in (1, 2, 3)}
        await settle()
        waiting[2].cancel()
        await settle()
        line.join(2)
        await settle()
        for _ in range(3):
            await line.next()
    assert line.served == [1, 2, 3]


async def test_cancelled_in_the_moment_of_its_turn_passes_it_on() -> None:
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        turns, served = Turns(), []

        async def wait(number: int) -> None:
            async with turns.turn(number):
                served.append(number)

        async with turns.turn(0):
            second, _ = tasks.create_task(wait(1)), tasks.create_task(wait(2))
            await settle()
        second.cancel()  # has been given its turn, and has not run since
    assert served == [2]
    async with asyncio.timeout(5), turns.turn(9):
        assert turns.num_waiting == 0
