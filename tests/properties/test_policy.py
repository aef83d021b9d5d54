"""What holds for every cluster and every request."""

from __future__ import annotations

import math
from random import Random

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from flowkv_common import errors
from flowkv_common.wire.messages import ScheduleRequest
from flowkv_common.wire.nodes import OutputForecast, StepFit, expected_tokens
from flowkv_scheduler import admission
from flowkv_scheduler.cluster import Goals
from flowkv_scheduler.node_view import Work
from flowkv_scheduler.policy import RequestCosts
from flowkv_scheduler.waiting import Later, WaitingQueue
from tests.described_nodes import (
    BLOCK_SIZE,
    CAPS,
    GROWN,
    NUM_BLOCKS,
    Described,
    choose,
    cluster,
    node,
    pair,
    request,
    view,
)

FORECASTS = [
    GROWN,
    OutputForecast(tokens_left=400.0, first_ends_in=9.0, stop_rate=0.01, by_length={7: (50.0, 5000.0)}),
    None,
]
FITS: list[StepFit | None] = [
    None,
    StepFit(base_s=0.02, prefill_token_s=1e-3, attended_token_s=0.0, sequence_s=1e-3, context_token_s=1e-6),
    StepFit(base_s=0.01, prefill_token_s=2e-4, attended_token_s=1e-7, sequence_s=5e-3, context_token_s=1e-5),
]


# What a node does not measure is taken from the one that reported last: no matter where all are alike.
ANY_FITS = st.just(FITS)
LIKE_FITS = st.sampled_from([[fit] for fit in FITS])


@st.composite
def clusters(draw: st.DrawFn, fits: st.SearchStrategy[list[StepFit | None]] = ANY_FITS) -> list[Described]:
    """Up to six nodes in any state, of few distinct loads so that ties are common."""
    few = st.sampled_from
    known = draw(fits)
    return [
        node(
            f"n{number}",
            draw(few(sorted(CAPS))),
            age_s=draw(few([0.0, 0.4, 9.0])),
            given=Work(
                draw(few([0, 64])),
                draw(few([0, 1])),
                draw(few([0, 8])),
                draw(few([0, 500])),
                draw(few([0.0, 100.0])),
            ),
            ready=draw(few([True, True, True, False])),
            draining=draw(few([False, False, False, True])),
            queued_prefill_tokens=draw(few([0, 64, 4000])),
            num_running=draw(few([0, 1, 16])),
            num_context_tokens=draw(few([0, 3000])),
            free=draw(few([0, 12, NUM_BLOCKS])),
            prefill_tokens_per_s=draw(few([0.0, 500.0, 4000.0])),
            decode_step_s=draw(few([0.0, 0.01, 0.1])),
            step=draw(few(known)),
            forecast=draw(few(FORECASTS)),
        )
        for number in range(draw(st.integers(0, 6)))
    ]


requests = st.builds(
    lambda num_prompt, num_new, avoid, num_output: request(
        num_prompt, num_new, avoid=avoid, num_output_tokens=num_output
    ),
    st.integers(1, 5000),
    st.integers(1, 500),
    st.lists(st.sampled_from(["n0", "n1", "n2"]), max_size=2),
    st.sampled_from([0, 0, 1]),
)
goals = st.builds(Goals, itl_s=st.sampled_from([0.01, 0.05, 0.25]), max_wait_s=st.sampled_from([0.1, 5.0]))


