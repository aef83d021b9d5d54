from __future__ import annotations

import asyncio

import pytest

from flowkv_common.aio import Backoff, jittered, running, wait_event
from flowkv_common.errors import Full


async def test_tasks_end_with_the_block() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with running(work()):
        await asyncio.sleep(0)
        assert not ended.is_set()
    assert ended.is_set()


async def test_an_error_of_the_block_leaves_as_itself() -> None:
    with pytest.raises(Full):
        async with running(asyncio.sleep(60)):
            raise Full("no room")


async def test_an_error_of_a_task_ends_the_block() -> None:
    async def fail() -> None:
        raise Full("no room")

    with pytest.raises(Full):
        async with asyncio.timeout(5), running(fail()):
            await asyncio.Event().wait()


async def test_a_cancelled_block_is_cancelled() -> None:
    async def block() -> None:
        async with running(asyncio.sleep(60)):
            await asyncio.Event().wait()

    task = asyncio.create_task(block())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_backoff_doubles_up_to_its_longest_pause_and_begins_anew() -> None:
    backoff = Backoff(0.1, 0.35)
    assert [backoff.advance() for _ in range(4)] == [0.1, 0.2, 0.35, 0.35]
    backoff.reset()
    assert backoff.next_s == backoff.advance() == 0.1


def test_jittered_periods_differ_by_a_tenth_at_most() -> None:
    periods = {jittered(2.0) for _ in range(100)}
    assert len(periods) > 1
    assert 1.8 <= min(periods) <= max(periods) <= 2.0


async def test_a_wait_for_an_event_ends_with_the_event_or_the_time() -> None:
    event = asyncio.Event()
    assert not await wait_event(event, 0.001)
    event.set()
    assert await wait_event(event, None)
