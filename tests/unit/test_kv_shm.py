"""The worker thread of the shared memory connector: it stops when told, and is never left behind."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from flowkv_engine.kv.segments import Copy
from flowkv_engine.transport.shm import _copy_steps, _steps
from flowkv_engine.transport.stream import finish_thread

MIB = 1 << 20


def test_copies_are_cut_into_even_steps_of_at_least_256_mib() -> None:
    assert list(_steps([Copy(1, 2, 3), Copy(7, 9, 1)], block_bytes=300 * MIB)) == [
        (300 * MIB, 600 * MIB, 300 * MIB),
        (600 * MIB, 900 * MIB, 300 * MIB),
        (900 * MIB, 1200 * MIB, 300 * MIB),
        (2100 * MIB, 2700 * MIB, 300 * MIB),
    ]
    assert list(_steps([Copy(0, 0, 1)], block_bytes=300 * MIB + 1)) == [(0, 0, 300 * MIB + 1)]


def test_stops_between_two_steps() -> None:
    source, target = np.ones(6, dtype=np.uint8), np.zeros(6, dtype=np.uint8)
    answers = iter([False, False, True])
    num_calls = _copy_steps(source, target, iter([(0, 0, 2), (2, 2, 2), (4, 4, 2)]), lambda: next(answers))
    assert num_calls == 2
    assert target.tolist() == [1, 1, 1, 1, 0, 0]


async def test_a_cancel_waits_until_the_thread_has_left_the_pool() -> None:
    is_copying, abandoned, may_end = threading.Event(), threading.Event(), threading.Event()

    def copy() -> int:
        is_copying.set()
        may_end.wait(5)
        return 1

    loop = asyncio.get_running_loop()
    waiting = asyncio.create_task(finish_thread(loop.run_in_executor(None, copy), abandoned))
    await loop.run_in_executor(None, is_copying.wait, 5)
    for _ in range(2):  # an impatient parent cancels twice
        waiting.cancel()
        done, _ = await asyncio.wait([waiting], timeout=0.01)
        assert not done
    assert abandoned.is_set()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
