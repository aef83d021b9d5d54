"""Nodes are believed by what gateways see of them, not by what they say."""

from __future__ import annotations

import functools
import heapq
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowkv_common.wire.messages import Assignment, NodeRef, NodeSeen, NodesSeen, Wait
from flowkv_common.wire.nodes import BlockCounts, StepFit
from flowkv_gateway.witness import Witness
from flowkv_scheduler.belief import (
    LONGEST_MEMORY_S,
    MEMORY_OUTCOMES,
    MEMORY_S,
    RECORDS_PER_SLICE,
    SLOW_AGAIN,
    TRUSTED,
    Belief,
    Doubt,
    Record,
    why_untrue,
)
from flowkv_scheduler.cluster import VIEWS_PER_SLICE, ClusterState, Goals
from flowkv_scheduler.planner import Planner
from flowkv_scheduler.slices import at_once
from tests.described_nodes import BLOCK_SIZE, GROWN, INCARNATION, TOKEN_BUDGET, descriptor, report, request

REFS = [NodeRef(node_id=f"n{number}", incarnation=INCARNATION) for number in range(3)]
A, B, C = REFS
SLACK_S = 0.1


def prompts_of(node: NodeRef, num: int, promised_s: float, taken_s: float) -> NodeSeen:
    return NodeSeen(node=node, num_prompts=num, promised_s=num * promised_s, taken_s=num * taken_s)


def doubts(belief: Belief, now: float) -> dict[NodeRef, Doubt]:
    return at_once(belief.doubts(REFS, REFS, REFS, now))


# --- what a record says --------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(
            st.floats(0.0, 5.0),  # since the one before
            st.integers(1, 12),
            st.floats(0.0, 20.0),
            st.floats(0.0, 100.0),
        ),
        max_size=12,
    ),
    st.floats(0.0, 60.0),
)
def test_a_record_is_the_weighted_mean_of_its_outcomes(
    outcomes: list[tuple[float, int, float, float]], later_s: float
) -> None:
    record, now = Record(SLACK_S), 0.0
    told: list[tuple[float, int, float, float]] = []
    memory_s = MEMORY_S
    for pause_s, num, promised_s, taken_s in outcomes:
        now += pause_s
        record.add_outcomes(num, promised_s, taken_s, now)
        if (taken_s + num * SLACK_S) / (promised_s + num * SLACK_S) < SLOW_AGAIN:
            memory_s = MEMORY_S
        elif told and math.exp(-pause_s / memory_s) < 0.5:
            memory_s = min(2 * memory_s, LONGEST_MEMORY_S)
        told.append((now, num, promised_s, taken_s))
    count = promised = taken = 0.0
    for index, (at, num, promised_s, taken_s) in enumerate(told):
        weight = math.exp((at - now) / MEMORY_S) * min(1.0, MEMORY_OUTCOMES / num)
        for _, num_later, _, _ in told[index + 1 :]:
            weight *= max(0.0, 1 - num_later / MEMORY_OUTCOMES)
        count += weight * num
        promised += weight * (promised_s + num * SLACK_S)
        taken += weight * (taken_s + num * SLACK_S)
    ratio = taken / promised if count else 1.0
    count *= math.exp(-later_s / memory_s)
    expected = max(1.0, (count * ratio + 1) / (count + 1))
    assert record.slowness(now + later_s) == pytest.approx(expected, rel=1e-6)


@given(st.lists(st.tuples(st.floats(0.0, 20.0), st.floats(0.0, 1.0)), max_size=20), st.floats(0.0, 60.0))
def test_who_keeps_all_promises_is_never_slow(promises: list[tuple[float, float]], later_s: float) -> None:
    record = Record(SLACK_S)
    for promised_s, share in promises:
        record.add_outcomes(1, promised_s, share * promised_s, 0.0)
    assert record.slowness(later_s) == 1.0


