"""Links that take a stated time per byte on top of what the real transport takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from flowkv_engine.kv.segments import Copy
from flowkv_engine.transport.base import KVConnector, KVLink, TransferStats


class SlowLink:
    """A `KVLink` whose `send` returns no sooner than `byte_s` seconds per byte after it began."""

    def __init__(self, link: KVLink, byte_s: float) -> None:
        self.name = link.name
        self._link = link
        self._byte_s = byte_s
        self._turn = asyncio.Lock()

    @property
    def closed(self) -> bool:
        return self._link.closed

    @property
    def is_lost(self) -> bool:
        return self._link.is_lost

    async def send(self, transfer_id: str, token: str, copies: Sequence[Copy]) -> TransferStats:
        async with self._turn:
            began = time.monotonic()
            sent = await self._link.send(transfer_id, token, copies)
            await asyncio.sleep(began + sent.num_bytes * self._byte_s - time.monotonic())
            return sent._replace(duration_s=time.monotonic() - began)

    async def close(self) -> None:
        await self._link.close()


class SlowConnector:
    """A `KVConnector` whose links are slow ones."""

    def __init__(self, connector: KVConnector, byte_s: float) -> None:
        self.name = connector.name
        self.connect_timeout_s = connector.connect_timeout_s
        self._connector = connector
        self._byte_s = byte_s

    async def listen(self) -> str:
        return await self._connector.listen()

    async def connect(self, address: str, token: str, num_blocks: int) -> KVLink:
        return SlowLink(await self._connector.connect(address, token, num_blocks), self._byte_s)

    async def __aenter__(self) -> Self:
        await self._connector.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._connector.__aexit__(kind, error, trace)


def slowed(
    make_connectors: Callable[..., list[KVConnector]], byte_s: float
) -> Callable[..., list[KVConnector]]:
    """`make_connectors` with slow links."""

    def make(*args: Any, **kwargs: Any) -> list[KVConnector]:
        return [SlowConnector(connector, byte_s) for connector in make_connectors(*args, **kwargs)]

    return make
