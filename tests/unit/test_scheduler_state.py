"""What the scheduler believes of the cluster, as reports, restarts and silence come in."""

from __future__ import annotations

import pytest
from imagined_nodes import PERIOD_S, descriptor, report

from flowkv_scheduler.state import ClusterState, Work


@pytest.fixture
def state() -> ClusterState:
    """One node `d0`, known since time 0."""
    state = ClusterState()
    state.set_descriptors({"d0": descriptor("d0", "decode")})
    state.add_report(report("d0", "decode"), now=0.0)
    return state


def test_node_is_seen_when_descriptor_and_report_are_there() -> None:
    state = ClusterState()
    state.add_report(report("d0", "decode"), now=0.0)
    assert state.views(0.0) == []
    state.set_descriptors({"d0": descriptor("d0", "decode"), "p0": descriptor("p0", "prefill")})
    assert [view.node_id for view in state.views(0.0)] == ["d0"]


def test_latest_report_wins_and_one_that_was_overtaken_is_dropped(state: ClusterState) -> None:
    state.add_report(report("d0", "decode", seq=3, num_running=3), now=0.1)
    state.add_report(report("d0", "decode", seq=2, num_running=2), now=0.2)
    (view,) = state.views(0.3)
    assert view.report.num_running == 3
    assert view.age_s == pytest.approx(0.2)


def test_node_is_silent_after_three_periods(state: ClusterState) -> None:
    assert not state.views(3 * PERIOD_S)[0].is_silent
    assert state.views(3 * PERIOD_S + 0.01)[0].is_silent
    assert not state.views(3 * PERIOD_S + 0.01)[0].is_usable


def test_after_a_reconnect_nobody_is_silent_at_once(state: ClusterState) -> None:
    state.touch_all(100.0)
    assert not state.views(100.0 + 2 * PERIOD_S)[0].is_silent
    assert state.views(100.0 + 4 * PERIOD_S)[0].is_silent


def test_choices_count_at_once_and_are_forgotten_after_two_periods(state: ClusterState) -> None:
    node = state.views(0.0)[0].descriptor.node
    state.add_work(node, Work(prefill_tokens=100), now=0.0)
    state.add_work(node, Work(num_sequences=1, num_blocks=7), now=PERIOD_S)
    assert state.views(PERIOD_S)[0].given == Work(100, 1, 7)
    state.add_report(report("d0", "decode", seq=2), now=2 * PERIOD_S)
    assert state.views(2 * PERIOD_S)[0].given == Work(0, 1, 7)
    assert state.views(3 * PERIOD_S)[0].given == Work()


def test_new_life_of_a_node_starts_without_the_old_report_and_choices(state: ClusterState) -> None:
    state.add_work(state.views(0.0)[0].descriptor.node, Work(prefill_tokens=100), now=0.0)
    state.set_descriptors({"d0": descriptor("d0", "decode", incarnation="i2")})
    assert state.views(0.1) == []
    state.add_report(report("d0", "decode", incarnation="i2"), now=0.1)
    state.add_report(report("d0", "decode", seq=9, num_running=9), now=0.2)  # the old life, late
    (view,) = state.views(0.2)
    assert view.report.node.incarnation == "i2"
    assert view.given == Work()


def test_node_that_left_the_registry_is_gone(state: ClusterState) -> None:
    state.set_descriptors({})
    assert state.views(0.0) == []


def test_reports_of_the_long_gone_are_not_kept(state: ClusterState) -> None:
    state.views(1000.0)
    state.touch_all(1000.0)
    assert state.views(1000.0) == []
