"""Who is before whom, and where each stands; the naive model is a list."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from flowkv_common.wire.messages import ScheduleRequest
from flowkv_scheduler.admission import GRACE_S, MAX_PRIORITY, PRIORITY_S, WaitingQueue
from flowkv_scheduler.cluster import NOTHING, Work

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
    return [other.request.request_id for other in waiting.ahead_of(waiting.place_of(request, now))]


def test_the_old_and_the_urgent_are_ahead() -> None:
    waiting = WaitingQueue()
    for request in (asking("old", age_s=3.0), asking("urgent", priority=-1), asking("late", priority=1)):
        waiting.add_waiter(request, "d0", NEED, 0.5, now=10.0)
    assert ahead(waiting, asking("new"), now=10.0) == ["urgent", "old"]
    assert ahead(waiting, asking("old", age_s=3.0), now=10.0) == ["urgent"]


def test_priority_is_worth_some_age_so_that_nobody_waits_for_ever() -> None:
    waiting = WaitingQueue()
    patient = asking("patient", age_s=PRIORITY_S + 1.0, priority=1)
    waiting.add_waiter(patient, "d0", NEED, 0.5, now=0.0)
    assert ahead(waiting, asking("new"), now=0.0) == ["patient"]
    humble = asking("humble", age_s=2 * MAX_PRIORITY * PRIORITY_S + 1.0, priority=2**31)
    waiting.add_waiter(humble, "d0", NEED, 0.5, now=0.0)
    assert ahead(waiting, asking("king", priority=-(2**31)), now=0.0) == ["humble"]


def test_who_has_output_is_ahead_of_all() -> None:
    waiting = WaitingQueue()
    waiting.add_waiter(asking("urgent", age_s=9.0, priority=-6), "d0", NEED, 0.5, now=0.0)
    assert ahead(waiting, asking("retry", num_output=1), now=0.0) == []
    waiting.add_waiter(asking("retry", num_output=1), "d0", NEED, 0.5, now=0.0)
    assert ahead(waiting, asking("urgent", age_s=9.0, priority=-6), now=0.0) == ["retry"]


def test_to_ask_again_changes_no_turn() -> None:
    waiting = WaitingQueue()
    waiting.add_waiter(asking("a"), "d0", NEED, 0.5, now=0.0)
    waiting.add_waiter(asking("b"), "d0", NEED, 0.5, now=0.1)
    waiting.add_waiter(
        asking("a", age_s=0.0), "d1", NEED, 0.5, now=0.5
    )  # its gateway's clock may say what it will
    assert ahead(waiting, asking("b"), now=0.5) == ["a"]
    assert waiting.work_ahead("d0", waiting.place_of(asking("b"), 0.5)) == NOTHING
    assert waiting.work_ahead("d1", waiting.place_of(asking("b"), 0.5)) == NEED


def test_who_got_a_pair_or_does_not_ask_again_is_ahead_of_nobody() -> None:
    waiting = WaitingQueue()
    for name in "abc":
        waiting.add_waiter(asking(name), "d0", NEED, 0.5, now=0.0)
    waiting.forget("a")
    waiting.add_waiter(asking("b", age_s=0.5), "d0", NEED, 0.5, now=0.5)
    assert ahead(waiting, asking("new"), now=0.5) == ["b", "c"]
    waiting.forget_gone(0.6 + GRACE_S)
    assert ahead(waiting, asking("new"), now=0.6 + GRACE_S) == ["b"]
    waiting.forget_gone(1.1 + GRACE_S)
    assert len(waiting) == 0


def test_what_those_ahead_need_is_their_part_of_the_line() -> None:
    waiting = WaitingQueue()
    for place in range(4):
        need = msgspec.structs.replace(NEED, num_blocks=1 + 2 * (place % 2))
        waiting.add_waiter(asking(f"r{place}", age_s=4.0 - place), "d0", need, 0.5, now=0.0)
    work = waiting.work_ahead("d0", waiting.place_of(asking("r2"), 0.0))
    assert (work.num_sequences, work.num_blocks, work.output_tokens) == (2, 4, 20.0)


PRIORITIES = {"a": -2, "b": 0, "c": 0, "d": 0, "e": 1, "f": 9}
steps = st.tuples(st.sampled_from(["note", "note", "forget"]), st.sampled_from("abcdef"), st.integers(0, 3))


@given(st.lists(steps))
def test_as_a_list(history: list[tuple[str, str, int]]) -> None:
    waiting, model = (
        WaitingQueue(),
        dict[str, tuple[float, float]](),
    )  # name -> when it came, until when it counts
    for place, (what, name, retry_in_s) in enumerate(history):
        now = 0.5 * place
        waiting.forget_gone(now)
        model = {one: times for one, times in model.items() if times[1] >= now}
        came = model[name][0] if name in model else now
        mine = (came + PRIORITY_S * min(PRIORITIES[name], MAX_PRIORITY), name)
        turns = (
            (times[0] + PRIORITY_S * min(PRIORITIES[one], MAX_PRIORITY), one) for one, times in model.items()
        )
        before = sorted(turn for turn in turns if turn < mine)
        request = asking(name, priority=PRIORITIES[name])
        assert ahead(waiting, request, now) == [one for _, one in before]
        if what == "forget":
            waiting.forget(name)
            model.pop(name, None)
        else:
            waiting.add_waiter(request, "d0", NEED, retry_in_s, now)
            model[name] = (came, now + retry_in_s + GRACE_S)
        assert len(waiting) == len(model)
        assert all(one in waiting for one in model)
