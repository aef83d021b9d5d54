"""`python tests/ordering_scheduler.py NATS_URL`: a scheduler that moves the cap of `d0` in each tick."""

from __future__ import annotations

import asyncio
import sys

from flowkv_common.aio import stop_on_signals
from flowkv_common.config import SchedulerSettings
from flowkv_common.wire.messages import NodeRef
from flowkv_scheduler.app import serve
from flowkv_scheduler.planner import Planner
from flowkv_scheduler.policy import Goals
from flowkv_scheduler.rebalance import MoveCap, Order


class OrderingPlanner(Planner):
    def tick(self, now: float) -> list[Order]:
        return [MoveCap(NodeRef(node_id="d0", incarnation="i1"), 128, "the test wants it")]


async def main() -> None:
    await serve(SchedulerSettings(nats_url=sys.argv[1]), stop_on_signals(), OrderingPlanner(Goals()))


if __name__ == "__main__":
    asyncio.run(main())