def test_slowness_is_forgotten() -> None:
    record = Record(SLACK_S)
    record.add_outcomes(8, 0.8, 8.0, 0.0)
    assert record.slowness(0.0) > 4.0
    assert record.slowness(5 * MEMORY_S) < 1.25


def test_eight_good_outcomes_make_up_for_all_bad_ones() -> None:
    record = Record(SLACK_S)
    record.add_outcomes(100, 10.0, 1000.0, 0.0)
    for _ in range(3):
        record.add_outcomes(7, 0.7, 0.7, 0.1)
    assert record.slowness(0.1) < 1.5
    record.add_outcomes(8, 0.8, 0.8, 0.1)
    assert record.slowness(0.1) == 1.0


# --- whom to doubt -------------------------------------------------------------------------------


def test_without_evidence_all_are_trusted() -> None:
    assert doubts(Belief(), 0.0) == {}


def test_the_slow_one_of_several_is_doubted_and_its_new_incarnation_is_not() -> None:
    belief = Belief()
    for ref, taken_s in ((A, 0.1), (B, 1.0)):
        belief.hear("g", prompts_of(ref, 8, 0.1, taken_s), 0.02, 0.0)
    found = doubts(belief, 0.0)
    assert found.keys() == {B}
    assert found[B].slowness > 4.0
    # By the doubt its next prompt takes about what the last ones took.
    assert found[B].slowness * 0.1 + found[B].first_token_s == pytest.approx(1.0, rel=0.3)
    again = msgspec.structs.replace(B, incarnation="i2")
    assert at_once(belief.doubts([A, again, C], [A, again, C], [], 0.0)) == {}


def test_what_an_impossible_promise_is_worth() -> None:
    belief = Belief()
    belief.hear("g", prompts_of(B, 8, 0.0, 0.5), 0.02, 0.0)
    assert doubts(belief, 0.0)[B].first_token_s == pytest.approx(0.5, rel=0.3)


def test_slow_decode_steps_are_doubted() -> None:
    belief = Belief()
    for number in range(10):
        for ref, gap_s in ((A, 0.021), (B, 0.2), (C, 0.02)):
            seen = NodeSeen(node=ref, num_gaps=10, gaps_s=10 * gap_s)
            belief.hear("g", seen, 0.02, 0.25 * number)
    found = doubts(belief, 2.25)
    assert found.keys() == {B}
    assert 0.1 < found[B].slowness * 0.02 + found[B].step_s < 0.22
    assert found[B].first_token_s == 0.0


def test_predictions_that_are_wrong_for_all_alike_change_nothing() -> None:
    belief = Belief()
    for ref in REFS:
        belief.hear("g", prompts_of(ref, 8, 0.1, 1.0), 0.02, 0.0)
        belief.hear("g", NodeSeen(node=ref, prompt_stall_s=3.0), 0.02, 0.0)
    assert doubts(belief, 0.0) == {}


def test_a_stall_adds_to_the_wait_at_once_and_ends_with_a_token_at_any_gateway() -> None:
    belief = Belief()
    belief.hear("g", NodeSeen(node=A, prompt_stall_s=0.2), 0.02, 0.0)
    assert doubts(belief, 0.0) == {}  # too short to tell
    belief.hear("g", NodeSeen(node=A, prompt_stall_s=0.7), 0.02, 0.5)
    assert doubts(belief, 0.5) == {A: Doubt(first_token_s=0.7)}
    belief.hear("h", prompts_of(A, 1, 0.1, 0.1), 0.02, 0.5)
    assert doubts(belief, 0.5) == {}


def test_a_stall_at_decode_counts_what_is_longer_than_a_step() -> None:
    belief = Belief()
    belief.hear("g", NodeSeen(node=A, step_stall_s=0.7), 0.6, 0.0)
    belief.hear("g", NodeSeen(node=B, step_stall_s=0.7), 0.1, 0.0)
    assert doubts(belief, 0.0).keys() == {B}
    assert doubts(belief, 0.0)[B].step_s == pytest.approx(0.6)


