"""A link whose transport can be exchanged under those who use it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence

from flowkv_common.errors import TransferFailed
from flowkv_common.kv.alignment import Copy
from flowkv_common.kv.connector import KVLink, TransferStats


class SwitchedLink:
    """A `KVLink` by way of another one, which can be replaced: transfers end on the one where they began."""

    def __init__(self, link: KVLink) -> None:
        self._link = link
        self._num_sends: Counter[KVLink] = Counter()  # of each that has any, also of one that was replaced
        self._is_closed = False
        self._some_ended = asyncio.Event()
        self._failed = asyncio.Event()

    @property
    def name(self) -> str:
        return self._link.name

    @property
    def closed(self) -> bool:
        return self._is_closed

    @property
    def is_lost(self) -> bool:
        return self._link.is_lost

    async def send(self, transfer_id: str, token: str, copies: Sequence[Copy]) -> TransferStats:
        link = self._link
        with self._counted(link):
            return await link.send(transfer_id, token, copies)

    async def switch(self, link: KVLink) -> None:
        """What is sent from now on goes by `link`. Returns when the one before has ended its transfers."""
        before, self._link = self._link, link
        try:
            while self._num_sends[before]:
                self._some_ended.clear()
                await self._some_ended.wait()
        finally:
            await before.close()

    async def until_lost(self) -> None:
        """Returns when a send has failed because the peer can't be reached by this transport any more."""
        while not self.is_lost:
            self._failed.clear()
            await self._failed.wait()

    async def close(self) -> None:
        """Ends the link, after the transfers under way. Idempotent."""
        self._is_closed = True
        for link in {self._link, *self._num_sends}:
            await link.close()

    @contextlib.contextmanager
    def _counted(self, link: KVLink) -> Iterator[None]:
        self._num_sends[link] += 1
        try:
            yield
        except TransferFailed:
            self._failed.set()
            raise
        finally:
            self._num_sends[link] -= 1
            if not self._num_sends[link]:
                del self._num_sends[link]
            self._some_ended.set()
