"""Links that take a stated time per byte on top of what the real transport takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from flowkv_engine.kv.segments import Copy
from flowkv_engine.transport.base import KVConnector, KVLink, TransferStats
from tests.wrapped_links import WrappedConnector, WrappedLink


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