def test_what_a_dead_gateway_waited_for_expires() -> None:
    belief = Belief()
    belief.hear("g", NodeSeen(node=A, prompt_stall_s=0.7), 0.02, 0.0)
    assert doubts(belief, 0.9) == {A: Doubt(first_token_s=0.7)}
    assert doubts(belief, 1.1) == {}
    belief.forget_old(100.0)
    assert len(belief) == 0


# --- what can't be true ---------------------------------------------------------------------------

OTHER_SUM = BlockCounts(total=256, free=9, cached=0, leased=0, quarantined=0, longest_free_run=9)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_blocks": 1}, "blocks.total"),
        ({"blocks": OTHER_SUM}, "blocks"),
        ({"max_prefill_tokens_per_step": BLOCK_SIZE - 1}, "max_prefill_tokens_per_step"),
        ({"max_prefill_tokens_per_step": TOKEN_BUDGET + 1}, "max_prefill_tokens_per_step"),
        ({"num_running": 17}, "num_running"),
        ({"interruptible_prefill_tokens": 1}, "interruptible_prefill_tokens"),
        ({"interruptible_attended": 1}, "interruptible_attended"),
    ],
)
def test_a_report_that_does_not_fit_its_node(changes: dict[str, Any], field: str) -> None:
    node = descriptor("p0", "prefill")
    assert why_untrue(report("p0", "prefill"), node) is None
    why = why_untrue(report("p0", "prefill", **changes), node)
    assert why is not None
    assert why.startswith(field)


# --- what the planner does with it ---------------------------------------------------------------

TOKEN_S = 0.001
PROMPT_TOKENS = 100  # 0.1 s
STEP_S = 0.02
NUM_OUTPUTS = 50
COSTS = StepFit(
    base_s=STEP_S, prefill_token_s=TOKEN_S, attended_token_s=0.0, sequence_s=0.0, context_token_s=0.0
)
LIE = StepFit(base_s=STEP_S, prefill_token_s=1e-9, attended_token_s=0.0, sequence_s=0.0, context_token_s=0.0)


