from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from flowkv_common.node.budget import HandoffBudget


async def settle() -> None:
    """Let every task that can run do so."""
    for _ in range(5):
        await asyncio.sleep(0)


async def holder(budget: HandoffBudget, num_bytes: int, log: list[int], leave: asyncio.Event) -> None:
    async with budget.hold(num_bytes):
        log.append(num_bytes)
        await leave.wait()


async def test_count_and_bytes_bound_what_is_in_flight() -> None:
    budget, log, leave = HandoffBudget(max_handoffs=2, max_bytes=100), [], asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        for num_bytes in (60, 30, 1, 2):
            tasks.create_task(holder(budget, num_bytes, log, leave))
        await settle()
        assert log == [60, 30]
        assert (budget.num_in_flight, budget.bytes_in_flight, budget.num_waiting) == (2, 90, 2)
        leave.set()
    assert log == [60, 30, 1, 2]
    assert (budget.num_in_flight, budget.bytes_in_flight) == (0, 0)


async def test_larger_than_the_budget_goes_alone() -> None:
    budget = HandoffBudget(max_handoffs=4, max_bytes=100)
    async with asyncio.timeout(1), budget.hold(500):
        assert budget.bytes_in_flight == 500


async def test_first_come_first_served_even_if_a_later_one_would_fit() -> None:
    budget, log, leave = HandoffBudget(max_handoffs=4, max_bytes=100), [], asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        for num_bytes in (80, 50, 10):
            tasks.create_task(holder(budget, num_bytes, log, leave))
        await settle()
        assert log == [80]
        leave.set()
    assert log == [80, 50, 10]


async def test_cancelled_while_waiting_gives_its_place_up() -> None:
    budget, log, leave = HandoffBudget(max_handoffs=1, max_bytes=100), [], asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(holder(budget, 1, log, leave))
        second = tasks.create_task(holder(budget, 2, log, leave))
        tasks.create_task(holder(budget, 3, log, leave))
        await settle()
        second.cancel()
        await settle()
        leave.set()
    assert log == [1, 3]
    assert budget.num_in_flight == budget.num_waiting == 0


async def test_cancelled_in_the_moment_of_admission_gives_the_room_back() -> None:
    budget = HandoffBudget(max_handoffs=1, max_bytes=100)
    async with AsyncExitStack() as held:
        await held.enter_async_context(budget.hold(1))
        waiting = asyncio.create_task(holder(budget, 2, [], asyncio.Event()))
        await settle()
        await held.aclose()  # admits the waiting one ...
        waiting.cancel()  # ... which never gets to know
        await asyncio.gather(waiting, return_exceptions=True)
    assert (budget.num_in_flight, budget.bytes_in_flight) == (0, 0)
