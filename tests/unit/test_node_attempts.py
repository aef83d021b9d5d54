from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import pytest

from flowkv_common.errors import Stale
from flowkv_node.attempts import MAX_TOMBSTONES, TOMBSTONE_S, Attempt, Attempts


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def begin(attempts: Attempts, transfer_id: str, stopped: list[str], gateway: str = "g") -> None:
    attempts.begin(Attempt(transfer_id, gateway, "queued", lambda _: stopped.append(transfer_id)))


def test_cancel_stops_once_and_buries() -> None:
    attempts = Attempts()
    stopped: list[str] = []
    begin(attempts, "r.0", stopped)
    attempts.cancel("r.0")
    attempts.cancel("r.0")
    assert stopped == ["r.0"]
    assert len(attempts) == 0
    with pytest.raises(Stale):
        begin(attempts, "r.0", stopped)


def test_cancel_that_comes_first_wins() -> None:
    attempts = Attempts()
    attempts.cancel("r.0")
    with pytest.raises(Stale):
        attempts.refuse_ended("r.0")


def test_newer_attempt_ends_older_and_keeps_it_out() -> None:
    attempts = Attempts()
    stopped: list[str] = []
    begin(attempts, "r.0", stopped)
    begin(attempts, "r.1", stopped)
    assert stopped == ["r.0"]
    with pytest.raises(Stale):
        begin(attempts, "r.0", stopped)
    assert "r.1" in attempts


def test_next_phase_takes_the_place_of_the_last() -> None:
    attempts = Attempts()
    stopped: list[str] = []
    begin(attempts, "r.0", stopped)
    attempts.begin(Attempt("r.0", "g", "decode", lambda _: stopped.append("as decode")))
    assert [(each.transfer_id, each.state) for each in attempts] == [("r.0", "decode")]
    attempts.cancel("r.0")
    assert stopped == ["as decode"]


def test_ended_attempt_leaves_no_tombstone() -> None:
    attempts = Attempts()
    stopped: list[str] = []
    begin(attempts, "r.0", stopped)
    attempts.end("r.0")
    attempts.refuse_ended("r.0")
    assert stopped == []


def test_cancel_gateway_takes_only_its_own() -> None:
    attempts = Attempts()
    stopped: list[str] = []
    begin(attempts, "a.0", stopped, gateway="one")
    begin(attempts, "b.0", stopped, gateway="two")
    assert attempts.cancel_gateway("one") == 1
    assert stopped == ["a.0"]


def test_tombstones_are_forgotten_in_the_end() -> None:
    clock = Clock()
    attempts = Attempts(clock)
    attempts.cancel("r.0")
    clock.now = TOMBSTONE_S + 1
    attempts.cancel("other.0")
    attempts.refuse_ended("r.0")


def test_a_cancel_costs_the_same_after_a_hundred_thousand() -> None:
    """Counted, not timed: a cancel looks at the oldest tombstone alone, and memory is bounded."""

    class Counting(OrderedDict[str, float]):
        num_looks = 0

        def __getitem__(self, key: str) -> float:
            self.num_looks += 1
            return super().__getitem__(key)

        def __iter__(self) -> Iterator[str]:
            for key in super().__iter__():
                self.num_looks += 1
                yield key

    attempts = Attempts(Clock())
    attempts._tombstones = graves = Counting()
    for number in range(MAX_TOMBSTONES + 50):
        before = graves.num_looks
        attempts.cancel(f"r{number}.0")
        assert graves.num_looks - before <= 4
    assert len(graves) == MAX_TOMBSTONES
    attempts.refuse_ended("r49.0")  # the oldest are gone, the youngest stand
    with pytest.raises(Stale):
        attempts.refuse_ended("r50.0")


def test_a_cancel_that_is_repeated_is_remembered_from_then_on() -> None:
    clock = Clock()
    attempts = Attempts(clock)
    attempts.cancel("r.0")
    clock.now = TOMBSTONE_S - 1
    attempts.cancel("r.0")
    clock.now = TOMBSTONE_S + 1
    attempts.cancel("other.0")
    with pytest.raises(Stale):
        attempts.refuse_ended("r.0")


async def test_wait_empty_ends_with_the_last_attempt() -> None:
    attempts = Attempts()
    stopped: list[str] = []
    begin(attempts, "r.0", stopped)
    attempts.end("r.0")
    await attempts.wait_empty()
