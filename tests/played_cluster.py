"""A cluster that is played: nodes that report, a scheduler that leads, a gateway; and a command beside it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from typing import Any

import msgspec

from flowkv.__main__ import GROUPS
from flowkv_common.bus.connection import Bus
from flowkv_common.bus.service import Service
from flowkv_common.wire.messages import KVTransferred
from tests.described_nodes import MODEL, ReportingNode, reporting

LEADER = {"state": "leader", "epoch": "7", "regime": "normal", "regime_reason": ""}


@contextlib.asynccontextmanager
async def played_cluster(
    bus: Bus,
    *nodes: ReportingNode,
    leader: Mapping[str, str] | None = LEADER,
    url: str = "http://127.0.0.1:8000",
) -> AsyncIterator[None]:
    """Whoever is not among `nodes` is not there. `leader` None: no scheduler runs; `url` "": no gateway."""
    services = [("node", node.node_id, {"state": "ready"}) for node in nodes]
    services += [("scheduler", "scheduler-1", dict(leader))] if leader else []
    served = {"url": url, "model": MODEL.name, "fingerprint": MODEL.fingerprint}
    services += [("gateway", "gateway-1", served)] if url else []
    async with AsyncExitStack() as stack:
        for name, service_id, metadata in services:
            service = Service(
                bus,
                name=name,
                version="1.0.0",
                service_id=service_id,
                endpoints=[],
                metadata=lambda metadata=metadata: metadata,  # type: ignore[misc]
            )
            await stack.enter_async_context(service)
        await stack.enter_async_context(reporting(*nodes))
        yield


async def run(command: str, *arguments: str) -> int:
    """A command of `flowkv` in this process, beside the test: its exit status. Raises what it raises."""
    function = next(commands[command][0] for commands in GROUPS.values() if command in commands)
    module, _, name = function.partition(":")
    main = getattr(importlib.import_module(module), name)
    async with asyncio.timeout(20):
        status: int = await asyncio.to_thread(main, list(arguments))
    return status


def transferred(**changes: Any) -> KVTransferred:
    """KV that has gone from `p0` to `d0`."""
    moved = KVTransferred(
        transfer_id="cmpl-1.0",
        prefill_node="p0",
        decode_node="d0",
        connector="shm",
        num_bytes=4096,
        num_copies=1,
        num_calls=1,
        total_s=0.01,
        exposed_s=0.01,
    )
    return msgspec.structs.replace(moved, **changes)
