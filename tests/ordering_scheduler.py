"""`python tests/ordering_scheduler.py NATS_URL`: a scheduler that moves the budget of `d0` in each tick."""

from __future__ import annotations

import asyncio
import sys

from flowkv_common.aio import stop_on_signals
from flowkv_common.config import SchedulerSettings
from flowkv_common.wire.messages import NodeRef
from flowkv_common.wire.nodes import SetPrefillCap
from flowkv_scheduler.app import serve
from flowkv_scheduler.cluster import Goals
from flowkv_scheduler.planner import Planner
from flowkv_scheduler.rebalance import Order
from flowkv_scheduler.slices import Sliced


class OrderingPlanner(Planner):
    def tick(self, now: float) -> Sliced[list[Order]]:
        yield
        order = SetPrefillCap(
            node=NodeRef(node_id="d0", incarnation="i1"),
            epoch=0,
            max_prefill_tokens_per_step=128,
            reason="the test wants it",
        )
        return [order]


async def main() -> None:
    await serve(SchedulerSettings(nats_url=sys.argv[1]), stop_on_signals(), OrderingPlanner(Goals()))


if __name__ == "__main__":
    asyncio.run(main())