class Played:
    """Nodes that take one prompt after the other, a gateway that watches them, and the planner."""

    def __init__(self, roles: Mapping[str, str], *, is_watched: bool = True) -> None:
        self.roles = roles
        self.is_watched = is_watched
        self.planner = Planner(Goals(), lends=False)
        self.witness = Witness("g")
        self.slowdown: defaultdict[str, float] = defaultdict(lambda: 1.0)  # from what each says
        self.liars: set[str] = set()  # say that they are idle, and quick beyond all others
        self.num_prompt_tokens, self.num_outputs = PROMPT_TOKENS, NUM_OUTPUTS
        self.chosen: list[tuple[float, str, str]] = []
        self._free_at: defaultdict[str, float] = defaultdict(float)
        self._num_accepted: Counter[str] = Counter()
        self._num_sequences: Counter[str] = Counter()
        self._due: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        self._descriptors = {name: descriptor(name, role, num_blocks=10**6) for name, role in roles.items()}
        self.planner.set_descriptors(self._descriptors)

    def play(self, until: float, requests_per_s: float, began: float = 0.0) -> None:
        for number in range(math.ceil((until - began) * requests_per_s)):
            came_at = began + number / requests_per_s
            self._at(came_at, functools.partial(self._request, f"r{came_at}", came_at))
        for number in range(math.ceil((until - began) / 0.5)):
            self._at(began + 0.5 * number, self._report)
        for number in range(math.ceil((until - began) / 0.25)):
            self._at(began + 0.25 * number + 0.2, self._tell)
        while self._due and self._due[0][0] < until:
            now, _, happen = heapq.heappop(self._due)
            happen(now)

    def share_of(self, node_id: str, since: float, until: float) -> float:
        pairs = [pair for at, *pair in self.chosen if since <= at < until]
        return sum(node_id in pair for pair in pairs) / len(pairs)

    def _at(self, when: float, happen: Callable[[float], None]) -> None:
        heapq.heappush(self._due, (when, next(self._order), happen))

    def _report(self, now: float) -> None:
        for name, role in self.roles.items():
            queued = max(0.0, self._free_at[name] - now) / TOKEN_S / self.slowdown[name]
            load = report(
                name,
                role,
                num_blocks=10**6,
                seq=int(10 * now) + 1,
                max_num_seqs=10**4,
                forecast=GROWN,
                step=LIE if name in self.liars else COSTS,
                num_running=self._num_sequences[name],
                queued_prefill_tokens=0 if name in self.liars or role == "decode" else int(queued),
                num_prompts_accepted=self._num_accepted[name],
            )
            self.planner.add_report(load, now)
        at_once(self.planner.tick(now))

    def _tell(self, now: float) -> None:
        if self.is_watched:
            for seen in self.witness.tell(now):
                self.planner.add_seen(seen, now)

    def _request(self, request_id: str, came_at: float, now: float) -> None:
        wanted = request(self.num_prompt_tokens, NUM_OUTPUTS, request_id=request_id, age_s=now - came_at)
        choice = self.planner.schedule(wanted, now)
        if isinstance(choice, Wait):
            again = functools.partial(self._request, request_id, came_at)
            return self._at(now + choice.retry_in_s, again)
        p, d, tid = choice.prefill.node_id, choice.decode.node_id, f"{wanted.request_id}.0"
        self.chosen.append((now, p, d))
        assignment = Assignment(
            request_id=wanted.request_id,
            attempt=0,
            epoch=1,
            prefill=choice.prefill.descriptor.node,
            decode=choice.decode.descriptor.node,
            reason="",
            prefill_candidates=[],
            decode_candidates=[],
            promised_first_token_in_s=choice.prefill.own_word(choice.first_token_s),
        )
        self.witness.begin(tid, assignment, now)
        self._num_accepted[p] += 1
        self._free_at[p] = max(now, self._free_at[p]) + self.num_prompt_tokens * TOKEN_S * self.slowdown[p]
        self._at(self._free_at[p], lambda at: self._token(at, tid, p, d, 0))

    def _token(self, now: float, tid: str, p: str, d: str, index: int) -> None:
        self.witness.add_tokens(tid, d if index else p, 1, now)
        self._num_sequences[d] += index == 0
        if index + 1 < self.num_outputs:
            self._at(now + STEP_S * self.slowdown[d], lambda at: self._token(at, tid, p, d, index + 1))
        else:
            self._num_sequences[d] -= 1
            self.witness.end(tid, now)


ROLES = {"p0": "prefill", "p1": "prefill", "p2": "prefill", "d0": "decode", "d1": "decode", "d2": "decode"}
STOPPED = 1e9


def test_nodes_that_do_what_they_say_are_not_doubted() -> None:
    played = Played(ROLES)
    played.play(8.0, requests_per_s=20)
    assert all(view.doubt is TRUSTED for view in played.planner.state.views())
    assert len(played.planner.state.belief) >= 4


@pytest.mark.parametrize("slowdown", [10.0, STOPPED])
@pytest.mark.parametrize("node_id", ["p0", "d0"])
def test_a_node_that_becomes_slow_loses_its_work_within_two_seconds(node_id: str, slowdown: float) -> None:
    """Its reports say that it is as quick as ever."""
    played = Played(ROLES)
    played.play(4.0, requests_per_s=15)
    assert played.share_of(node_id, 1.0, 4.0) > 0.2
    played.slowdown[node_id] = slowdown
    played.play(12.0, requests_per_s=15, began=4.0)
    assert played.share_of(node_id, 6.0, 12.0) < 0.05
    assert {ref.node_id for ref in played.planner.state.doubted} == {node_id}