@settings(deadline=None)
@given(clusters(), requests, goals)
def test_unusable_nodes_are_never_chosen(
    nodes: list[Described], wanted: ScheduleRequest, aims: Goals
) -> None:
    choice = choose(wanted, nodes, aims)
    if choice is None:
        return
    age_s = {one.node_id: one.age_s for one in nodes}
    for taken in (choice.prefill, choice.decode):
        assert taken.report.ready
        assert not taken.report.draining
        assert age_s[taken.node_id] <= 3 * taken.report.period_s
    if wanted.max_new_tokens == 1:  # it is never decoded
        assert choice.decode is choice.prefill
        return
    # The whole prompt and the expected output find room, beside what is there and will grow.
    mean = cluster(*nodes).lengths_of(wanted.fingerprint).mean_of(wanted.num_prompt_tokens)
    num_tokens = wanted.num_prompt_tokens + int(expected_tokens(wanted.max_new_tokens, 1 / mean))
    decode, counts = choice.decode, choice.decode.report.blocks
    num_growing = int(decode.tokens_left / BLOCK_SIZE)
    available = counts.free + counts.cached - decode.given.num_blocks - num_growing
    assert -(-(num_tokens + 1) // BLOCK_SIZE) <= available


@settings(deadline=None)
@given(clusters(LIKE_FITS), requests, goals, st.randoms())
def test_order_of_nodes_changes_nothing(
    nodes: list[Described], wanted: ScheduleRequest, aims: Goals, random: Random
) -> None:
    shuffled = list(nodes)
    random.shuffle(shuffled)
    assert choose(wanted, shuffled, aims) == choose(wanted, nodes, aims)


def brute_force(wanted: ScheduleRequest, nodes: list[Described], aims: Goals) -> float:
    """The least prediction over all pairs of the two sides, without an index; infinite without a pair."""
    state = cluster(*nodes)
    costs = RequestCosts(wanted, state, aims, 0.0)
    usable = [one for one in state.views() if one.is_usable(0.0) and one.node_id not in wanted.avoid]
    prefill = [one for one in usable if one.may_prefill and costs.takes_prompt(one)]
    decode = [one for one in usable if one.may_decode and costs.takes_sequence(one)]
    if wanted.max_new_tokens == 1:
        return min((cost.total_s for cost in map(costs.prefill_cost, prefill)), default=math.inf)
    totals = [
        p.total_s + costs.transfer_s(p, d.num_cached_tokens, costs.link_between(p.node, d.node)) + d.total_s
        for p in map(costs.prefill_cost, prefill)
        for d in map(costs.decode_cost, filter(costs.has_room, decode))
    ]
    return min(totals, default=math.inf) if prefill and decode else math.inf


@settings(deadline=None)
@given(clusters(), requests, goals)
def test_no_pair_of_the_sides_promises_less(
    nodes: list[Described], wanted: ScheduleRequest, aims: Goals
) -> None:
    choice = choose(wanted, nodes, aims)
    least = brute_force(wanted, nodes, aims)
    if choice is None:
        assert least == math.inf
    else:
        assert choice.predicted_s <= least


loads = st.sampled_from(
    [
        "queued_prefill_tokens",
        "num_running",
        "num_waiting",
        "num_context_tokens",
        "free",
        "given",
        "tokens_left",
    ]
)


def loaded(one: Described, load: str, by: int) -> Described:
    """The same node with more to do."""
    if load == "given":
        return one._replace(given=Work(*(have + by for have in msgspec.structs.astuple(one.given))))
    if load == "tokens_left":
        forecast = one.report.forecast
        if forecast is None:
            return one
        more_left = msgspec.structs.replace(forecast, tokens_left=forecast.tokens_left + by)
        return one._replace(report=msgspec.structs.replace(one.report, forecast=more_left))
    if load == "free":
        blocks = one.report.blocks
        less = msgspec.structs.replace(blocks, free=blocks.free // 2, leased=blocks.total - blocks.free // 2)
        return one._replace(report=msgspec.structs.replace(one.report, blocks=less))
    more = getattr(one.report, load) + by
    return one._replace(report=msgspec.structs.replace(one.report, **{load: more}))


@settings(deadline=None)
@given(clusters(), requests, goals, st.data())
def test_more_load_never_makes_a_node_more_attractive(
    nodes: list[Described], wanted: ScheduleRequest, aims: Goals, data: st.DataObject
) -> None:
    if not nodes:
        return
    which = data.draw(st.integers(0, len(nodes) - 1))
    busier = list(nodes)
    busier[which] = loaded(nodes[which], data.draw(loads), by=data.draw(st.sampled_from([1, 8, 700])))
    before, after = pair(choose(wanted, nodes, aims)) or (), pair(choose(wanted, busier, aims)) or ()
    node_id = nodes[which].node_id
    assert after.count(node_id) <= before.count(node_id)


@settings(deadline=None)
@given(clusters(), requests, loads, st.sampled_from([1, 8, 700]))
def test_more_load_never_lowers_a_cost(
    nodes: list[Described], wanted: ScheduleRequest, load: str, by: int
) -> None:
    costs = RequestCosts(wanted, cluster(), Goals(), 0.0)
    costs.state.mean_prompt_tokens = 0.0
    for one in nodes:
        idle, busy = view(one), view(loaded(one, load, by))
        assert costs.prefill_cost(busy).total_s >= costs.prefill_cost(idle).total_s
        assert costs.decode_cost(busy).total_s >= costs.decode_cost(idle).total_s


def refused(wanted: ScheduleRequest, nodes: list[Described], aims: Goals) -> bool:
    try:
        admission.decide(wanted, cluster(*nodes), aims, 0.0, WaitingQueue())
    except errors.Full:
        return True
    except errors.FlowKVError:
        return False
    return False


@settings(deadline=None)
@given(
    clusters(),
    requests,
    goals,
    st.tuples(st.integers(-2, 2), st.integers(-2, 2)),
    st.tuples(st.sampled_from([0.2, 5.0, 600.0]), st.sampled_from([0.2, 5.0, 600.0])),
)
def test_the_more_urgent_and_the_more_patient_are_refused_last(
    nodes: list[Described],
    wanted: ScheduleRequest,
    aims: Goals,
    priorities: tuple[int, int],
    deadlines: tuple[float, float],
) -> None:
    favoured = msgspec.structs.replace(wanted, priority=min(priorities), deadline_in_s=max(deadlines))
    other = msgspec.structs.replace(wanted, priority=max(priorities), deadline_in_s=min(deadlines))
    assert refused(favoured, nodes, aims) <= refused(other, nodes, aims)


@settings(deadline=None)
@given(clusters(), requests, goals)
def test_retries_of_running_requests_are_never_shed(
    nodes: list[Described], wanted: ScheduleRequest, aims: Goals
) -> None:
    assert not refused(msgspec.structs.replace(wanted, num_output_tokens=1, deadline_in_s=0.1), nodes, aims)


@settings(deadline=None)
@given(clusters(), requests, goals)
def test_who_is_told_to_wait_is_told_for_how_long(
    nodes: list[Described], wanted: ScheduleRequest, aims: Goals
) -> None:
    try:
        decision = admission.decide(wanted, cluster(*nodes), aims, 0.0, WaitingQueue())
    except errors.FlowKVError:
        return
    if isinstance(decision, Later):
        assert admission.MIN_RETRY_S <= decision.wait.retry_in_s <= admission.MAX_RETRY_S
