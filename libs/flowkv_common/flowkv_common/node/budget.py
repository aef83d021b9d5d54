"""Handoffs in flight have a budget of their own, in count and in bytes, apart from the batch size."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator


class HandoffBudget:
    """First come, first served; a handoff larger than the whole budget goes alone."""

    def __init__(self, max_handoffs: int, max_bytes: int) -> None:
        self._max_handoffs = max_handoffs
        self._max_bytes = max_bytes
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.num_in_flight = 0
        self.bytes_in_flight = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @contextlib.asynccontextmanager
    async def hold(self, num_bytes: int) -> AsyncIterator[None]:
        """Wait for room, then hold `num_bytes` of it while the context lasts."""
        await self._enter(num_bytes)
        try:
            yield
        finally:
            self.num_in_flight -= 1
            self.bytes_in_flight -= num_bytes
            self._admit()

    async def _enter(self, num_bytes: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((num_bytes, turn))
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # admitted and cancelled in the same breath
                self.num_in_flight -= 1
                self.bytes_in_flight -= num_bytes
            else:
                self._waiting.remove((num_bytes, turn))
            self._admit()
            raise

    def _admit(self) -> None:
        while self._waiting:
            num_bytes, turn = self._waiting[0]
            fits = (
                self.num_in_flight < self._max_handoffs
                and self.bytes_in_flight + num_bytes <= self._max_bytes
            )
            if not fits and self.num_in_flight > 0:
                return
            self._waiting.popleft()
            self.num_in_flight += 1
            self.bytes_in_flight += num_bytes
            turn.set_result(None)