def test_a_slow_node_gets_its_work_back_when_it_has_recovered() -> None:
    played = Played(ROLES)
    played.slowdown["p0"] = 10.0
    played.play(6.0, requests_per_s=15)
    assert played.share_of("p0", 3.0, 6.0) < 0.1
    played.slowdown["p0"] = 1.0
    played.play(40.0, requests_per_s=15, began=6.0)
    assert played.share_of("p0", 30.0, 40.0) > 0.2


def test_a_node_that_stays_slow_is_tried_with_one_request_at_a_time() -> None:
    """Though that has its first token only after others have come."""
    played = Played(ROLES)
    played.slowdown["d0"] = 10.0
    played.num_prompt_tokens, played.num_outputs = 800, 10
    played.play(200.0, requests_per_s=2)
    tries = [at for at, _, node_id in played.chosen if node_id == "d0" and at > 10.0]
    assert len(tries) > 2
    assert all(after - before > 5.0 for before, after in itertools.pairwise(tries))


def test_a_node_that_is_slow_again_is_tried_less_often() -> None:
    record, now, pauses = Record(SLACK_S), 0.0, []
    for _ in range(6):
        record.add_outcomes(2, 0.2, 4.0, now)
        tried_at = now
        while record.slowness(tried_at) > 2.0:
            tried_at += 0.5
        pauses.append(tried_at - now)
        now = tried_at
    assert pauses[1] == pytest.approx(2 * pauses[0], rel=0.1)
    assert pauses[2] == pytest.approx(4 * pauses[0], rel=0.1)
    assert pauses[3:] == pytest.approx([pauses[2]] * 3, rel=0.1)
    record.add_outcomes(2, 0.2, 0.2, now)
    record.add_outcomes(2, 0.2, 4.0, now)
    assert record.slowness(now + pauses[0]) < 2.5


def test_a_liar_does_not_draw_everything() -> None:
    """It says that it is idle and quick, and serves half of what comes: without belief it gets all."""
    shares = {}
    for is_watched in (False, True):
        played = Played(ROLES, is_watched=is_watched)
        played.liars.add("p0")
        played.play(12.0, requests_per_s=20)
        shares[is_watched] = played.share_of("p0", 2.0, 12.0)
    assert shares[False] == 1.0
    assert shares[True] < 0.5


def many_slow() -> ClusterState:
    """All but the first of many nodes are slow."""
    names = [f"n{number:03}" for number in range(3 * RECORDS_PER_SLICE)]
    state = ClusterState()
    state.set_descriptors({name: descriptor(name, "mixed") for name in names})
    for name in names:
        state.add_report(report(name, "mixed"), 0.0)
    slow = [prompts_of(NodeRef(node_id=name, incarnation=INCARNATION), 8, 0.1, 1.0) for name in names[1:]]
    state.add_seen(NodesSeen(gateway_id="g", nodes=slow), 0.0)
    return state


def test_many_nodes_are_judged_in_short_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asks wait for a slice."""
    state, done, most = many_slow(), Counter[str](), Counter[str]()

    def count(owner: type, name: str) -> None:
        work = getattr(owner, name)

        def counted(*args: Any, **changes: Any) -> Any:
            done[name] += 1
            return work(*args, **changes)

        monkeypatch.setattr(owner, name, counted)

    count(Record, "slowness")
    count(ClusterState, "_refresh")
    for _ in state.doubt_nodes(0.1):
        most |= done
        done.clear()
    assert most == {"slowness": RECORDS_PER_SLICE, "_refresh": VIEWS_PER_SLICE}
    assert len(state.doubted) == len(state.views()) - 1


def test_a_doubt_that_was_half_told_is_taken_back_too() -> None:
    """A tick ends anywhere when the lead is lost."""
    state = many_slow()
    doubting = state.doubt_nodes(0.1)
    while not any(view.doubt != TRUSTED for view in state.views()):
        next(doubting)
    doubting.close()
    at_once(state.doubt_nodes(1e3))
    assert all(view.doubt == TRUSTED for view in state.views())
