"""The requests that wait: in which order they are served, and at which node each of them stands.

Gateways do the waiting, and ask again. Pure: `now` is seconds of any clock.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

from sortedcontainers import SortedDict, SortedList

from flowkv_common.wire.messages import ScheduleRequest, Wait
from flowkv_scheduler.cluster import Goals
from flowkv_scheduler.node_view import NOTHING, Work

# A wait may last so many times longer than was predicted: an admitted request stays for that.
WAIT_ERROR = 1.5
# A request that is so much too late to ask again is gone, and its gateway perhaps too.
GRACE_S = 1.0
# Each step of priority counts as so many seconds of age, up to a minute: no request waits forever.
PRIORITY_S = 10.0
MAX_PRIORITY = 6


class Rank(IntEnum):
    """The ranks are served one after the other."""

    RUNNING = 0  # its client has output
    IN_TIME = 1
    LATE = 2  # it can't meet its TTFT goal any more
    BATCH = 3


class Place(NamedTuple):
    """The order of service: by rank, of equals the one whose first token is due first. Priority is age."""

    rank: Rank
    due: float
    request_id: str

    @property
    def is_interruptible(self) -> bool:
        return self.rank >= Rank.LATE

    def due_in_s(self, request: ScheduleRequest, goals: Goals, now: float) -> float:
        """When the first token is due, for the order at the prefill node. There it is a time and no rank, so
        that no prompt starves: a late one is due when newcomers are that came as late as any may wait."""
        match self.rank:
            case Rank.RUNNING:
                return 0.0
            case Rank.LATE:
                return self.due - now + goals.late_wait_s
            case Rank.BATCH:
                return request.deadline_in_s
        return self.due - now


class Later(NamedTuple):
    """When to ask again. Until then `need` is kept for the request at the node; "" is where there is room.

    Its prompt begins in `wait_s`, as predicted. `is_late`: it will miss the TTFT target.
    """

    wait: Wait
    wait_s: float = 0.0
    node_id: str = ""
    need: Work = NOTHING
    is_late: bool = False


class Waiter(NamedTuple):
    """`need`: the room that it takes, and the work that it brings."""

    request: ScheduleRequest
    place: Place
    node_id: str
    need: Work
    began: float
    until: float
    due: float  # it was told to get its first token by then


class _Line:
    """The requests of one rank that stand at one node or wait for one model."""

    def __init__(self) -> None:
        self.places: SortedList = SortedList()
        self.need = NOTHING  # of all of them


_Lines = dict[str, dict[Rank, _Line]]  # by node, or by model


def _no_lines() -> _Lines:
    return defaultdict(lambda: defaultdict(_Line))


class WaitingQueue:
    """A request that does not ask again is forgotten.

    All operations take O(log n), but for `ahead_of`, which goes through those ahead.
    """

    def __init__(self, ttft_goal_s: float = Goals().ttft_s) -> None:
        """`ttft_goal_s`: of requests that have none of their own."""
        self._ttft_goal_s = ttft_goal_s
        self._waiters: dict[str, Waiter] = {}
        self._by_place: dict[Place, Waiter] = {}
        # Lines by rank: all of a later one come behind it, whatever they need.
        self._at_nodes = _no_lines()
        self._of_models = _no_lines()
        self._ends: SortedDict = SortedDict()  # (until, request id) -> None

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiters

    def __len__(self) -> int:
        return len(self._waiters)

    def place_of(self, request: ScheduleRequest, now: float) -> Place:
        """It stays what it was when the request first came, but that one in time may become late."""
        known = self._waiters.get(request.request_id)
        began = known.began if known else now - request.age_s
        priority = min(max(request.priority, -MAX_PRIORITY), MAX_PRIORITY)
        if request.num_output_tokens:
            rank = Rank.RUNNING
        elif request.is_batch:
            rank = Rank.BATCH
        else:
            rank = Rank.LATE if self.is_late(request.request_id) else Rank.IN_TIME
        due = began + (request.ttft_goal_s or self._ttft_goal_s) + PRIORITY_S * priority
        return Place(rank, due, request.request_id)

    def is_late(self, request_id: str) -> bool:
        """Whether it waits among the late ones."""
        known = self._waiters.get(request_id)
        return known is not None and known.place.rank is Rank.LATE

    def num_batch(self, fingerprint: str) -> int:
        """Requests of the class `batch` that wait for the model."""
        line = self._of_models.get(fingerprint, {}).get(Rank.BATCH)
        return len(line.places) if line else 0

    def has_others(self, fingerprint: str) -> bool:
        """Whether requests of no such class wait for the model."""
        return any(rank is not Rank.BATCH for rank in self._of_models.get(fingerprint, {}))

    def is_late_overdue(self, fingerprint: str, now: float) -> bool:
        """Whether the first of the model's late requests was to have its first token by now.

        Those that should have asked again by now are passed over: their clients may have left.
        """
        line = self._of_models.get(fingerprint, {}).get(Rank.LATE)
        for place in line.places if line else ():
            waiter = self._by_place[place]
            if waiter.until - GRACE_S >= now:
                return waiter.due < now
        return False

    def ahead_of(self, place: Place, fingerprint: str) -> Iterator[Waiter]:
        """All others that wait for the model and come before it, in their order."""
        lines = self._of_models.get(fingerprint, {})
        for rank in sorted(lines):
            for other in lines[rank].places:
                if other >= place:
                    return
                if other.request_id != place.request_id:  # it may stand where it was before it was late
                    yield self._by_place[other]

    def node_of(self, request_id: str) -> str:
        """Where it stands; "" if it does not wait, or nowhere."""
        known = self._waiters.get(request_id)
        return known.node_id if known else ""

    def work_ahead(self, node_id: str, place: Place) -> Work:
        """The need of those before it at the node."""
        return self._work_before(self._at_nodes, node_id, place)

    def work_ahead_of_model(self, fingerprint: str, place: Place) -> Work:
        """The need of those before it that wait for the model."""
        return self._work_before(self._of_models, fingerprint, place)

    def _work_before(self, lines: _Lines, key: str, place: Place) -> Work:
        """The need of those before it: as many as there are, of the mean of all of their line."""
        own, work = self._waiters.get(place.request_id), NOTHING
        for rank, line in lines.get(key, {}).items():
            if rank > place.rank:
                continue
            num = line.places.bisect_left(place)
            if own is not None and own.place < place and own.place in line.places:
                num -= 1
            if num:
                work = work.plus(line.need.share(num, len(line.places)))
        return work

    def add_waiter(self, request: ScheduleRequest, later: Later, now: float) -> None:
        """It will ask again, and until then stands at that node."""
        known = self._waiters.get(request.request_id)
        began = known.began if known else now - request.age_s
        retry_in_s, node_id, need = later.wait.retry_in_s, later.node_id, later.need
        place, until = self.place_of(request, now), now + retry_in_s + GRACE_S
        # None is overdue before it has asked again.
        due = now + max(later.wait.first_token_in_s * WAIT_ERROR, retry_in_s)
        if known and known.place.rank is Rank.LATE:
            due = known.due
        if later.is_late:
            place = place._replace(rank=Rank.LATE)
        self.forget(request.request_id)
        waiter = Waiter(request, place, node_id, need, began, until, due)
        self._waiters[request.request_id] = self._by_place[place] = waiter
        self._ends[until, request.request_id] = None
        for lines, key in self._lines_of(waiter):
            line = lines[key][place.rank]
            line.places.add(place)
            line.need = line.need.plus(need)

    def _lines_of(self, waiter: Waiter) -> tuple[tuple[_Lines, str], ...]:
        return (self._at_nodes, waiter.node_id), (self._of_models, waiter.request.fingerprint)

    def forget(self, request_id: str) -> None:
        """It has got its pair, or was refused."""
        waiter = self._waiters.pop(request_id, None)
        if waiter is None:
            return
        del self._by_place[waiter.place]
        del self._ends[waiter.until, request_id]
        for lines, key in self._lines_of(waiter):
            line = lines[key][waiter.place.rank]
            line.places.remove(waiter.place)
            line.need = line.need.plus(waiter.need, -1)
            if not line.places:
                del lines[key][waiter.place.rank]
                if not lines[key]:
                    del lines[key]

    def forget_gone(self, now: float) -> None:
        """Those that should have asked again and have not."""
        while self._ends and (end := self._ends.peekitem(0)[0])[0] < now:
            self.forget(end[1])
