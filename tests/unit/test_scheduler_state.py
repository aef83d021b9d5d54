"""What the scheduler believes of the cluster, as reports, restarts and silence come in."""

from __future__ import annotations

import msgspec
import pytest

from flowkv_common.wire.messages import NodeRef
from flowkv_common.wire.nodes import StepFit
from flowkv_scheduler.cluster import ClusterState, NodeView, Work
from tests.described_nodes import NUM_BLOCKS, PERIOD_S, descriptor, report

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
    """Not for nothing: a prefill node that is lent would get a whole batch at once."""
    state.set_descriptors({"d0": descriptor("d0", "decode"), "p0": descriptor("p0", "prefill")})
    decoding = msgspec.structs.replace(FIT, sequence_s=0.004, context_token_s=1e-6)
    state.add_report(report("d0", "decode", seq=2, step=decoding), now=0.0)
    state.add_report(report("p0", "prefill", step=FIT), now=0.0)
    speeds = {view.node_id: view.speed for view in state.views()}
    assert (speeds["p0"].sequence_s, speeds["p0"].context_token_s) == (0.004, 1e-6)
    mine = msgspec.structs.replace(FIT, sequence_s=0.008)
    state.add_report(report("p0", "prefill", seq=2, step=mine), now=0.1)
    assert {view.node_id: view.speed.sequence_s for view in state.views()} == {"d0": 0.004, "p0": 0.008}
