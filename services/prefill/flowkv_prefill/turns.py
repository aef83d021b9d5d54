"""Who is next: one at a time, and of those who wait the one with the smallest number."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
from collections.abc import AsyncIterator


class Turns:
    """A lock that remembers whose turn it is: who leaves and comes back does not go to the end."""

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []  # smallest number first

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @contextlib.asynccontextmanager
    async def turn(self, number: int) -> AsyncIterator[None]:
        """Wait for a turn, then have it while the context lasts."""
        await self._enter(number)
        try:
            yield
        finally:
            self._pass_on()

    async def _enter(self, number: int) -> None:
        if not self._is_taken:  # then nobody waits
            self._is_taken = True
            return
        mine = (number, asyncio.get_running_loop().create_future())
        bisect.insort(self._waiting, mine, key=lambda entry: entry[0])
        try:
            await mine[1]
        except asyncio.CancelledError:
            if mine[1].cancelled():
                self._waiting = [entry for entry in self._waiting if entry is not mine]
            else:  # given the turn and cancelled in the same breath
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        while self._waiting:
            _, turn = self._waiting.pop(0)
            if not turn.done():  # else it was cancelled, and its task has not run since
                turn.set_result(None)
                return
        self._is_taken = False
