"""The sending process: reads a `Setup`, then one `Send` a line, and answers each with an `Outcome`."""

from __future__ import annotations

import asyncio
import sys

import msgspec

from flowkv_common.errors import TransferFailed
from flowkv_engine.kv.blocks import Blocks
from flowkv_engine.kv.reservations import Reservations
from flowkv_engine.transport.base import ConnectorUnavailable
from tests.gpu.gpu_nodes import GpuNode, Outcome, Send, Setup, opened

SEED = 7


async def carry_out(node: GpuNode, order: Send) -> Outcome:
    try:
        link = await node.connector.connect(order.address, order.link_token, order.num_peer_blocks)
        stats = await link.send_blocks(order.transfer_id, order.token, order.copies)
        await link.close()
    except (ConnectorUnavailable, TransferFailed) as error:
        return Outcome(error=f"{type(error).__name__}: {error}")
    return Outcome(num_bytes=stats.num_bytes, num_calls=stats.num_calls)


async def main() -> None:
    setup = msgspec.json.decode(sys.stdin.readline(), type=Setup)
    reservations = Reservations(Blocks(setup.num_blocks))
    async with opened(setup, reservations, lambda _: False) as node:
        node.fill(SEED)
        print(msgspec.json.encode(Outcome()).decode(), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            outcome = await carry_out(node, msgspec.json.decode(line, type=Send))
            print(msgspec.json.encode(outcome).decode(), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
