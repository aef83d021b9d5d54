"""Whether what runs on a node that has become slow pays to move, by the planner's word."""

from __future__ import annotations

from typing import Any

import pytest

from flowkv_common.wire.messages import NodeRef, NodeSeen, NodesSeen, ScheduleRequest, Wait
from flowkv_common.wire.nodes import StepFit
from flowkv_scheduler.cluster import Goals
from flowkv_scheduler.planner import Planner
from flowkv_scheduler.policy import Choice
from flowkv_scheduler.slices import at_once
from tests.described_nodes import GROWN, INCARNATION, MODEL, descriptor, pair, report, request

STEP_S = 0.02
COSTS = StepFit(
    base_s=STEP_S, prefill_token_s=0.001, attended_token_s=0.0, sequence_s=0.001, context_token_s=0.0
)
ROLES = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}


def ref(node_id: str) -> NodeRef:
    return NodeRef(node_id=node_id, incarnation=INCARNATION)


def steps_of(node_id: str, slowdown: float) -> NodeSeen:
    return NodeSeen(node=ref(node_id), num_gaps=8, gaps_s=8 * STEP_S * slowdown)


def prompts_of(node_id: str, slowdown: float) -> NodeSeen:
    return NodeSeen(node=ref(node_id), num_prompts=8, promised_s=1.0, taken_s=slowdown)


def planner_that_has(
    *seen: NodeSeen, goals: Goals | None = None, costs_of_d0: StepFit = COSTS, **of_d1: Any
) -> Planner:
    """All nodes say that they are idle; the gateway has seen this of them for two seconds."""
    planner = Planner(goals or Goals(), lends=False)
    planner.set_descriptors({name: descriptor(name, role) for name, role in ROLES.items()})
    for name, role in ROLES.items():
        costs = costs_of_d0 if name == "d0" else COSTS
        changes = of_d1 if name == "d1" else {}
        planner.add_report(report(name, role, forecast=GROWN, step=costs, **changes), 0.0)
    for number in range(8):
        planner.add_seen(NodesSeen(gateway_id="g", nodes=list(seen)), number / 4)
    at_once(planner.tick(2.0))
    for name, role in ROLES.items():
        costs = costs_of_d0 if name == "d0" else COSTS
        changes = of_d1 if name == "d1" else {}
        planner.add_report(report(name, role, seq=2, forecast=GROWN, step=costs, **changes), 2.0)
    return planner


def running(**changes: Any) -> ScheduleRequest:
    """It has 20 tokens of output, from p0 and d0."""
    plain: dict[str, Any] = {"attempt": 1, "num_output_tokens": 20, "runs_on": "d0", "avoid": ["d0"]}
    return request(**(plain | {"max_new_tokens": 200} | changes))


def doubted(planner: Planner) -> list[str]:
    return sorted(node.node_id for node in planner.find_doubted(MODEL.fingerprint))


def test_a_sequence_leaves_a_node_that_has_become_slow() -> None:
    planner = planner_that_has(steps_of("d0", 10.0), steps_of("d1", 1.0))
    assert doubted(planner) == ["d0"]
    move = planner.schedule(running(gap_s=10 * STEP_S), 2.0)
    assert isinstance(move, Choice)
    assert move.decode.node_id == "d1"


