"""Counts the requests that miss their targets while a run goes on, so that a hopeless one can end early."""

from __future__ import annotations

from benchmarks.simulate.life import Life
from benchmarks.simulate.targets import Targets


class Judge:
    """`max_bad` requests may miss the targets; with one more the run has failed. None: it never does."""

    def __init__(self, targets: Targets, max_bad: int | None = None) -> None:
        self.num_bad = 0
        self._targets = targets
        self._max_bad = max_bad

    @property
    def has_failed(self) -> bool:
        return self._max_bad is not None and self.num_bad > self._max_bad

    def still_waits(self, life: Life, now: float) -> None:
        """It has no first token at `now`."""
        self._look(life, now - life.request.arrival_s > self._targets.ttft_s)

    def has_first_token(self, life: Life) -> None:
        self._look(life, life.ttft_s > self._targets.ttft_s)

    def has_ended(self, life: Life) -> None:
        """It is finished or refused."""
        self._look(life, not self._targets.are_met(life))

    def _look(self, life: Life, misses: bool) -> None:
        if misses and not life.is_bad:
            life.is_bad = True
            self.num_bad += 1
