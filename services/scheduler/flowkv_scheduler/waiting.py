"""Who was told to ask again, in which order they are served, and at which node each of them stands. Pure.

Gateways do the waiting, and this only knows who waits. A request that fits nowhere yet stands at the node
that will have room for it first. Room is kept for it at one node alone: see `weighing.py:Weighing.has_place`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from sortedcontainers import SortedDict

from flowkv_common.wire.messages import ScheduleRequest
from flowkv_scheduler.views import NOTHING, Work

# A request that has not asked again for so long after it should have is gone, and its gateway perhaps too.
GRACE_S = 1.0
# Each step of priority counts as so many seconds of age, up to a minute: nobody waits for ever.
PRIORITY_S = 10.0
MAX_PRIORITY = 6


class Turn(NamedTuple):
    """Whose client has output first, then the oldest; priority counts as age."""

    is_new: bool
    since: float
    request_id: str


class Waiter(NamedTuple):
    """`need`: the room that it takes, and the work that it brings."""

    request: ScheduleRequest
    turn: Turn
    node_id: str
    need: Work
    began: float
    until: float


class _Line:
    """Those who stand at one node."""

    def __init__(self) -> None:
        self.waiters: SortedDict = SortedDict()  # turn -> waiter
        self.sum = NOTHING


class Waiting:
    """What is not heard of again is forgotten. `now`: seconds of any clock.

    All operations take O(log n), but for `ahead_of`, which goes through those ahead.
    """

    def __init__(self) -> None:
        self._waiters: dict[str, Waiter] = {}
        self._in_turn: SortedDict = SortedDict()  # turn -> waiter
        self._lines: dict[str, _Line] = {}
        self._ends: SortedDict = SortedDict()  # (until, request id) -> None

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiters

    def __len__(self) -> int:
        return len(self._waiters)

    def turn_of(self, request: ScheduleRequest, now: float) -> Turn:
        """It stays what it was when the request first came."""
        known = self._waiters.get(request.request_id)
        began = known.began if known else now - request.age_s
        priority = min(max(request.priority, -MAX_PRIORITY), MAX_PRIORITY)
        return Turn(not request.num_output_tokens, began + PRIORITY_S * priority, request.request_id)

    def ahead_of(self, turn: Turn) -> Iterator[Waiter]:
        """All that come before it, in their order."""
        for other in self._in_turn:
            if other >= turn:
                return
            yield self._in_turn[other]

    def ahead_at(self, node_id: str, turn: Turn) -> Work:
        """What those who stand at the node before it need: as many as there are, of the line's mean."""
        line = self._lines.get(node_id)
        if line is None:
            return NOTHING
        return line.sum.share(line.waiters.bisect_left(turn), len(line.waiters))

    def note(self, request: ScheduleRequest, node_id: str, need: Work, retry_in_s: float, now: float) -> None:
        """It will ask again, and until then stands at that node."""
        known = self._waiters.get(request.request_id)
        began = known.began if known else now - request.age_s
        turn, until = self.turn_of(request, now), now + retry_in_s + GRACE_S
        self.forget(request.request_id)
        waiter = Waiter(request, turn, node_id, need, began, until)
        self._waiters[request.request_id] = self._in_turn[turn] = waiter
        self._ends[until, request.request_id] = None
        line = self._lines.setdefault(node_id, _Line())
        line.waiters[turn] = waiter
        line.sum = line.sum.plus(need)

    def forget(self, request_id: str) -> None:
        """It has got its pair, or was refused."""
        waiter = self._waiters.pop(request_id, None)
        if waiter is None:
            return
        del self._in_turn[waiter.turn]
        del self._ends[waiter.until, request_id]
        line = self._lines[waiter.node_id]
        del line.waiters[waiter.turn]
        line.sum = line.sum.plus(waiter.need, -1)
        if not line.waiters:
            del self._lines[waiter.node_id]

    def forget_gone(self, now: float) -> None:
        """Those who should have asked again and have not."""
        while self._ends and (end := self._ends.peekitem(0)[0])[0] < now:
            self.forget(end[1])
