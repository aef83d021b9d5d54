"""A request's line: end to end from its beginning to its end, whatever was told of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowkv_common.timeline import MAX_PHASES, Span, at_most, phase_of, timeline
from flowkv_common.wire.messages import (
    Assignment,
    AttemptTimes,
    NodeRef,
    NodeTimes,
    Phase,
    RequestFinished,
    TokenChunk,
    Wait,
)
from flowkv_gateway.attempt_clock import AttemptClock

PAIR = Assignment(
    request_id="r",
    attempt=0,
    epoch=1,
    prefill=NodeRef(node_id="p", incarnation="1"),
    decode=NodeRef(node_id="d", incarnation="1"),
    reason="the only pair",
    prefill_candidates=[],
    decode_candidates=[],
    itl_goal_s=0.25,
)
PREFILL = NodeTimes(
    node_id="p",
    part="prefill",
    total_s=0.8,
    phases=[
        Phase(name="queue", at_s=0.0, took_s=0.1),
        Phase(name="reserve", at_s=0.1, took_s=0.1),
        Phase(name="chunk", at_s=0.25, took_s=0.25, num_tokens=64),
        Phase(name="chunk", at_s=0.5, took_s=0.3, num_tokens=30),
    ],
)
HANDOFF = NodeTimes(
    node_id="p",
    part="handoff",
    total_s=0.9,
    phases=[
        Phase(name="send", at_s=0.5, took_s=0.1, num_bytes=2_000_000, num_copies=2, num_calls=2),
        Phase(name="send", at_s=0.8, took_s=0.05, num_bytes=1_000_000, num_copies=1, num_calls=1),
    ],
    connector="shm",
)
DECODE = NodeTimes(node_id="d", part="decode", total_s=0.3, phases=[Phase(name="step", at_s=0.1, took_s=0.2)])


def finished(*attempts: AttemptTimes) -> RequestFinished:
    return RequestFinished(
        request_id="r",
        attempts=len(attempts),
        outcome="stop",
        num_prompt_tokens=94,
        num_output_tokens=4,
        num_cached_tokens=0,
        prefill_node="p",
        decode_node="d",
        phases_s={"total": attempts[-1].ended_s if attempts else 0.0},
        attempt_times=list(attempts),
    )


def shown(spans: list[Span]) -> list[tuple[str, str, float, float]]:
    return [(span.name, span.where, round(span.began_s, 6), round(span.took_s, 6)) for span in spans]


def told(*tokens_at: float, times: list[NodeTimes]) -> AttemptTimes:
    """An attempt that was assigned after 0.2 s; the first chunk tells of prefill, the second of the rest."""
    clock = AttemptClock(request_began=100.0, now=100.0)
    clock.turn(100.05)
    clock.answer(Wait(retry_in_s=0.1, reason="all are full"), 100.1)
    clock.answer(PAIR, 100.2)
    for index, at in enumerate(tokens_at):
        told_now = times[:1] if index == 0 else times[1:] if index == 1 else []
        clock.add_chunk(TokenChunk(transfer_id="r.0", index=index, token_ids=[5], times=told_now), 100.0 + at)
    return clock.times(100.0 + tokens_at[-1] + 0.01 if tokens_at else 100.5, "" if tokens_at else "p died")


def test_a_request_with_a_handoff() -> None:
    event = finished(told(1.1, 1.6, 1.7, 2.1, times=[PREFILL, HANDOFF, DECODE]))
    spans = timeline(event)
    assert shown([span for span in spans if not span.is_beside]) == [
        ("turn", "gateway", 0.0, 0.05),
        ("schedule", "scheduler", 0.05, 0.15),
        ("bus", "", 0.2, 0.05),
        ("queue", "p", 0.25, 0.1),
        ("reserve", "p", 0.35, 0.1),
        ("wait", "p", 0.45, 0.05),
        ("chunk", "p", 0.5, 0.25),
        ("chunk", "p", 0.75, 0.3),
        ("bus", "", 1.05, 0.05),
        ("wait", "p", 1.1, 0.05),
        ("bus", "", 1.15, 0.15),
        ("wait", "d", 1.3, 0.1),
        ("step", "d", 1.4, 0.2),
        ("decode", "d", 1.6, 0.1),
        ("gap", "d", 1.7, 0.4),
        ("end", "gateway", 2.1, 0.01),
    ]
    assert shown([span for span in spans if span.is_beside]) == [
        ("send", "p", 0.75, 0.1),  # hidden behind the second chunk
        ("send", "p", 1.05, 0.05),  # while the first token was on the bus
        ("gap", "d", 1.1, 0.5),  # which the handoff explains
    ]
    details = {span.name: span.detail for span in spans}
    assert details["schedule"] == "asked 2 times, all are full; the only pair"
    hidden, exposed = [span.detail for span in spans if span.name == "send"]
    assert hidden == "hidden, to d by shm, 2,000,000 bytes, 2 copies, 2 calls, 0.02 GB/s"
    assert exposed == "exposed, to d by shm, 1,000,000 bytes, 1 copies, 1 calls, 0.02 GB/s"


def test_an_attempt_that_failed_and_the_one_after_it() -> None:
    lost = told(times=[])
    again = AttemptTimes(
        began_s=0.5,
        ended_s=0.9,
        assigned_s=0.6,
        assignment=PAIR,
        first_token_s=0.9,
        last_token_s=0.9,
    )
    spans = timeline(finished(lost, again))
    assert [(span.name, span.took_s) for span in spans] == [
        ("turn", 0.05),
        ("schedule", 0.15),
        ("lost", 0.3),
        ("schedule", pytest.approx(0.1)),
        ("prefill", pytest.approx(0.3)),
    ]
    assert spans[2].detail == "p died"


def test_a_gateway_of_yesterday_tells_nothing() -> None:
    assert timeline(finished()) == []


def some_phases(*names: str) -> st.SearchStrategy[list[Phase]]:
    seconds = st.floats(0.0, 3.0)
    return st.lists(st.builds(Phase, name=st.sampled_from(names), at_s=seconds, took_s=seconds), max_size=6)


@st.composite
def any_attempt(draw: st.DrawFn) -> AttemptTimes:
    """Times of the gateway in order; nodes may say what they like, as those with broken clocks do."""
    names = ["assigned_s", "first_token_s", "second_token_s", "last_token_s"]
    at = sorted(draw(st.lists(st.floats(0.0, 5.0), min_size=6, max_size=6)))
    num_reached = draw(st.integers(0, 4))
    reached: dict[str, Any] = dict(zip(names[:num_reached], at[1:], strict=False))
    if num_reached in (2, 3):
        reached["last_token_s"] = at[num_reached]
    parts = draw(st.sets(st.sampled_from(["prefill", "handoff", "decode"])))
    return AttemptTimes(
        began_s=0.0,
        ended_s=at[5],
        assignment=PAIR if num_reached else None,
        nodes=[
            NodeTimes(
                node_id="n",
                part=part,
                total_s=draw(st.floats(0.0, 5.0)),
                phases=draw(some_phases("queue", "chunk", "send")),
            )
            for part in sorted(parts)
        ],
        gaps=draw(some_phases("gap")) if num_reached == 4 else [],
        why_ended=draw(st.sampled_from(["", "lost"])),
        **reached,
    )


@settings(max_examples=40)
@given(any_attempt())
def test_the_line_has_no_hole_and_no_overlap(attempt: AttemptTimes) -> None:
    in_line = [span for span in timeline(finished(attempt)) if not span.is_beside]
    ends_s = 0.0
    for span in in_line:
        assert span.began_s == pytest.approx(ends_s, abs=1e-5)
        assert span.took_s >= 0.0
        ends_s = span.began_s + span.took_s
    assert ends_s == pytest.approx(attempt.ended_s, abs=1e-5)


@settings(max_examples=20)
@given(st.integers(0, 300))
def test_long_lists_are_told_in_fewer_phases_that_say_as_much(count: int) -> None:
    chunks = [phase_of("chunk", at, at + 0.5, 0.0) for at in range(count)]
    merged = at_most(chunks)
    assert len(merged) == min(count, len(merged)) <= MAX_PHASES
    if count:
        assert merged[0].at_s == 0.0
        assert merged[-1].at_s + merged[-1].took_s == count - 0.5


def test_of_many_gaps_the_longest_are_told() -> None:
    clock = AttemptClock(0.0, 0.0)
    clock.answer(PAIR, 0.0)
    at = 0.0
    for index in range(MAX_PHASES + 9):
        at += 0.3 + index * 0.01
        clock.add_chunk(TokenChunk(transfer_id="r.0", index=index, token_ids=[5]), at)
    gaps = clock.times(at, "").gaps
    assert len(gaps) == MAX_PHASES
    assert min(gap.took_s for gap in gaps) == pytest.approx(0.3 + 9 * 0.01)
