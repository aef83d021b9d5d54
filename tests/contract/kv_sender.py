"""A sender in a process of its own, which the contract tests kill: `-m tests.contract.kv_sender KIND JOB`."""

from __future__ import annotations

import asyncio
import contextlib
import sys

import msgspec

from flowkv_common.wire.messages import PoolLayout
from flowkv_engine.kv.blocks import Blocks
from flowkv_engine.kv.pool import KVPool
from flowkv_engine.kv.reservations import Reservations
from flowkv_engine.kv.segments import Copy
from tests.contract.kv_nodes import connector_on_host


class Job(msgspec.Struct):
    """One transfer of all blocks `0 ... num_blocks - 1` to the same places at the receiver."""

    address: str
    link_token: str
    layout: PoolLayout
    num_blocks: int
    transfer_id: str
    token: str


async def send(kind: str, job: Job) -> None:
    reservations = Reservations(Blocks(job.num_blocks))
    async with contextlib.AsyncExitStack() as stack:
        pool = stack.enter_context(KVPool(job.layout, job.num_blocks))
        connector = connector_on_host(kind, pool, reservations, lambda _: False)
        await stack.enter_async_context(connector)
        link = await connector.connect(job.address, job.link_token, job.num_blocks)
        await link.send_blocks(job.transfer_id, job.token, [Copy(0, 0, job.num_blocks)])


if __name__ == "__main__":
    asyncio.run(send(sys.argv[1], msgspec.json.decode(sys.argv[2], type=Job)))
