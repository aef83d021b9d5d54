"""Looks into a running cluster from outside, over NATS alone, as an operator would."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from typing import Any

import msgspec
from nats.aio.msg import Msg

from flowkv_common.bus.connection import Bus, connect
from flowkv_common.bus.registry import read_key
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import decode
from flowkv_common.wire.nodes import Check, Checked, LoadReport, NodeDescriptor


@contextlib.asynccontextmanager
async def observe(nats_url: str) -> AsyncIterator[Observer]:
    async with connect(nats_url, name="observer") as bus:
        yield Observer(bus)


class Observer:
    def __init__(self, bus: Bus) -> None:
        self.bus = bus

    async def check(self, node_id: str) -> Checked:
        """The node's block counts after its own integrity check."""
        return await self.bus.request(
            subjects.at(subjects.NODE_CHECK, node_id), Check(), Checked, timeout_s=5
        )

    async def wait_idle(self, node_ids: Iterable[str] | None = None, timeout_s: float = 10.0) -> None:
        """Until no node, of those in the registry if None, holds anything and its blocks add up (rule 5).

        Raises AssertionError with what is still held. Looks again with each load report.
        """
        left = set(node_ids or [descriptor.node.node_id for descriptor in await self.descriptors()])
        held: dict[str, Checked] = {}
        news = asyncio.Event()
        async with await self.bus.subscribe(subjects.LOAD_ALL, LoadReport, lambda *_: news.set()):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    while left:
                        for node_id in list(left):
                            held[node_id] = await self.check(node_id)
                            if is_idle(held[node_id]):
                                left.remove(node_id)
                        if left:
                            news.clear()
                            await news.wait()
        assert not left, f"not idle after {timeout_s} s: {[held.get(node_id) for node_id in left]}"

    async def wait_linked(self, node_id: str, num_peers: int, timeout_s: float = 60.0) -> None:
        """Until a node is ready and its load report shows links to all of its peers; raises TimeoutError."""
        linked = asyncio.Event()

        def look(report: LoadReport) -> None:
            if report.node.node_id == node_id and report.num_links >= num_peers and report.ready:
                linked.set()

        async with await self.bus.subscribe(subjects.LOAD_ALL, LoadReport, look), asyncio.timeout(timeout_s):
            await linked.wait()

    async def descriptors(self) -> list[NodeDescriptor]:
        """All nodes in the bucket `flowkv_nodes`."""
        prefix = f"$KV.{subjects.NODES_BUCKET}."
        jetstream = self.bus.jetstream()
        async with asyncio.timeout(5):
            # `KeyValue.keys()` of nats-py says "no keys" when it is told that nothing is left to deliver
            # before it has looked at what was delivered.
            info = await jetstream.stream_info(f"KV_{subjects.NODES_BUCKET}", subjects_filter=f"{prefix}>")
            bucket = await jetstream.key_value(subjects.NODES_BUCKET)
            names = [subject.removeprefix(prefix) for subject in info.state.subjects or {}]
            found = [await read_key(bucket, name) for name in names]
        return [decode(each.value, NodeDescriptor) for each in found if each.value]

    async def events(self, subject: str) -> EventLog:
        """Collects the JSON of all that is published on `subject` from now on."""
        log = EventLog()

        async def keep(message: Msg) -> None:
            log.add(message.subject, msgspec.json.decode(message.data))

        log.subscription = await self.bus.subscribe_raw(subject, keep)
        return log


class EventLog:
    """What was published, in order, as (subject, decoded JSON)."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self.subscription: Any = None
        self._news = asyncio.Event()

    def add(self, subject: str, content: Any) -> None:
        self.events.append((subject, content))
        self._news.set()

    async def wait_for_all(self, count: int, timeout_s: float = 5.0) -> list[dict[str, Any]]:
        """All messages, once there are `count` of them; raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while len(self.events) < count:
                self._news.clear()
                await self._news.wait()
        return [content for _, content in self.events]

    async def wait_for(self, type_name: str, timeout_s: float = 5.0) -> dict[str, Any]:
        """The first message of a type; raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while True:
                for _, content in self.events:
                    if content.get("type") == type_name:
                        found: dict[str, Any] = content
                        return found
                self._news.clear()
                await self._news.wait()


def is_idle(checked: Checked) -> bool:
    blocks = checked.blocks
    return (
        checked.num_requests == 0
        and checked.num_reservations == 0
        and blocks.leased == 0
        and blocks.quarantined == 0
        and blocks.free + blocks.cached == blocks.total
    )
