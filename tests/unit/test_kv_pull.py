"""The worker thread of the connectors that pull: it stops when told, and is never left behind."""

from __future__ import annotations

import asyncio
import threading

import pytest

from flowkv_engine.kv.segments import Copy
from flowkv_engine.transport.pull import copy_all
from flowkv_engine.transport.stream import finish_thread

MIB = 1 << 20
STEP_BYTES = 256 * MIB


class ToldPool:
    """A `PeerPool` that keeps what it was told, a None for each `settle`."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int, int] | None] = []

    def copy(self, src: int, dst: int, num_bytes: int) -> None:
        self.told.append((src, dst, num_bytes))

    def settle(self) -> None:
        self.told.append(None)

    def close(self) -> None:
        raise NotImplementedError


def test_copies_are_cut_into_even_steps_that_end_one_by_one() -> None:
    peer = ToldPool()
    assert copy_all(peer, [Copy(1, 2, 3), Copy(7, 9, 1)], 300 * MIB, STEP_BYTES, lambda: False) == 4
    assert peer.told == [
        (300 * MIB, 600 * MIB, 300 * MIB),
        None,
        (600 * MIB, 900 * MIB, 300 * MIB),
        None,
        (900 * MIB, 1200 * MIB, 300 * MIB),
        None,
        (2100 * MIB, 2700 * MIB, 300 * MIB),
        None,
    ]
    peer = ToldPool()
    assert copy_all(peer, [Copy(0, 0, 1)], 300 * MIB + 1, STEP_BYTES, lambda: False) == 1
    assert peer.told == [(0, 0, 300 * MIB + 1), None]


def test_short_copies_are_queued_up_to_256_mib() -> None:
    peer = ToldPool()
    assert copy_all(peer, [Copy(i, i, 1) for i in (0, 2, 4)], 128 * MIB, STEP_BYTES, lambda: False) == 3
    assert [step is None for step in peer.told] == [False, False, True, False, True]


def test_stops_between_two_steps_and_waits_for_what_is_queued() -> None:
    peer, answers = ToldPool(), iter([False, False, True])
    assert copy_all(peer, [Copy(i, i, 1) for i in (0, 2, 4)], 2, STEP_BYTES, lambda: next(answers)) == 2
    assert peer.told == [(0, 0, 2), (4, 4, 2), None]


async def test_a_cancel_waits_until_the_thread_has_left_the_pool() -> None:
    is_copying, abandoned, may_end = threading.Event(), threading.Event(), threading.Event()

    def copy() -> int:
        is_copying.set()
        may_end.wait(5)
        return 1

    async def copy_in_thread() -> int:
        return await finish_thread(loop.run_in_executor(None, copy), abandoned.set)

    loop = asyncio.get_running_loop()
    waiting = asyncio.create_task(copy_in_thread())
    await loop.run_in_executor(None, is_copying.wait, 5)
    for _ in range(2):  # an impatient parent cancels twice
        waiting.cancel()
        done, _ = await asyncio.wait([waiting], timeout=0.01)
        assert not done
    assert abandoned.is_set()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
