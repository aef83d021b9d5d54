"""How many wait before a request; the naive model is a sorted list."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flowkv_common.wire.messages import ScheduleRequest
from flowkv_scheduler.waiting import GRACE_S, Waiting


def asking(request_id: str, age_s: float = 0.0, priority: int = 0) -> ScheduleRequest:
    return ScheduleRequest(
        request_id=request_id,
        attempt=0,
        fingerprint="f",
        num_prompt_tokens=10,
        max_new_tokens=10,
        block_hashes=[],
        age_s=age_s,
        priority=priority,
    )


def test_the_old_and_the_urgent_are_ahead() -> None:
    waiting = Waiting()
    for request in (asking("old", age_s=3.0), asking("urgent", priority=-1), asking("late", priority=1)):
        waiting.note(request, 0.5, now=10.0)
    assert waiting.num_ahead(asking("new"), now=10.0) == 2
    assert waiting.num_ahead(asking("old", age_s=3.0), now=10.0) == 1


def test_who_got_a_pair_or_does_not_ask_again_is_ahead_of_nobody() -> None:
    waiting = Waiting()
    for name in "abc":
        waiting.note(asking(name), 0.5, now=0.0)
    waiting.forget("a")
    waiting.note(asking("b", age_s=0.5), 0.5, now=0.5)
    assert waiting.num_ahead(asking("new"), now=0.5) == 2
    assert waiting.num_ahead(asking("new"), now=0.6 + GRACE_S) == 1
    assert waiting.num_ahead(asking("new"), now=1.1 + GRACE_S) == 0


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["note", "forget"]),
            st.sampled_from("abcdef"),
            st.integers(-1, 1),
            st.integers(0, 3),
        )
    )
)
def test_as_a_sorted_list(steps: list[tuple[str, str, int, int]]) -> None:
    waiting, model = Waiting(), {}
    for place, (what, name, priority, retry_in_s) in enumerate(steps):
        now = 0.5 * place
        model = {one: (turn, until) for one, (turn, until) in model.items() if until >= now}
        expected = sum(turn < model.get(name, ((priority, now, name), 0))[0] for turn, _ in model.values())
        assert waiting.num_ahead(asking(name, priority=priority), now) == expected
        if what == "forget":
            waiting.forget(name)
            model.pop(name, None)
        else:
            waiting.note(asking(name, priority=priority), retry_in_s, now)
            turn = model.get(name, ((priority, now, name), 0))[0]
            model[name] = (turn, now + retry_in_s + GRACE_S)
