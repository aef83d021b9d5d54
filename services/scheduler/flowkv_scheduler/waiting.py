"""Who was told to ask again: so many stand before a new request. Pure.

No queue: a request that asks again may find room before an older one does. But how many wait tells how long a
new one would, and that has to be known at the door.
"""

from __future__ import annotations

from typing import NamedTuple

from sortedcontainers import SortedList

from flowkv_common.wire.messages import ScheduleRequest

# A request that has not asked again for so long after it should have is gone, and its gateway perhaps too.
GRACE_S = 1.0


class _Turn(NamedTuple):
    """Urgent ones first, then the oldest."""

    priority: int
    began: float
    request_id: str


class Waiting:
    """All operations take O(log n); what is not heard of again is forgotten. `now`: seconds of any clock."""

    def __init__(self) -> None:
        self._turns: dict[str, tuple[_Turn, float]] = {}
        self._in_turn: SortedList = SortedList()
        self._by_end: SortedList = SortedList()  # (until, request id)

    def num_ahead(self, request: ScheduleRequest, now: float) -> int:
        """How many of the others are to be served before it."""
        self._forget_ended(now)
        return int(self._in_turn.bisect_left(self._turn_of(request, now)))

    def note(self, request: ScheduleRequest, retry_in_s: float, now: float) -> None:
        """It will ask again; where it stands doesn't change by that."""
        turn = self._turn_of(request, now)
        self.forget(request.request_id)
        until = now + retry_in_s + GRACE_S
        self._turns[request.request_id] = (turn, until)
        self._in_turn.add(turn)
        self._by_end.add((until, request.request_id))

    def forget(self, request_id: str) -> None:
        """It has got its pair, or was refused."""
        if request_id in self._turns:
            turn, until = self._turns.pop(request_id)
            self._in_turn.remove(turn)
            self._by_end.remove((until, request_id))

    def _forget_ended(self, now: float) -> None:
        while self._by_end and self._by_end[0][0] < now:
            self.forget(self._by_end[0][1])

    def _turn_of(self, request: ScheduleRequest, now: float) -> _Turn:
        if known := self._turns.get(request.request_id):
            return known[0]
        return _Turn(request.priority, now - request.age_s, request.request_id)
