"""A mean per second that forgets. Pure: `now` is seconds of any monotonic clock."""

from __future__ import annotations

import math


class Rate:
    """What came within about the last `memory_s` seconds, per second."""

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._rate = 0.0
        self._at = 0.0

    def add(self, amount: float, now: float) -> None:
        self._rate = self.at(now) + amount / self._memory_s
        self._at = now

    def at(self, now: float) -> float:
        return self._rate * math.exp(-max(0.0, now - self._at) / self._memory_s)
