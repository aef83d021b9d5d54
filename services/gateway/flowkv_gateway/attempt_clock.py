"""When what happened in one attempt, as its gateway sees it.

Times are those of arrival: a client that reads slowly makes no gap. `now` is monotonic seconds.
"""

from __future__ import annotations

from operator import attrgetter

from flowkv_common.timeline import MAX_PHASES, phase_of
from flowkv_common.wire.messages import Assignment, AttemptTimes, NodeTimes, Phase, TokenChunk, Wait


class AttemptClock:
    """Follows one attempt of a request that began at `request_began`. Pure."""

    def __init__(self, request_began: float, now: float) -> None:
        self._request_began = request_began
        self._began = self._turned = now
        self._num_asks = 0
        self._wait_reason = ""
        self._assigned: float | None = None
        self._assignment: Assignment | None = None
        self._first: float | None = None  # the first token of this attempt
        self._second: float | None = None  # the first one from decode
        self._last: float | None = None
        self._gaps: list[Phase] = []
        self._nodes: list[NodeTimes] = []

    def turn(self, now: float) -> None:
        """It was the turn of its key; at once, where there are none."""
        if not self._num_asks:
            self._turned = now

    def answer(self, answer: Assignment | Wait, now: float) -> None:
        """What a scheduler says."""
        self._num_asks += 1
        if isinstance(answer, Wait):
            self._wait_reason = answer.reason
        else:
            self._assignment, self._assigned = answer, now

    def add_chunk(self, chunk: TokenChunk, now: float) -> None:
        """Tokens have come, in their order."""
        self._nodes += chunk.times
        if not chunk.token_ids:
            return
        goal_s = self._assignment.itl_goal_s if self._assignment else 0.0
        if self._last is None:
            self._first = now
        else:
            if self._second is None:
                self._second = now
            if 0.0 < goal_s < now - self._last:
                self._gaps.append(phase_of("gap", self._last, now, self._request_began))
                if len(self._gaps) > MAX_PHASES:  # the longest ones are told
                    self._gaps.remove(min(self._gaps, key=attrgetter("took_s")))
        self._last = now

    def times(self, now: float, why_ended: str) -> AttemptTimes:
        """The attempt is over; `why_ended` is empty if its answer has ended with it."""
        return AttemptTimes(
            began_s=self._since(self._began) or 0.0,
            turn_s=round(self._turned - self._began, 6),
            num_asks=self._num_asks,
            wait_reason=self._wait_reason,
            assigned_s=self._since(self._assigned),
            assignment=self._assignment,
            first_token_s=self._since(self._first),
            second_token_s=self._since(self._second),
            last_token_s=self._since(self._last),
            ended_s=self._since(now) or 0.0,
            gaps=self._gaps,
            nodes=self._nodes,
            why_ended=why_ended,
        )

    def _since(self, instant: float | None) -> float | None:
        return None if instant is None else round(max(0.0, instant - self._request_began), 6)
