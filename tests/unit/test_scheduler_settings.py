"""What an operator sets reaches the planner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

from flowkv_common import errors
from flowkv_common.config import SchedulerSettings
from flowkv_common.wire.messages import ScheduleRequest
from flowkv_common.wire.nodes import SetPrefillCap
from flowkv_scheduler.app import planner_of
from flowkv_scheduler.planner import Planner
from flowkv_scheduler.policy import Choice
from flowkv_scheduler.rebalance import Order
from flowkv_scheduler.slices import Sliced, at_once
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


def lending(settings: SchedulerSettings, num_ticks: int = 23) -> Planner:
    """A planner with a prefill node so slow that a decode node is lent, for what came in ten seconds."""
    planner = planner_of(settings)
    roles = {"p0": "prefill", "d0": "decode", "d1": "decode"}
    planner.set_descriptors({name: descriptor(name, role) for name, role in roles.items()})
    for step in range(num_ticks):
        now = 0.5 * step
        for name, role in roles.items():
            planner.add_report(node(name, role, seq=step, prefill_tokens_per_s=100.0).report, now)
        planner.schedule(request(200, 1, request_id=f"r{step}"), now)
        at_once(planner.tick(now))
    return planner


def test_lending_is_set() -> None:
    assert lending(SchedulerSettings(max_wait_s=1e6)).rebalancer.moved
    assert not lending(SchedulerSettings(max_wait_s=1e6, lending=False)).rebalancer.moved


def orders_of(work: Sliced[list[Order]], between: Callable[[], object]) -> list[Order]:
    """What a tick orders, with something else done between its slices."""
    next(work)  # whom to believe: what it sees is taken after that
    orders = list[Order]()

    def keep_orders() -> Iterator[None]:
        orders.extend((yield from work))

    for _ in keep_orders():
        between()
    return orders


def test_a_tick_sees_all_as_it_was_when_it_began() -> None:
    """So what comes between its slices changes nothing."""
    settings = SchedulerSettings(max_wait_s=1e6)
    one, another = lending(settings, 21), lending(settings, 21)
    numbers = count()

    def ask() -> None:
        load = node("p0", "prefill", seq=100 + next(numbers), prefill_tokens_per_s=1e4).report
        another.add_report(load, 10.6)
        for number in range(10):
            another.schedule(request(20, 500, request_id=f"{load.seq}.{number}"), 10.6)

    orders = at_once(one.tick(10.5))
    assert [order for order in orders if isinstance(order, SetPrefillCap)]
    assert orders_of(another.tick(10.5), ask) == orders
    assert next(numbers) > 5


def test_a_node_that_leaves_while_the_tick_goes_on_is_not_moved() -> None:
    planner = lending(SchedulerSettings(max_wait_s=1e6), 21)
    changes = iter([{name: descriptor(name, role) for name, role in (("p0", "prefill"), ("d1", "decode"))}])

    def leave_once() -> None:
        for rest in changes:
            planner.set_descriptors(rest)

    assert orders_of(planner.tick(10.5), leave_once) == []
    assert planner.rebalancer.moved == {}


def test_a_new_term_begins_without_what_was_lent_in_an_earlier_one() -> None:
    planner = lending(SchedulerSettings(max_wait_s=1e6))
    planner.start_term()
    rebalancer = planner.rebalancer
    assert (rebalancer.moved, rebalancer.leaving, rebalancer.regime) == ({}, {}, "normal")
