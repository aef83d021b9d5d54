"""What happens when, in order; at one moment, in the order in which it was foreseen."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Events:
    """A clock that jumps from one event to the next."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._num_foreseen = 0

    def at(self, when: float, what: Callable[[], None]) -> None:
        """`what` happens at `when`, or now if that has passed."""
        self._num_foreseen += 1
        heapq.heappush(self._heap, (max(when, self.now), self._num_foreseen, what))

    def step(self) -> bool:
        """The next event. False when there is none."""
        if not self._heap:
            return False
        self.now, _, what = heapq.heappop(self._heap)
        what()
        return True
