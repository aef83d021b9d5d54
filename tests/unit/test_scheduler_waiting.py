"""Who is before whom, and where each stands; the naive model is a list."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from flowkv_common.wire.messages import ScheduleRequest
from flowkv_scheduler.node_view import NOTHING, Work
from flowkv_scheduler.waiting import GRACE_S, MAX_PRIORITY, PRIORITY_S, WAIT_ERROR, WaitingQueue
from tests.described_nodes import later

NEED = Work(prefill_tokens=10, num_sequences=1, num_blocks=1, context_tokens=10, output_tokens=10.0)


def asking(request_id: str, age_s: float = 0.0, priority: int = 0, num_output: int = 0) -> ScheduleRequest:
    return ScheduleRequest(
        request_id=request_id,
        attempt=0,
        fingerprint="f",
        num_prompt_tokens=10,
        max_new_tokens=10,
        num_output_tokens=num_output,
        age_s=age_s,
        priority=priority,
    )


def ahead(waiting: WaitingQueue, request: ScheduleRequest, now: float) -> list[str]:
    return [
        other.request.request_id
        for other in waiting.ahead_of(waiting.place_of(request, now), request.fingerprint)
    ]


def test_the_old_and_the_urgent_are_ahead() -> None:
    waiting = WaitingQueue()
    for request in (asking("old", age_s=3.0), asking("urgent", priority=-1), asking("late", priority=1)):
        waiting.add_waiter(request, later("d0", NEED, 0.5), now=10.0)
    assert ahead(waiting, asking("new"), now=10.0) == ["urgent", "old"]
    assert ahead(waiting, asking("old", age_s=3.0), now=10.0) == ["urgent"]


def test_priority_is_worth_some_age_so_that_nobody_waits_for_ever() -> None:
    waiting = WaitingQueue()
    patient = asking("patient", age_s=PRIORITY_S + 1.0, priority=1)
    waiting.add_waiter(patient, later("d0", NEED, 0.5), now=0.0)
    assert ahead(waiting, asking("new"), now=0.0) == ["patient"]
    humble = asking("humble", age_s=2 * MAX_PRIORITY * PRIORITY_S + 1.0, priority=2**31)
    waiting.add_waiter(humble, later("d0", NEED, 0.5), now=0.0)
    assert ahead(waiting, asking("king", priority=-(2**31)), now=0.0) == ["humble"]


def test_who_has_output_is_ahead_of_all() -> None:
    waiting = WaitingQueue()
    waiting.add_waiter(asking("urgent", age_s=9.0, priority=-6), later("d0", NEED, 0.5), now=0.0)
    assert ahead(waiting, asking("retry", num_output=1), now=0.0) == []
    waiting.add_waiter(asking("retry", num_output=1), later("d0", NEED, 0.5), now=0.0)
    assert ahead(waiting, asking("urgent", age_s=9.0, priority=-6), now=0.0) == ["retry"]


def test_to_ask_again_changes_no_turn() -> None:
    waiting = WaitingQueue()
    waiting.add_waiter(asking("a"), later("d0", NEED, 0.5), now=0.0)
    waiting.add_waiter(asking("b"), later("d0", NEED, 0.5), now=0.1)
    # Its gateway's clock may be wrong.
    waiting.add_waiter(asking("a", age_s=0.0), later("d1", NEED, 0.5), now=0.5)
    assert ahead(waiting, asking("b"), now=0.5) == ["a"]
    assert waiting.work_ahead("d0", waiting.place_of(asking("b"), 0.5)) == NOTHING
    assert waiting.work_ahead("d1", waiting.place_of(asking("b"), 0.5)) == NEED


def test_who_got_a_pair_or_does_not_ask_again_is_ahead_of_nobody() -> None:
    waiting = WaitingQueue()
    for name in "abc":
        waiting.add_waiter(asking(name), later("d0", NEED, 0.5), now=0.0)
    waiting.forget("a")
    waiting.add_waiter(asking("b", age_s=0.5), later("d0", NEED, 0.5), now=0.5)
    assert ahead(waiting, asking("new"), now=0.5) == ["b", "c"]
    waiting.forget_gone(0.6 + GRACE_S)
    assert ahead(waiting, asking("new"), now=0.6 + GRACE_S) == ["b"]
    waiting.forget_gone(1.1 + GRACE_S)
    assert len(waiting) == 0


def test_what_those_ahead_need_is_their_part_of_the_line() -> None:
    waiting = WaitingQueue()
    for place in range(4):
        need = msgspec.structs.replace(NEED, num_blocks=1 + 2 * (place % 2))
        waiting.add_waiter(asking(f"r{place}", age_s=4.0 - place), later("d0", need, 0.5), now=0.0)
    work = waiting.work_ahead("d0", waiting.place_of(asking("r2"), 0.0))
    assert (work.num_sequences, work.num_blocks, work.output_tokens) == (2, 4, 20.0)


def test_late_requests_are_behind_all_in_time() -> None:
    waiting = WaitingQueue()
    late = asking("late", age_s=60.0, priority=-6)
    waiting.add_waiter(late, later("d0", NEED, is_late=True), now=0.0)
    waiting.add_waiter(asking("soon", priority=6), later("d0", NEED), now=0.0)
    assert ahead(waiting, late, now=0.0) == ["soon"]
    assert ahead(waiting, asking("soon"), now=0.0) == []
    assert ahead(waiting, asking("new"), now=0.0) == []
    assert ahead(waiting, asking("retry", num_output=1), now=0.0) == []
    assert waiting.is_late("late")
    assert not waiting.is_late("soon")
    assert not waiting.is_late("new")


def test_a_request_that_was_late_once_stays_late() -> None:
    """Else it would come before requests in time, and delay them."""
    waiting = WaitingQueue()
    waiting.add_waiter(asking("a"), later("d0", NEED, is_late=True), now=0.0)
    waiting.add_waiter(asking("a"), later("d0", NEED), now=0.5)
    assert waiting.is_late("a")
    waiting.forget("a")
    assert not waiting.is_late("a")


def test_a_late_request_is_overdue_by_what_it_was_told_first() -> None:
    waiting = WaitingQueue()
    assert not waiting.is_late_overdue("f", 1e9)
    waiting.add_waiter(asking("soon"), later(first_token_in_s=0.0), now=0.0)
    assert not waiting.is_late_overdue("f", 1e9)
    # It becomes late at 1 s, and is then told to get its first token at 3 s.
    waiting.add_waiter(asking("a"), later(first_token_in_s=0.5), now=0.0)
    waiting.add_waiter(asking("a"), later(first_token_in_s=2.0, is_late=True), now=1.0)
    waiting.add_waiter(asking("a"), later(retry_in_s=9.0, first_token_in_s=9.0, is_late=True), now=2.0)
    # One that stands behind it counts only when the first has gone.
    for now in (2.0, 2.5):
        waiting.add_waiter(asking("b"), later(retry_in_s=0.5, first_token_in_s=0.0, is_late=True), now=now)
    due = 1.0 + 2.0 * WAIT_ERROR
    assert not waiting.is_late_overdue("f", due)
    assert waiting.is_late_overdue("f", due + 0.01)
    waiting.forget("a")
    assert not waiting.is_late_overdue("f", 2.5)
    assert waiting.is_late_overdue("f", 2.51)


def test_a_late_request_that_does_not_ask_again_is_not_overdue() -> None:
    """Its client may have left. It must not cost newcomers the door for as long as it is remembered."""
    waiting = WaitingQueue()
    waiting.add_waiter(asking("gone"), later(retry_in_s=0.1, first_token_in_s=0.0, is_late=True), now=0.0)
    assert not any(waiting.is_late_overdue("f", now) for now in (0.05, 0.1, 0.15, 1.0))
    waiting.add_waiter(asking("here"), later(retry_in_s=0.1, first_token_in_s=0.0, is_late=True), now=0.1)
    waiting.add_waiter(asking("here"), later(retry_in_s=0.1, first_token_in_s=0.0, is_late=True), now=0.2)
    assert waiting.is_late_overdue("f", 0.25)
    assert not waiting.is_late_overdue("f", 0.31)


class Known(NamedTuple):
    """What the naive model remembers of a waiting request."""

    came: float
    until: float  # it counts
    is_late: bool
    due: float


PRIORITIES = {"a": -2, "b": 0, "c": 0, "d": 0, "e": 1, "f": 9}
steps = st.tuples(
    st.sampled_from(["note", "note", "forget"]),
    st.sampled_from("abcdef"),
    st.integers(0, 3),
    st.sampled_from([False, False, True]),
    st.sampled_from([0.0, 0.4, 3.0]),
)


@given(st.lists(steps))
def test_as_a_list(history: list[tuple[str, str, int, bool, float]]) -> None:
    waiting, model = WaitingQueue(), dict[str, Known]()
    for step, (what, name, retry_in_s, is_late, first_token_in_s) in enumerate(history):
        now = 0.5 * step
        waiting.forget_gone(now)
        model = {one: known for one, known in model.items() if known.until >= now}
        mine = model.get(name, Known(now, 0.0, False, 0.0))
        places = sorted((place_of(one, known), one) for one, known in model.items())
        before = [one for place, one in places if place < place_of(name, mine)]
        request = asking(name, priority=PRIORITIES[name])
        place = waiting.place_of(request, now)
        assert ahead(waiting, request, now) == before
        assert waiting.work_ahead("d0", place) == NEED.share(len(before), 1)
        late = [one for _, one in places if model[one].is_late]
        asks = [model[one] for one in late if model[one].until - GRACE_S >= now]
        assert waiting.is_late_overdue("f", now) == bool(asks and asks[0].due < now)
        if what == "forget":
            waiting.forget(name)
            model.pop(name, None)
        else:
            waiting.add_waiter(request, later("d0", NEED, retry_in_s, first_token_in_s, is_late), now)
            due = mine.due if mine.is_late else now + max(WAIT_ERROR * first_token_in_s, retry_in_s)
            model[name] = Known(mine.came, now + retry_in_s + GRACE_S, mine.is_late or is_late, due)
        assert len(waiting) == len(model)
        assert all(one in waiting and waiting.is_late(one) == model[one].is_late for one in model)


def place_of(name: str, known: Known) -> tuple[bool, float, str]:
    return known.is_late, known.came + PRIORITY_S * min(PRIORITIES[name], MAX_PRIORITY), name
