"""What a gateway tells of nodes is what it saw."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowkv_common.wire.messages import Assignment, NodeRef, NodeSeen
from flowkv_gateway import witness as witness_module
from flowkv_gateway.witness import Witness

P, D = NodeRef(node_id="p", incarnation="1"), NodeRef(node_id="d", incarnation="1")
FIRST, SECOND = "r.0", "s.0"
PROMISE_S = 0.5


def assignment(prefill: NodeRef = P, decode: NodeRef = D, promise_s: float | None = PROMISE_S) -> Assignment:
    return Assignment(
        request_id="r",
        attempt=0,
        epoch=1,
        prefill=prefill,
        decode=decode,
        reason="",
        prefill_candidates=[],
        decode_candidates=[],
        promised_first_token_in_s=promise_s,
    )


def tell(witness: Witness, now: float) -> dict[NodeRef, NodeSeen]:
    return {one.node: one for message in witness.tell(now) for one in message.nodes}


@pytest.fixture
def witness() -> Witness:
    """One attempt has begun at 0."""
    witness = Witness("g")
    witness.begin(FIRST, assignment(), 0.0)
    return witness


def test_a_first_token_is_told_once(witness: Witness) -> None:
    assert tell(witness, 0.4) == {}  # nothing is due
    witness.add_tokens(FIRST, "p", 1, 0.45)
    assert tell(witness, 0.5) == {P: NodeSeen(node=P, num_prompts=1, promised_s=0.5, taken_s=0.45)}
    assert tell(witness, 9.0) == {}


def test_what_is_overdue_is_told_until_it_comes(witness: Witness) -> None:
    assert tell(witness, 0.75) == {P: NodeSeen(node=P, prompt_stall_s=0.25)}
    assert tell(witness, 1.0) == {P: NodeSeen(node=P, prompt_stall_s=0.5)}
    witness.add_tokens(FIRST, "p", 1, 1.25)
    assert tell(witness, 1.25) == {P: NodeSeen(node=P, num_prompts=1, promised_s=0.5, taken_s=1.25)}


def test_a_node_that_serves_others_meanwhile_does_not_stall(witness: Witness) -> None:
    witness.begin(SECOND, assignment(), 0.0)
    witness.add_tokens(SECOND, "p", 1, 0.75)
    assert tell(witness, 1.0)[P].prompt_stall_s == 0.25


@pytest.mark.parametrize(("ended_at", "told"), [(0.25, 0), (2.0, 1)])
def test_an_attempt_that_ends_without_a_token_counts_if_one_was_due(
    witness: Witness, ended_at: float, told: int
) -> None:
    witness.end(FIRST, ended_at)
    expected = {P: NodeSeen(node=P, num_prompts=1, promised_s=0.5, taken_s=ended_at)} if told else {}
    assert tell(witness, ended_at) == expected


def test_prefill_is_excused_where_its_decode_node_has_failed(witness: Witness) -> None:
    witness.excuse_prefill(FIRST)
    witness.end(FIRST, 2.0)
    assert tell(witness, 2.0) == {}


def test_gaps_are_those_between_tokens_of_the_decode_node(witness: Witness) -> None:
    witness.add_tokens(FIRST, "p", 1, 0.1)
    witness.add_tokens(FIRST, "d", 1, 0.3)  # after a handoff
    witness.add_tokens(FIRST, "d", 1, 0.35)
    witness.add_tokens(FIRST, "d", 2, 0.45)
    seen = tell(witness, 0.5)[D]
    assert (seen.num_gaps, seen.gaps_s, seen.step_stall_s) == (3, 0.15, 0.05)
    assert tell(witness, 2.45) == {D: NodeSeen(node=D, step_stall_s=2.0)}
    witness.end(FIRST, 2.5)
    assert tell(witness, 3.0) == {}


@pytest.mark.parametrize(("left_at", "num_gaps"), [(0.4, 0), (0.6, 1)])
def test_a_sequence_that_goes_on_elsewhere_has_waited_in_vain(
    witness: Witness, left_at: float, num_gaps: int
) -> None:
    """It counts if that was longer than the gap before."""
    for node_id, at in (("p", 0.1), ("d", 0.3), ("d", 0.375)):
        assert witness.last_gap_s(FIRST) == 0.0
        witness.add_tokens(FIRST, node_id, 1, at)
    assert witness.last_gap_s(FIRST) == pytest.approx(0.075)
    tell(witness, 0.375)
    witness.end(FIRST, left_at, goes_on=True)
    seen = tell(witness, left_at)
    assert [one.num_gaps for one in seen.values()] == [1] * num_gaps


def test_the_same_node_for_both_halves(witness: Witness) -> None:
    witness.begin(SECOND, assignment(prefill=D), 0.0)
    for at in (0.2, 0.3, 0.4):
        witness.add_tokens(SECOND, "d", 1, at)
    seen = tell(witness, 0.4)[D]
    assert (seen.num_prompts, seen.taken_s, seen.num_gaps, seen.gaps_s) == (1, 0.2, 1, 0.1)


def test_a_sequence_that_is_preempted_is_not_waited_for(witness: Witness) -> None:
    for node_id, at in (("p", 0.1), ("d", 0.2), ("d", 0.3)):
        witness.add_tokens(FIRST, node_id, 1, at)
    tell(witness, 0.3)
    witness.pause(FIRST)
    assert tell(witness, 9.0) == {}
    witness.add_tokens(FIRST, "d", 1, 9.0)
    assert tell(witness, 9.0) == {}


def test_the_gateways_own_silence_is_held_against_no_node(witness: Witness) -> None:
    witness.begin(SECOND, assignment(), 0.0)
    for node_id, at in (("p", 0.1), ("d", 0.2)):
        witness.add_tokens(SECOND, node_id, 1, at)
    tell(witness, 0.2)
    witness.forget_open()
    assert tell(witness, 9.0) == {}
    witness.add_tokens(FIRST, "p", 1, 9.0)
    witness.add_tokens(SECOND, "d", 1, 9.0)
    assert tell(witness, 9.0) == {}


def test_a_scheduler_that_promises_nothing_is_owed_nothing() -> None:
    witness = Witness("g")
    witness.begin(FIRST, assignment(promise_s=None), 0.0)
    assert tell(witness, 9.0) == {}
    witness.add_tokens(FIRST, "p", 1, 9.0)
    assert tell(witness, 9.0) == {}


def test_a_message_has_so_many_nodes_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(witness_module, "MAX_NODES_TOLD", 2)
    witness = Witness("g")
    nodes = [msgspec.structs.replace(P, node_id=f"p{number}") for number in range(5)]
    for number, node in enumerate(nodes):
        witness.begin(f"r{number}.0", assignment(prefill=node), 0.0)
    told = list(witness.tell(1.0))
    assert [len(message.nodes) for message in told] == [2, 2, 1]
    assert {one.node for message in told for one in message.nodes} == set(nodes)


Event = tuple[int, str, float]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3), st.sampled_from(["begin", "p", "d", "end", "tell"]), st.floats(0.0, 1.0)
        ),
        max_size=60,
    )
)
def test_every_promise_is_told_once_at_most(events: list[Event]) -> None:
    """Against a list of all that began and came."""
    witness, now, num_told, taken_s = Witness("g"), 0.0, 0, 0.0
    waiting: dict[int, float] = {}
    num_due, due_s = 0, 0.0
    for number, what, later_s in events:
        now += later_s
        tid = f"r{number}.0"
        began_at = waiting.get(number)
        if what == "begin" and began_at is None:
            witness.end(tid, now)
            witness.begin(tid, assignment(), now)
            waiting[number] = now
        elif what in ("p", "d"):
            witness.add_tokens(tid, what, 1, now)
            if began_at is not None:
                num_due, due_s = num_due + 1, due_s + now - waiting.pop(number)
        elif what == "end":
            witness.end(tid, now)
            if began_at is not None and now - waiting.pop(number) > PROMISE_S:
                num_due, due_s = num_due + 1, due_s + now - began_at
        if what == "tell":
            seen = tell(witness, now).get(P, NodeSeen(node=P))
            num_told, taken_s = num_told + seen.num_prompts, taken_s + seen.taken_s
            overdue = [at for at in waiting.values() if now > at + PROMISE_S]
            assert overdue or seen.prompt_stall_s == 0.0
    seen = tell(witness, now).get(P, NodeSeen(node=P))
    assert num_told + seen.num_prompts == num_due
    assert taken_s + seen.taken_s == pytest.approx(due_s, abs=1e-4)