def test_a_sequence_leaves_a_node_that_lies_of_its_steps() -> None:
    lie = StepFit(
        base_s=STEP_S / 100, prefill_token_s=1e-5, attended_token_s=0.0, sequence_s=0.0, context_token_s=0.0
    )
    planner = planner_that_has(steps_of("d0", 10.0), steps_of("d1", 1.0), costs_of_d0=lie)
    move = planner.schedule(running(max_new_tokens=20, gap_s=10 * STEP_S), 2.0)
    assert isinstance(move, Choice)
    assert move.decode.node_id == "d1"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"num_prompt_tokens": 1000, "max_new_tokens": 4}, "little is left of it"),
        ({"gap_s": STEP_S}, "its tokens come again as quickly as elsewhere"),
        ({"avoid": ["d0", "d1"]}, "it has left the other one before"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_sequence_stays_on_a_slow_node(changes: dict[str, Any], why: str) -> None:
    planner = planner_that_has(steps_of("d0", 10.0), steps_of("d1", 1.0))
    wanted = running(**({"gap_s": 10 * STEP_S} | changes))
    assert isinstance(planner.schedule(wanted, 2.0), Wait), why


def test_a_sequence_stays_where_all_are_slow() -> None:
    planner = planner_that_has(steps_of("d0", 10.0), steps_of("d1", 9.0))
    assert doubted(planner) == []


def test_a_sequence_stays_where_the_other_node_would_miss_the_itl_target() -> None:
    """Retries skip that check: their node is gone. This one's is there yet."""
    seen = steps_of("d0", 10.0), steps_of("d1", 1.0)
    planner = planner_that_has(*seen, goals=Goals(itl_s=0.03), num_running=10)
    assert isinstance(planner.schedule(running(gap_s=10 * STEP_S), 2.0), Wait)
    assert isinstance(planner.schedule(running(runs_on=""), 2.0), Choice)


@pytest.mark.parametrize(("overdue_s", "moves"), [(0.05, False), (1.0, True)])
def test_what_has_stalled_moves_when_it_has_waited_as_long_as_a_move_takes(
    overdue_s: float, moves: bool
) -> None:
    stalled = NodeSeen(node=ref("d0"), step_stall_s=1.0)
    planner = planner_that_has(stalled, steps_of("d1", 1.0))
    assert doubted(planner) == ["d0"]
    move = planner.schedule(running(gap_s=STEP_S, overdue_s=overdue_s), 2.0)
    assert isinstance(move, Choice) == moves


@pytest.mark.parametrize(("overdue_s", "moves"), [(0.05, False), (1.0, True)])
def test_an_overdue_prompt_leaves_a_node_that_keeps_no_promise(overdue_s: float, moves: bool) -> None:
    planner = planner_that_has(prompts_of("p0", 10.0), prompts_of("p1", 1.0))
    assert doubted(planner) == ["p0"]
    wanted = running(num_output_tokens=0, runs_on="d0", avoid=["p0"], overdue_s=overdue_s)
    move = planner.schedule(wanted, 2.0)
    assert isinstance(move, Choice) == moves
    if isinstance(move, Choice):
        assert pair(move) == ("p1", "d0")


def test_a_prefill_node_that_was_slow_is_tried_with_one_prompt() -> None:
    """Also of those that come before it can have told of it."""
    planner = planner_that_has(prompts_of("p0", 10.0), prompts_of("p1", 1.0))
    at_once(planner.tick(60.0))
    for name, role in ROLES.items():
        planner.add_report(report(name, role, seq=3, forecast=GROWN, step=COSTS), 60.0)
    assert doubted(planner) == []
    chosen = [planner.schedule(request(request_id=f"r{number}"), 60.0) for number in range(6)]
    names = [choice.prefill.node_id for choice in chosen if isinstance(choice, Choice)]
    assert sorted(names) == ["p0"] + 5 * ["p1"]


def test_what_may_not_move_stands_in_no_line() -> None:
    planner = planner_that_has(steps_of("d0", 10.0), steps_of("d1", 1.0), num_running=16)
    wanted = running(gap_s=10 * STEP_S)
    assert isinstance(planner.schedule(wanted, 2.0), Wait)
    assert len(planner._queue) == 0


def test_a_node_that_is_little_slower_than_it_says_is_left_alone() -> None:
    planner = planner_that_has(steps_of("d0", 1.8), steps_of("d1", 1.0))
    assert planner.state.doubted
    assert doubted(planner) == []
    assert planner.find_doubted("of another model") == []
