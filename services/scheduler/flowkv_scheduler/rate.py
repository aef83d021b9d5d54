"""A mean per second over the latest events, however fast they come. Pure: `now` is seconds of any clock."""

from __future__ import annotations

# Counted as passed before the first event: one alone says nothing of a rate.
_HEAD_START_S = 2.0


class Rate:
    """What about the last `num_remembered` events brought, per second. It falls while none comes."""

    def __init__(self, num_remembered: int) -> None:
        self._keep = 1.0 - 1.0 / num_remembered
        self._amount = 0.0
        self._time_s = _HEAD_START_S
        self._at: float | None = None

    def add(self, amount: float, now: float) -> None:
        passed_s = 0.0 if self._at is None else max(0.0, now - self._at)
        self._amount = self._keep * self._amount + amount
        self._time_s = self._keep * self._time_s + passed_s
        self._at = now

    def at(self, now: float) -> float:
        if self._at is None:
            return 0.0
        return self._amount / (self._time_s + max(0.0, now - self._at))
