"""What only the scheduler that leads does: it answers gateways, and looks after the cluster."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack

from flowkv_common.bus.service import Endpoint, Service
from flowkv_common.errors import Unavailable

log = logging.getLogger(__name__)

TICK_PERIOD_S = 0.5


async def lead(service: Service, endpoints: Sequence[Endpoint], tick: Callable[[], Awaitable[None]]) -> None:
    """Until cancelled: serve `endpoints`, and call `tick` once per period.

    A tick that takes longer than the period delays the next one; one that fails is logged and costs nothing
    else.
    """
    while True:
        try:
            async with AsyncExitStack() as served:
                for endpoint in endpoints:
                    await served.enter_async_context(service.also_serving(endpoint))
                await _keep_ticking(tick)
        except Unavailable as error:
            # Cut off just now. Either the connection comes back in time, or the lease ends and so do we.
            log.warning("can't serve gateways: %s", error.message)
            await asyncio.sleep(TICK_PERIOD_S)


async def _keep_ticking(tick: Callable[[], Awaitable[None]]) -> None:
    clock = asyncio.get_running_loop().time
    due = clock()
    while True:
        try:
            await tick()
        except Exception:
            log.exception("the planner failed")
        due = max(due + TICK_PERIOD_S, clock())
        await asyncio.sleep(due - clock())
