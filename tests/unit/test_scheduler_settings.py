"""What an operator sets reaches the planner."""

from __future__ import annotations

from flowkv_common import errors
from flowkv_common.config import SchedulerSettings
from flowkv_common.wire.messages import ScheduleRequest
from flowkv_scheduler.app import planner_of
from flowkv_scheduler.planner import Planner
from flowkv_scheduler.policy import Choice
from tests.described_nodes import descriptor, node, request


def planned(settings: SchedulerSettings, queued: int, running: int = 0) -> Planner:
    planner = planner_of(settings)
    planner.set_descriptors({"p0": descriptor("p0", "prefill"), "d0": descriptor("d0", "decode")})
    planner.add_report(node("p0", "prefill", queued_prefill_tokens=queued).report, 0.0)
    busy = node("d0", "decode", queued_prefill_tokens=500_000, num_running=running)
    planner.add_report(busy.report, 0.0)
    return planner


def outcome(planner: Planner, wanted: ScheduleRequest) -> str:
    try:
        return type(planner.schedule(wanted, 0.0)).__name__
    except errors.FlowKVError as error:
        return type(error).__name__


def test_the_longest_wait_is_set() -> None:
    assert outcome(planned(SchedulerSettings(max_wait_s=9.0), queued=8000), request()) == "Wait"
    assert outcome(planned(SchedulerSettings(max_wait_s=7.0), queued=8000), request()) == "Full"


def test_the_longest_wait_follows_from_the_time_to_the_first_token_where_none_is_set() -> None:
    for ttft_goal_s, kind in ((0.7, "Wait"), (0.6, "Full")):
        settings = SchedulerSettings(ttft_goal_s=ttft_goal_s)
        assert outcome(planned(settings, queued=8000), request()) == kind


def test_the_time_between_tokens_is_set() -> None:
    assert outcome(planned(SchedulerSettings(itl_goal_s=0.5), 0, running=9), request()) == Choice.__name__
    assert outcome(planned(SchedulerSettings(itl_goal_s=0.04), 0, running=9), request()) == "Wait"


def test_the_time_to_the_first_token_is_set() -> None:
    """A request that would miss it gives way to others."""
    for ttft_goal_s, kind in ((4.0, Choice.__name__), (3.0, "Wait")):
        assert outcome(planned(SchedulerSettings(ttft_goal_s=ttft_goal_s), queued=3000), request()) == kind


def test_after_half_of_the_longest_wait_the_time_between_tokens_of_others_does_not_matter() -> None:
    aged = request(age_s=3.0)
    for max_wait_s, kind in ((6.0, Choice.__name__), (7.0, "Wait")):
        settings = SchedulerSettings(itl_goal_s=0.04, max_wait_s=max_wait_s)
        assert outcome(planned(settings, 0, running=9), aged) == kind


def lending(settings: SchedulerSettings) -> Planner:
    """A planner with a prefill node so slow that a decode node is lent, for what came in ten seconds."""
    planner = planner_of(settings)
    roles = {"p0": "prefill", "d0": "decode", "d1": "decode"}
    planner.set_descriptors({name: descriptor(name, role) for name, role in roles.items()})
    for step in range(23):
        now = 0.5 * step
        for name, role in roles.items():
            planner.add_report(node(name, role, seq=step, prefill_tokens_per_s=100.0).report, now)
        planner.schedule(request(200, 1, request_id=f"r{step}"), now)
        planner.tick(now)
    return planner


def test_lending_is_set() -> None:
    assert lending(SchedulerSettings(max_wait_s=1e6)).rebalancer.moved
    assert not lending(SchedulerSettings(max_wait_s=1e6, lending=False)).rebalancer.moved


def test_a_new_term_begins_without_what_was_lent_in_an_earlier_one() -> None:
    planner = lending(SchedulerSettings(max_wait_s=1e6))
    planner.start_term()
    rebalancer = planner.rebalancer
    assert (rebalancer.moved, rebalancer.leaving, rebalancer.regime) == ({}, {}, "normal")
