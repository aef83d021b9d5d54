"""Connectors and links that pass everything on, for tests to change a part of."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

from flowkv_engine.kv.segments import Copy
from flowkv_engine.transport.base import KVConnector, KVLink, TransferStats


class WrappedLink:
    """A `KVLink` by way of another one."""

    def __init__(self, link: KVLink) -> None:
        self.name = link.name
        self._link = link

    @property
    def is_lost(self) -> bool:
        return self._link.is_lost

    async def send_blocks(self, transfer_id: str, token: str, copies: Sequence[Copy]) -> TransferStats:
        return await self._link.send_blocks(transfer_id, token, copies)

    async def close(self) -> None:
        await self._link.close()


class WrappedConnector:
    """A `KVConnector` by way of another one; `wrap` gets each link it makes. `link` is the last one."""

    def __init__(self, connector: KVConnector, wrap: Callable[[KVLink], KVLink] = WrappedLink) -> None:
        self.name = connector.name
        self.connect_timeout_s = connector.connect_timeout_s
        self.link: KVLink | None = None
        self._connector = connector
        self._wrap = wrap

    async def listen(self) -> str:
        return await self._connector.listen()

    async def connect(self, address: str, token: str, num_blocks: int) -> KVLink:
        self.link = self._wrap(await self._connector.connect(address, token, num_blocks))
        return self.link

    async def __aenter__(self) -> Self:
        await self._connector.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._connector.__aexit__(kind, error, trace)


class SlowLink(WrappedLink):
    """A `KVLink` whose `send_blocks` returns no sooner than `byte_s` seconds per byte after it began."""

    def __init__(self, link: KVLink, byte_s: float) -> None:
        super().__init__(link)
        self._byte_s = byte_s
        self._turn = asyncio.Lock()

    async def send_blocks(self, transfer_id: str, token: str, copies: Sequence[Copy]) -> TransferStats:
        async with self._turn:
            began = time.monotonic()
            sent = await super().send_blocks(transfer_id, token, copies)
            await asyncio.sleep(began + sent.num_bytes * self._byte_s - time.monotonic())
            return sent


def slowed(
    make_connectors: Callable[..., list[KVConnector]], byte_s: float
) -> Callable[..., list[KVConnector]]:
    """`make_connectors` with slow links."""

    def make(*args: Any, **kwargs: Any) -> list[KVConnector]:
        slow = partial(SlowLink, byte_s=byte_s)
        return [WrappedConnector(connector, slow) for connector in make_connectors(*args, **kwargs)]

    return make
