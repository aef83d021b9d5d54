"""Nodes whose every load report the test decides, and a gateway that asks for them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from imagined_nodes import descriptor, report, request

from flowkv_common import errors
from flowkv_common.bus.connection import Bus
from flowkv_common.bus.registry import keep_announced
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Assignment, Message, ScheduleRequest, Wait
from flowkv_common.wire.nodes import LoadReport

PERIOD_S = 0.1


class Node:
    """Announces itself and reports every period until its context is left; `changes` go into each report."""

    def __init__(self, bus: Bus, node_id: str, role: str, **changes: Any) -> None:
        self.bus = bus
        self.node_id = node_id
        self.role = role
        self.changes = changes
        self._seq = 0

    async def report(self) -> None:
        self._seq += 1
        load: LoadReport = report(
            self.node_id, self.role, **({"seq": self._seq, "period_s": PERIOD_S} | self.changes)
        )
        await self.bus.publish(subjects.load(self.node_id), load)

    async def live(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(keep_announced(self.bus, lambda: descriptor(self.node_id, self.role)))
            while True:
                await self.report()
                await asyncio.sleep(PERIOD_S)


@contextlib.asynccontextmanager
async def living(*nodes: Node) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(node.live()) for node in nodes]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def schedule(bus: Bus, wanted: ScheduleRequest | None = None, timeout_s: float = 5.0) -> Message:
    return await bus.request(subjects.SCHEDULE, wanted or request(), Assignment | Wait, timeout_s=timeout_s)


async def until(bus: Bus, is_met: Callable[[Message], bool], timeout_s: float = 8.0) -> Message:
    """Ask as a gateway does, again when told to, until the answer is as wanted."""
    async with asyncio.timeout(timeout_s):
        while True:
            try:
                answer = await schedule(bus, timeout_s=1.0)
            except (errors.Unavailable, errors.DeadlineExceeded):
                answer = Wait(retry_in_s=0.02, reason="the scheduler is not there")
            if is_met(answer):
                return answer
            await asyncio.sleep(answer.retry_in_s if isinstance(answer, Wait) else PERIOD_S)


def is_assigned(*pair: str) -> Callable[[Message], bool]:
    return lambda m: isinstance(m, Assignment) and (m.prefill.node_id, m.decode.node_id) == pair


def is_wait(message: Message) -> bool:
    return isinstance(message, Wait) and "not there" not in message.reason
