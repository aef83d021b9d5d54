"""Random arrivals, departures and cancels, many of them in one tick, against what a queue must always be."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from flowkv_common.aio import FairQueue


class Join(NamedTuple):
    weight: int


class Leave(NamedTuple):
    """The n-th of those that are in, if there are so many, ends by itself."""

    nth: int


class Cancel(NamedTuple):
    """The n-th of those that wait or are in, if there are so many."""

    nth: int


Action = Join | Leave | Cancel
# What happens in one tick: no task runs between two actions of a burst.
BURSTS = st.lists(
    st.lists(
        st.one_of(
            st.builds(Join, st.integers(0, 12)),
            st.builds(Leave, st.integers(0, 5)),
            st.builds(Cancel, st.integers(0, 8)),
        ),
        max_size=8,
    ),
    max_size=12,
)


@dataclass(eq=False)
class Visitor:
    number: int
    weight: int
    may_leave: asyncio.Event = field(default_factory=asyncio.Event)
    is_in: bool = False


class House:
    """A queue, and what its tasks know of it."""

    def __init__(self, max_holders: int, max_weight: int) -> None:
        self.queue = FairQueue(max_holders, max_weight)
        self.entered: list[int] = []
        self._max_holders = max_holders
        self._max_weight = max_weight
        self._tasks: dict[asyncio.Task[None], Visitor] = {}
        self._num_joined = 0

    @property
    def inside(self) -> list[Visitor]:
        return [visitor for visitor in self._tasks.values() if visitor.is_in]

    def do(self, action: Action) -> None:
        match action:
            case Join(weight):
                visitor = Visitor(self._num_joined, weight)
                self._num_joined += 1
                self._tasks[asyncio.create_task(self._stay(visitor))] = visitor
            case Leave(nth):
                if nth < len(self.inside):
                    self.inside[nth].may_leave.set()
            case Cancel(nth):
                if nth < len(self._tasks):
                    list(self._tasks)[nth].cancel()

    async def _stay(self, visitor: Visitor) -> None:
        async with self.queue.hold(visitor.weight):
            visitor.is_in = True
            self.entered.append(visitor.number)
            try:
                await visitor.may_leave.wait()
            finally:
                visitor.is_in = False

    async def settle(self) -> None:
        for _ in range(2 * len(self._tasks) + 3):
            await asyncio.sleep(0)
        for task in [task for task in self._tasks if task.done()]:
            assert task.cancelled() or task.exception() is None
            del self._tasks[task]

    def check(self) -> None:
        """What holds whenever all tasks have run."""
        queue, inside = self.queue, self.inside
        waiting = [visitor for visitor in self._tasks.values() if not visitor.is_in]
        weight = sum(visitor.weight for visitor in inside)
        assert (queue.num_holders, queue.weight_held) == (len(inside), weight)
        assert queue.num_waiting == len(waiting)
        assert len(inside) <= self._max_holders
        assert weight <= self._max_weight or len(inside) == 1
        if waiting:
            assert inside
            assert max(self.entered) < waiting[0].number  # nobody overtakes
            is_full = len(inside) == self._max_holders
            assert is_full or weight + waiting[0].weight > self._max_weight

    async def empty(self) -> None:
        """All are cancelled in one tick; then a newcomer gets in at once."""
        for task in self._tasks:
            task.cancel()
        await self.settle()
        assert (self.queue.num_holders, self.queue.weight_held, self.queue.num_waiting) == (0, 0, 0)
        async with asyncio.timeout(5), self.queue.hold(self._max_weight):
            pass


@given(bursts=BURSTS, max_holders=st.integers(1, 3), max_weight=st.integers(1, 10))
def test_cancels_and_departures_in_one_tick_leave_no_room_taken(
    bursts: list[list[Action]], max_holders: int, max_weight: int
) -> None:
    async def run() -> None:
        house = House(max_holders, max_weight)
        for burst in bursts:
            for action in burst:
                house.do(action)
            await house.settle()
            house.check()
        await house.empty()

    asyncio.run(run())
