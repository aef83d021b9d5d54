"""The worker thread of the shared memory connector: it stops when told, and is never left behind."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from flowkv_common.kv.alignment import Copy
from flowkv_common.kv.connectors.shm import _copy_steps, _outlived, _steps

MIB = 1 << 20


def test_copies_are_cut_into_steps() -> None:
    assert list(_steps([Copy(1, 2, 3), Copy(7, 9, 1)], block_bytes=3 * MIB)) == [
        (3 * MIB, 6 * MIB, 4 * MIB),
        (7 * MIB, 10 * MIB, 4 * MIB),
        (11 * MIB, 14 * MIB, 1 * MIB),
        (21 * MIB, 27 * MIB, 3 * MIB),
    ]


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
    waiting = asyncio.create_task(_outlived(loop.run_in_executor(None, copy), abandoned))
    await loop.run_in_executor(None, is_copying.wait, 5)
    for _ in range(2):  # an impatient parent cancels twice
        waiting.cancel()
        done, _ = await asyncio.wait([waiting], timeout=0.01)
        assert not done
    assert abandoned.is_set()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
