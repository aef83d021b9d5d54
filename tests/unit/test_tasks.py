from __future__ import annotations

import asyncio

import pytest

from flowkv_common.aio import running
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
        async with running(asyncio.Event().wait()):
            raise Full("no room")


async def test_an_error_of_a_task_ends_the_block() -> None:
    async def fail() -> None:
        raise Full("no room")

    with pytest.raises(Full):
        async with asyncio.timeout(5), running(fail()):
            await asyncio.Event().wait()


async def test_a_cancelled_block_is_cancelled() -> None:
    async def block() -> None:
        async with running(asyncio.Event().wait()):
            await asyncio.Event().wait()

    task = asyncio.create_task(block())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
