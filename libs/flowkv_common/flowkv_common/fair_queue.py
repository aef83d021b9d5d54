"""Who may enter next, where there is room for some: a queue that a cancelled task leaves no trace in."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import itertools
import math
from collections.abc import AsyncIterator
from typing import NamedTuple


class _Waiting(NamedTuple):
    place: int
    weight: int
    admission: asyncio.Future[None]


class FairQueue:
    """Lets tasks in one after the other, at most `max_holders` at a time, of at most `max_weight` together.

    The next is always the one with the smallest place, also when it has to wait and a later one would fit.
    One that is heavier than `max_weight` enters alone. `num_holders` and `weight_held` are of those inside.
    """

    def __init__(self, max_holders: int, max_weight: float = math.inf) -> None:
        self._max_holders = max_holders
        self._max_weight = max_weight
        self._waiting: list[_Waiting] = []  # by place
        self._places = itertools.count()
        self.num_holders = 0
        self.weight_held = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @contextlib.asynccontextmanager
    async def hold(self, weight: int = 0, *, place: int | None = None) -> AsyncIterator[None]:
        """Waits for room, then holds `weight` of it while the context lasts.

        Without a `place` behind all that came without one. With one a task that leaves and comes back keeps
        its place. A queue is used in one of the two ways.
        """
        await self._enter(weight, next(self._places) if place is None else place)
        try:
            yield
        finally:
            self._leave(weight)

    async def _enter(self, weight: int, place: int) -> None:
        mine = _Waiting(place, weight, asyncio.get_running_loop().create_future())
        bisect.insort(self._waiting, mine, key=lambda waiting: waiting.place)
        self._admit()
        try:
            await mine.admission
        except asyncio.CancelledError:
            if mine.admission.cancelled():
                self._waiting = [waiting for waiting in self._waiting if waiting is not mine]
                self._admit()  # it may have kept others out
            else:  # admitted, then cancelled before it could run
                self._leave(weight)
            raise

    def _leave(self, weight: int) -> None:
        self.num_holders -= 1
        self.weight_held -= weight
        self._admit()

    def _admit(self) -> None:
        """Admits the first ones for which there is room."""
        while self._waiting and self._has_room(self._waiting[0].weight):
            _, weight, admission = self._waiting.pop(0)
            if admission.done():  # cancelled: its task has not run since
                continue
            self.num_holders += 1
            self.weight_held += weight
            admission.set_result(None)

    def _has_room(self, weight: int) -> bool:
        if not self.num_holders:
            return True
        return self.num_holders < self._max_holders and self.weight_held + weight <= self._max_weight
