"""What the scheduler believes of the cluster, as reports, restarts and silence come in."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowkv_common.wire.messages import NodeRef
from flowkv_common.wire.nodes import PRIOR_TOKENS, NodeDescriptor, OutputForecast, StepFit, num_attended
from flowkv_scheduler.cluster import FORGET_REPORT_AFTER_S, ClusterState
from flowkv_scheduler.node_view import NodeView, Work
from tests.described_nodes import BLOCK_SIZE, MODEL, NUM_BLOCKS, PERIOD_S, TOKEN_BUDGET, descriptor, report

D0 = NodeRef(node_id="d0", incarnation="i1")


@pytest.fixture
def state() -> ClusterState:
    """One node `d0`, known since time 0."""
    state = ClusterState()
    state.set_descriptors({"d0": descriptor("d0", "decode")})
    state.add_report(report("d0", "decode"), now=0.0)
    return state


def only(state: ClusterState) -> NodeView:
    (view,) = state.views()
    return view


def test_node_is_seen_when_descriptor_and_report_are_there() -> None:
    state = ClusterState()
    state.add_report(report("d0", "decode"), now=0.0)
    assert state.views() == []
    state.set_descriptors({"d0": descriptor("d0", "decode"), "p0": descriptor("p0", "prefill")})
    assert [view.node_id for view in state.views()] == ["d0"]


def test_latest_report_wins_and_one_that_was_overtaken_is_dropped(state: ClusterState) -> None:
    state.add_report(report("d0", "decode", seq=3, num_running=3), now=0.1)
    state.add_report(report("d0", "decode", seq=2, num_running=2), now=0.2)
    assert only(state).report.num_running == 3
    assert only(state).usable_until == pytest.approx(0.1 + 3 * PERIOD_S)


def test_node_is_silent_after_three_periods(state: ClusterState) -> None:
    assert only(state).is_usable(3 * PERIOD_S)
    assert not only(state).is_usable(3 * PERIOD_S + 0.01)


def test_after_a_reconnect_nobody_is_silent_at_once(state: ClusterState) -> None:
    state.touch_all(100.0)
    assert only(state).is_usable(100.0 + 2 * PERIOD_S)
    assert not only(state).is_usable(100.0 + 4 * PERIOD_S)


def test_prompts_count_at_once_and_are_forgotten_after_two_periods(state: ClusterState) -> None:
    state.add_prompt(D0, Work(prefill_tokens=100), now=0.0)
    state.add_prompt(D0, Work(prefill_tokens=7), now=PERIOD_S)
    assert only(state).given == Work(prefill_tokens=107)
    state.add_report(report("d0", "decode", seq=2), now=2 * PERIOD_S)
    assert only(state).given == Work(prefill_tokens=7)
    state.add_report(report("d0", "decode", seq=3), now=3 * PERIOD_S)
    assert only(state).given == Work()


def test_each_kind_of_prompt_waits_for_what_comes_before_it(state: ClusterState) -> None:
    """At 1,000 tokens/s: those in time for others in time, and for the rest of a chunk that has begun."""
    state.mean_prompt_tokens = 0.0
    state.set_descriptors({"p0": descriptor("p0", "prefill")})
    p0 = NodeRef(node_id="p0", incarnation="i1")
    queued: dict[str, Any] = {"queued_prefill_tokens": 3000, "interruptible_prefill_tokens": 2000}
    state.add_report(report("p0", "prefill", **queued), now=0.0)
    assert only(state).idle_wait_s == pytest.approx(3.0)
    assert only(state).prefill_wait_s == pytest.approx(1.0 + TOKEN_BUDGET / 2 / 1000)
    state.add_prompt(p0, Work(prefill_tokens=500, interruptible_tokens=500), now=0.1)
    state.add_prompt(p0, Work(prefill_tokens=200), now=0.1)
    assert only(state).idle_wait_s == pytest.approx(3.7)
    assert only(state).prefill_wait_s == pytest.approx(1.2 + TOKEN_BUDGET / 2 / 1000)
    shown: dict[str, Any] = {"queued_prefill_tokens": 100, "interruptible_prefill_tokens": 100}
    state.add_report(report("p0", "prefill", seq=2, num_prompts_accepted=2, **shown), now=0.2)
    assert only(state).idle_wait_s == pytest.approx(0.1)
    assert only(state).prefill_wait_s == pytest.approx(0.05)


ATTENDING = StepFit(
    base_s=0.0, prefill_token_s=1e-3, attended_token_s=1e-6, sequence_s=0.0, context_token_s=0.0
)


def test_a_long_prompt_is_waited_for_as_long_as_it_takes(state: ClusterState) -> None:
    """Not as if as many tokens came in prompts of mean length: each of its tokens attends to more."""
    state.mean_prompt_tokens = 1000.0
    state.set_descriptors({"p0": descriptor("p0", "prefill")})
    giant: dict[str, Any] = {"queued_prefill_tokens": 8000, "queued_attended": num_attended(8000)}
    rest: dict[str, Any] = {
        "queued_prefill_tokens": 2000,
        "queued_attended": num_attended(2000, num_cached=6000),
    }
    untold = {**giant, "queued_attended": 0}  # by an older node
    for seq, (told, expected_s) in enumerate([(untold, 8.0 + 4.0), (giant, 8.0 + 32.0), (rest, 2.0 + 14.0)]):
        state.add_report(report("p0", "prefill", seq=seq, step=ATTENDING, **told), now=0.0)
        assert only(state).idle_wait_s == only(state).prefill_wait_s
        assert only(state).idle_wait_s == pytest.approx(expected_s, rel=1e-3)
    more = Work(prefill_tokens=4000, prefill_attended=num_attended(4000))
    state.add_prompt(NodeRef(node_id="p0", incarnation="i1"), more, now=0.1)
    assert only(state).idle_wait_s == pytest.approx(2.0 + 14.0 + 4.0 + 8.0, rel=1e-3)


def test_late_prompts_are_waited_for_as_long_as_they_take(state: ClusterState) -> None:
    state.mean_prompt_tokens = 1000.0
    state.set_descriptors({"p0": descriptor("p0", "prefill")})
    num_both = num_attended(8000) + num_attended(1000)
    queued: dict[str, Any] = {"queued_prefill_tokens": 9000, "queued_attended": num_both}
    late: dict[str, Any] = {
        "interruptible_prefill_tokens": 8000,
        "interruptible_attended": num_attended(8000),
    }
    state.add_report(report("p0", "prefill", step=ATTENDING, **queued, **late), now=0.0)
    rest_of_a_chunk_s = only(state).speed.prefill_s(TOKEN_BUDGET, 8000, TOKEN_BUDGET, 0.0) / 2
    assert only(state).idle_wait_s == pytest.approx(9.0 + 32.0 + 0.5, rel=1e-3)
    assert only(state).prefill_wait_s == pytest.approx(1.0 + 0.5 + rest_of_a_chunk_s, rel=1e-3)


def test_a_prompt_that_the_report_shows_is_not_counted_twice(state: ClusterState) -> None:
    state.add_prompt(D0, Work(prefill_tokens=100), now=0.0)
    state.add_prompt(D0, Work(prefill_tokens=7), now=0.0)
    state.add_report(report("d0", "decode", seq=2, num_prompts_accepted=1), now=0.1)
    assert only(state).given == Work(prefill_tokens=7)
    state.add_report(report("d0", "decode", seq=3, num_prompts_accepted=2), now=0.2)
    assert only(state).given == Work()


def test_a_prompt_that_never_came_does_not_hide_those_after_it(state: ClusterState) -> None:
    state.add_prompt(D0, Work(prefill_tokens=100), now=0.0)  # its gateway died
    state.add_report(report("d0", "decode", seq=2), now=2 * PERIOD_S)
    state.add_prompt(D0, Work(prefill_tokens=7), now=2 * PERIOD_S)
    state.add_report(report("d0", "decode", seq=3, num_prompts_accepted=1), now=2.1 * PERIOD_S)
    assert only(state).given == Work()


def test_a_sequence_that_the_report_shows_is_not_counted_twice(state: ClusterState) -> None:
    state.add_sequence(D0, Work(num_sequences=1), arrives_in_s=5.0, now=0.0)
    state.add_sequence(D0, Work(num_sequences=1), arrives_in_s=0.1, now=0.0)
    state.add_report(report("d0", "decode", seq=2, num_sequences_accepted=1), now=0.2)
    assert only(state).given == Work(num_sequences=1)
    state.add_report(report("d0", "decode", seq=3, num_sequences_accepted=1), now=5.5)
    assert only(state).given == Work(num_sequences=1)  # it was the second one that came


def test_blocks_that_are_reserved_are_not_counted_twice_while_prefill_lasts(state: ClusterState) -> None:
    state.add_sequence(D0, Work(num_sequences=1, num_blocks=7, context_tokens=100), 5.0, now=0.0)
    state.add_report(report("d0", "decode", seq=2, free=NUM_BLOCKS - 7, num_rooms_given=1), now=0.2)
    assert only(state).num_available_blocks == NUM_BLOCKS - 7
    assert only(state).given == Work(num_sequences=1, context_tokens=100)  # the sequence is still to come
    state.add_report(report("d0", "decode", seq=3, num_rooms_given=1, num_sequences_accepted=1), now=0.4)
    assert only(state).given == Work()


def test_a_sequence_counts_until_it_should_have_come(state: ClusterState) -> None:
    state.add_sequence(D0, Work(num_sequences=1, num_blocks=7), arrives_in_s=5.0, now=0.0)
    state.add_report(report("d0", "decode", seq=2), now=5.0)
    assert only(state).given == Work(num_sequences=1, num_blocks=7)
    state.add_report(report("d0", "decode", seq=3), now=5.0 + 2 * PERIOD_S)
    assert only(state).given == Work()


def test_new_life_of_a_node_starts_without_the_old_report_and_choices(state: ClusterState) -> None:
    state.add_prompt(D0, Work(prefill_tokens=100), now=0.0)
    state.set_descriptors({"d0": descriptor("d0", "decode", incarnation="i2")})
    assert state.views() == []
    state.add_report(report("d0", "decode", incarnation="i2"), now=0.1)
    state.add_report(report("d0", "decode", seq=9, num_running=9), now=0.2)  # the old life, late
    assert only(state).report.node.incarnation == "i2"
    assert only(state).given == Work()


def test_node_that_left_the_registry_is_gone(state: ClusterState) -> None:
    state.set_descriptors({})
    assert state.views() == []
    assert state.groups_of("f") == []


def test_lives_of_the_long_gone_are_not_kept(state: ClusterState) -> None:
    state.add_report(report("d1", "decode"), now=1000.0)  # a new life: time to look for old ones
    assert state.views() == []


FIT = StepFit(base_s=0.02, prefill_token_s=1e-3, attended_token_s=0.0, sequence_s=0.0, context_token_s=0.0)


def test_a_node_that_has_not_decoded_yet_is_taken_to_do_it_as_others_do(state: ClusterState) -> None:
    """At no cost a prefill node that is lent would get a whole batch at once."""
    state.set_descriptors({"d0": descriptor("d0", "decode"), "p0": descriptor("p0", "prefill")})
    decoding = msgspec.structs.replace(FIT, sequence_s=0.004, context_token_s=1e-6)
    state.add_report(report("d0", "decode", seq=2, step=decoding), now=0.0)
    state.add_report(report("p0", "prefill", step=FIT), now=0.0)
    speeds = {view.node_id: view.speed for view in state.views()}
    assert (speeds["p0"].sequence_s, speeds["p0"].context_token_s) == (0.004, 1e-6)
    mine = msgspec.structs.replace(FIT, sequence_s=0.008)
    state.add_report(report("p0", "prefill", seq=2, step=mine), now=0.1)
    assert {view.node_id: view.speed.sequence_s for view in state.views()} == {"d0": 0.004, "p0": 0.008}


MEASURED = StepFit(
    base_s=0.02, prefill_token_s=1e-4, attended_token_s=1e-8, sequence_s=0.004, context_token_s=1e-6
)


def test_a_node_that_has_measured_nothing_is_taken_to_cost_what_another_of_its_model_does() -> None:
    state, other = ClusterState(), msgspec.structs.replace(MODEL, fingerprint="g")
    state.set_descriptors(
        {
            "d0": descriptor("d0", "decode"),
            "d1": descriptor("d1", "decode"),
            "x0": descriptor("x0", "decode", model=other),
        }
    )
    for name, fit in (("d0", MEASURED), ("x0", FIT), ("d1", None)):
        state.add_report(report(name, "decode", step=fit, decode_step_s=0, prefill_tokens_per_s=0), now=0.0)
    speeds = {view.node_id: view.speed for view in state.views()}
    assert speeds["d1"] == speeds["d0"] != speeds["x0"]
    # What it measures itself counts, one by one.
    partly = msgspec.structs.replace(
        MEASURED, base_s=0.05, prefill_token_s=0.0, attended_token_s=0.0, sequence_s=0.0, context_token_s=0.0
    )
    new = report("d1", "decode", seq=2, step=partly, decode_step_s=0, prefill_tokens_per_s=0)
    state.add_report(new, now=0.1)
    mine = next(view.speed for view in state.views() if view.node_id == "d1")
    assert mine == msgspec.structs.replace(speeds["d0"], base_s=0.05, chunk_base_s=0.05)


def test_rates_that_a_node_reports_are_its_costs(state: ClusterState) -> None:
    state.set_descriptors({name: descriptor(name, "decode") for name in ("d0", "d1")})
    state.add_report(report("d0", "decode", seq=2, step=MEASURED), now=0.0)
    state.add_report(report("d1", "decode", prefill_tokens_per_s=500.0, decode_step_s=0.1), now=0.0)
    mine = next(view.speed for view in state.views() if view.node_id == "d1")
    assert (mine.base_s, mine.prefill_token_s, mine.attended_token_s) == (0.1, 1 / 500, 0.0)
    assert (mine.sequence_s, mine.context_token_s) == (0.004, 1e-6)  # no rate tells these


def test_costs_are_forgotten_with_their_model(state: ClusterState) -> None:
    state.add_report(report("d0", "decode", seq=2, step=MEASURED), now=0.0)
    state.set_descriptors({})
    state.set_descriptors({"d1": descriptor("d1", "decode")})
    state.add_report(report("d1", "decode", step=FIT), now=0.0)
    assert only(state).speed.sequence_s == 0.0


def seen_outputs(mean: float, num: int = 9) -> OutputForecast:
    """Of a node where so many outputs of prompts of 64 to 127 tokens have ended."""
    return OutputForecast(
        tokens_left=0.0, first_ends_in=0.0, stop_rate=0.01, by_length={7: (num, num * mean)}
    )


def test_output_lengths_are_those_of_all_nodes_of_the_model_as_last_reported(state: ClusterState) -> None:
    assert state.lengths_of("f").mean_of(100) == PRIOR_TOKENS
    state.set_descriptors(
        {
            "d0": descriptor("d0", "decode"),
            "d1": descriptor("d1", "decode"),
            "x0": descriptor("x0", "decode", model=msgspec.structs.replace(MODEL, fingerprint="g")),
        }
    )
    state.add_report(report("d0", "decode", seq=2, forecast=seen_outputs(400.0)), now=0.0)
    state.add_report(report("d0", "decode", seq=3, forecast=seen_outputs(100.0)), now=0.1)
    state.add_report(report("d1", "decode", forecast=seen_outputs(40.0, num=27)), now=0.1)
    state.add_report(report("x0", "decode", forecast=seen_outputs(7.0)), now=0.1)
    assert state.lengths_of("f").mean_of(100) == pytest.approx((9 * 100 + 27 * 40) / 36)
    assert state.lengths_of("g").mean_of(100) == pytest.approx(7.0)


def test_output_lengths_are_forgotten_when_their_node_leaves(state: ClusterState) -> None:
    nodes = {name: descriptor(name, "decode") for name in ("d0", "d1")}
    state.set_descriptors(nodes)
    for name, mean in (("d0", 400.0), ("d1", 100.0)):
        state.add_report(report(name, "decode", seq=2, forecast=seen_outputs(mean)), now=0.0)
    assert state.lengths_of("f").mean_of(100) == pytest.approx(250.0)
    state.set_descriptors({"d1": nodes["d1"]})
    assert state.lengths_of("f").mean_of(100) == pytest.approx(100.0)
    state.add_report(report("d0", "decode", seq=3, forecast=seen_outputs(400.0)), now=0.1)  # on its way out
    assert state.lengths_of("f").mean_of(100) == pytest.approx(100.0)
    state.set_descriptors({})
    assert state.lengths_of("f").mean_of(100) == PRIOR_TOKENS
    assert not state.lengths


def test_output_lengths_of_a_restarted_node_are_those_of_its_new_incarnation(state: ClusterState) -> None:
    state.add_report(report("d0", "decode", seq=2, forecast=seen_outputs(400.0)), now=0.0)
    state.set_descriptors({"d0": descriptor("d0", "decode", incarnation="i2")})
    state.add_report(report("d0", "decode", incarnation="i2", forecast=seen_outputs(100.0)), now=0.1)
    state.add_report(report("d0", "decode", seq=3, forecast=seen_outputs(400.0)), now=0.2)  # late
    assert state.lengths_of("f").mean_of(100) == pytest.approx(100.0)


def test_output_lengths_of_a_long_silent_node_are_forgotten(state: ClusterState) -> None:
    nodes = {name: descriptor(name, "decode") for name in ("d0", "d1")}
    state.set_descriptors(nodes)
    state.add_report(report("d0", "decode", seq=2, forecast=seen_outputs(400.0)), now=0.0)
    late = FORGET_REPORT_AFTER_S + 1.0
    state.add_report(report("d1", "decode", forecast=seen_outputs(100.0)), now=late)
    assert state.lengths_of("f").mean_of(100) == pytest.approx(100.0)
    # It counts again when it is heard of again.
    state.add_report(report("d0", "decode", seq=9, forecast=seen_outputs(400.0)), now=late)
    assert state.lengths_of("f").mean_of(100) == pytest.approx(250.0)


def test_blocks_that_sequences_will_grow_into_are_not_available(state: ClusterState) -> None:
    growing = OutputForecast(tokens_left=5 * BLOCK_SIZE + 3.0, first_ends_in=9.0, stop_rate=0.01)
    state.add_report(report("d0", "decode", seq=2, free=100, num_running=2, forecast=growing), now=0.0)
    assert only(state).num_available_blocks == 100 - 5
    # A sequence that was given: the blocks of its prompt, and of what it will produce.
    state.add_sequence(D0, Work(num_sequences=1, num_blocks=7, output_tokens=2.0 * BLOCK_SIZE), 0.1, now=0.0)
    assert only(state).num_available_blocks == 100 - 5 - 7 - 2
    # Without a forecast each sequence is taken to have as much left as a chat answer has.
    state.add_report(report("d0", "decode", seq=3, free=100, num_running=1), now=9.0)
    assert only(state).num_available_blocks == 100 - int(PRIOR_TOKENS) // BLOCK_SIZE


class _Told(NamedTuple):
    node_id: str
    num_running: int | None  # None: it leaves
    chunk_budget: int
    leaving: str | None


@given(
    st.lists(
        st.builds(
            _Told,
            st.sampled_from("abc"),
            st.none() | st.integers(0, 20),
            st.sampled_from([BLOCK_SIZE, 128, TOKEN_BUDGET]),
            st.none() | st.sampled_from(["prefill", "decode"]),
        ),
        max_size=20,
    )
)
def test_what_a_group_has_is_what_its_nodes_have(told: list[_Told]) -> None:
    state, here = ClusterState(), dict[str, NodeDescriptor]()
    for seq, one in enumerate(told):
        here.pop(one.node_id, None)
        if one.num_running is not None:
            here[one.node_id] = descriptor(one.node_id, "mixed")
            running: dict[str, Any] = {
                "num_running": one.num_running,
                "max_prefill_tokens_per_step": one.chunk_budget,
            }
            state.add_report(report(one.node_id, "mixed", seq=seq, **running), now=0.0)
        state.set_leaving({one.node_id: one.leaving} if one.leaving else {})
        state.set_descriptors(dict(here))
        views = state.views()
        assert len(views) == len(here)
        assert sum(group.num_free_places for group in state.groups_of("f")) == sum(
            max(0, view.num_free_places) for view in views if view.may_decode
        )
        assert sum(group.prompt_tokens_per_s for group in state.groups_of("f")) == pytest.approx(
            sum(1 / view.speed.prefill_token_s for view in views if view.may_prefill)
        )
