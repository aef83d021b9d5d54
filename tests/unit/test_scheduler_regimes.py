"""Signs, lending and scaling, case by case."""

from __future__ import annotations

from typing import Any

import pytest

from flowkv_common.wire.nodes import RegimeChanged, ScaleWanted, SetPrefillCap, StepFit
from flowkv_scheduler.cluster import Goals, Work
from flowkv_scheduler.rebalance import DWELL_S, NUM_TICKS, Order, Rebalancer, pressures_of
from tests.described_nodes import CAPS, NUM_BLOCKS, TOKEN_BUDGET, Described, cluster, node

GOALS = Goals(ttft_s=4.0, itl_s=0.25)
FIT = StepFit(base_s=0.05, prefill_token_s=1e-3, attended_token_s=0.0, sequence_s=0.01, context_token_s=0.0)


def prefill(name: str = "p0", queued: int = 0, **changes: Any) -> Described:
    return node(name, "prefill", queued_prefill_tokens=queued, step=FIT, **changes)


def decode(name: str = "d0", running: int = 0, **changes: Any) -> Described:
    free = NUM_BLOCKS - 2 * running
    context = {"num_context_tokens": 100 * running}
    return node(name, "decode", num_running=running, step=FIT, **({"free": free} | context | changes))


class Run:
    """Ticks every half second; nodes obey at once unless `obey` is off.

    What is queued has come within five seconds.
    """

    def __init__(self, rebalancer: Rebalancer | None = None) -> None:
        self.rebalancer = rebalancer or Rebalancer(GOALS)
        self.caps: dict[str, int] = {}
        self.now = 0.0

    def tick(self, *nodes: Described, times: int = 1, obey: bool = True) -> list[Order]:
        orders: list[Order] = []
        prefill_rate = sum(one.report.queued_prefill_tokens for one in nodes) / 5.0
        for _ in range(times):
            self.now += 0.5
            found = [self._with_cap(one) for one in nodes]
            said = self.rebalancer.tick(cluster(*found).views(), prefill_rate, self.now)
            if obey:
                self.caps |= {
                    o.node.node_id: o.max_prefill_tokens_per_step
                    for o in said
                    if isinstance(o, SetPrefillCap)
                }
            orders += said
        return orders

    def _with_cap(self, one: Described) -> Described:
        cap = self.caps.get(one.node_id, one.report.max_prefill_tokens_per_step)
        fields = {name: getattr(one.report, name) for name in one.report.__struct_fields__}
        return one._replace(report=type(one.report)(**fields | {"max_prefill_tokens_per_step": cap}))


def moves(orders: list[Order]) -> list[tuple[str, int]]:
    return [
        (order.node.node_id, order.max_prefill_tokens_per_step)
        for order in orders
        if isinstance(order, SetPrefillCap)
    ]


def test_idle_cluster_is_left_alone() -> None:
    assert Run().tick(prefill(), decode(), times=10) == []


def test_a_sign_must_last_before_a_node_is_lent() -> None:
    run = Run()
    assert run.tick(prefill(queued=4000), decode(), times=NUM_TICKS - 1) == []
    run.tick(prefill(), decode())
    assert run.tick(prefill(queued=4000), decode(), times=NUM_TICKS - 1) == []
    orders = run.tick(prefill(queued=4000), decode())
    assert [type(order) for order in orders] == [RegimeChanged, SetPrefillCap]
    assert "prefill is short of nodes" in orders[0].reason


def test_the_idlest_node_is_lent_and_works_off_its_sequences_in_rhythm() -> None:
    run = Run()
    busy = (prefill(queued=4000), decode("d0", running=3))
    orders = run.tick(*busy, decode("d1", running=1), times=NUM_TICKS)
    # 0.65 x 250 ms, less the base and one sequence: 102 tokens of 1 ms.
    assert moves(orders) == [("d1", 102)]
    assert run.rebalancer.leaving == {"d1": "decode"}
    assert moves(run.tick(*busy, decode("d1", running=0))) == [("d1", TOKEN_BUDGET)]


def test_the_last_node_of_a_side_serves_both() -> None:
    run = Run()
    assert moves(run.tick(prefill(queued=4000), decode(), times=NUM_TICKS)) == [("d0", 112)]
    assert run.rebalancer.leaving == {}
    assert moves(run.tick(prefill(queued=4000), decode(running=9))) == [("d0", 22)]


def test_prefill_node_is_lent_to_decode_when_its_queue_is_done() -> None:
    run = Run()
    assert moves(run.tick(prefill("p0"), prefill("p1", queued=100), decode(running=15), times=NUM_TICKS)) == [
        ("p0", CAPS["decode"])
    ]


def test_a_side_gives_no_node_that_it_would_miss() -> None:
    nodes = (prefill(queued=4000), decode("d0", running=8), decode("d1", running=8))
    assert moves(Run().tick(*nodes, times=20)) == []


def test_it_is_taken_back_when_all_is_well_but_not_before_its_time() -> None:
    run = Run()
    idle = (prefill(), decode("d0"), decode("d1"))
    run.tick(prefill(queued=4000), *idle[1:], times=NUM_TICKS)
    lent_at = run.now
    orders: list[tuple[str, int]] = []
    while not orders:
        orders = moves(run.tick(*idle))
        assert run.now < 60
    assert orders == [("d0", CAPS["decode"])]
    assert run.now - lent_at >= DWELL_S
    run.tick(*idle, times=30)
    assert run.rebalancer.leaving == {}


def test_a_node_that_was_moved_stays_for_its_dwell_time_whatever_comes() -> None:
    """Lent to prefill, and in the next moment decode is short: it takes seconds to see what a move does."""
    run = Run()
    nodes = [decode("d0"), decode("d1")]
    assert moves(run.tick(prefill(queued=4000), *nodes, times=NUM_TICKS)) == [("d0", TOKEN_BUDGET)]
    lent_at, moved = run.now, list[tuple[str, int]]()
    while "d0" not in dict(moved):
        moved = moves(run.tick(prefill(queued=300), decode("d0"), decode("d1", running=15)))
        assert run.now < 60
    assert run.now - lent_at >= DWELL_S


def test_who_was_just_taken_back_is_not_lent_again_within_its_dwell_time() -> None:
    run = Run()
    nodes = [decode("d0"), decode("d1")]
    run.tick(prefill(queued=4000), *nodes, times=NUM_TICKS)
    while run.caps["d0"] != CAPS["decode"]:
        run.tick(prefill(), *nodes)
    # Again short, and d0 is the idlest.
    needy = prefill(queued=4000), decode("d0"), decode("d1", running=9)
    moved = moves(run.tick(*needy, times=int(DWELL_S / 0.5) - 1))
    assert [name for name, _ in moved] == ["d1"]


def test_prompts_that_wait_are_not_counted_twice_as_decode_pressure() -> None:
    """They are there as sequences that we gave their decode node: a burst of prompts calls for no more."""
    given = Work(num_sequences=3, num_blocks=6, context_tokens=300)
    waiting = node("p0", "prefill", step=FIT, num_prompts=60), decode("d0", running=2)._replace(given=given)
    alone = node("p0", "prefill", step=FIT), waiting[1]
    scores = [pressures_of(cluster(*nodes).views(), GOALS, 0.0) for nodes in (waiting, alone)]
    assert scores[0] == scores[1]


def test_outputs_that_are_on_their_way_are_decode_pressure_before_they_decode() -> None:
    """20 sequences of 10 ms fit beside 50 ms into 250: 16 places, 76 tokens per second each node."""
    nodes = cluster(node("p0", "prefill", step=FIT), decode("d0"), decode("d1")).views()
    at_limit = 16 / (0.05 + 16 * 0.01)
    for share in (0.0, 0.5, 1.5):
        found = pressures_of(nodes, GOALS, 0.0, output_rate=share * 2 * at_limit)
        assert found.decode.work == pytest.approx(2 * share)
    # Those that decode already are among them.
    busy = cluster(node("p0", "prefill", step=FIT), decode("d0", running=8), decode("d1", running=8)).views()
    assert (
        pressures_of(busy, GOALS, 0.0, output_rate=0.1).decode.work
        == pressures_of(busy, GOALS, 0.0).decode.work
        > 0
    )


def test_a_cap_leaves_their_rhythm_to_those_that_run_not_to_what_its_own_queue_will_become() -> None:
    """Else prompts would wait for the sequences that they are to become, and decode nodes for both."""
    run = Run()
    burst = Work(num_sequences=60, num_blocks=180, context_tokens=2400)
    queue = prefill("p0", queued=2000)._replace(given=burst)
    run.tick(prefill("p0"), decode(running=15), times=NUM_TICKS)
    (cap,) = {cap for name, cap in moves(run.tick(queue, decode(running=15), times=8)) if name == "p0"} or {
        run.caps["p0"]
    }
    assert cap == 112  # 0.65 x 250 ms, less the base of 50 ms: of 1 ms each


def test_a_lent_node_stays_while_it_is_needed() -> None:
    run = Run()
    nodes = (decode("d0"), decode("d1"))
    run.tick(prefill(queued=4000), *nodes, times=NUM_TICKS)
    assert moves(run.tick(prefill(queued=2400), *nodes, times=100)) == []


def test_an_order_is_repeated_until_the_report_shows_it() -> None:
    run = Run()
    nodes = (prefill(queued=4000), decode())
    first = moves(run.tick(*nodes, times=NUM_TICKS, obey=False))
    assert moves(run.tick(*nodes, obey=False)) == first == [("d0", 112)]
    run.caps["d0"] = 112
    assert moves(run.tick(*nodes)) == []


def test_a_new_leader_takes_over_what_another_has_lent() -> None:
    run = Run()
    run.caps["d0"] = TOKEN_BUDGET
    nodes = (prefill(), decode("d0"), decode("d1"))
    assert moves(run.tick(*nodes, times=int(DWELL_S / 0.5))) == []
    assert moves(run.tick(*nodes, times=2)) == [("d0", CAPS["decode"])]


def test_a_new_leader_leaves_the_last_node_of_a_side_to_both() -> None:
    run = Run()
    run.caps["d0"] = 112
    run.tick(prefill(), decode("d0"))
    assert run.rebalancer.leaving == {}
    run = Run()
    run.caps |= {"d0": 144, "d1": TOKEN_BUDGET}
    run.tick(prefill(), decode("d0"), decode("d1"))
    assert run.rebalancer.leaving == {"d1": "decode"}


def test_a_lent_node_that_is_silent_for_a_moment_is_not_forgotten() -> None:
    run = Run()
    nodes = (prefill(queued=4000), decode("d0", running=1), decode("d1", running=2))
    run.tick(*nodes, times=NUM_TICKS)
    assert run.rebalancer.leaving == {"d0": "decode"}
    run.tick(nodes[0], nodes[2], times=3)
    assert run.rebalancer.leaving == {"d0": "decode"}


def test_a_shared_node_that_is_silent_for_a_moment_does_not_leave_its_home() -> None:
    run = Run()
    run.tick(prefill(queued=4000), decode(), times=NUM_TICKS)
    run.tick(prefill(queued=4000))
    run.tick(prefill(queued=4000), decode())
    assert run.rebalancer.leaving == {}


def test_the_only_node_that_prefills_goes_home_in_part_when_it_is_needed_there() -> None:
    run = Run()
    nodes = (decode("d0"), decode("d1", running=15))
    assert moves(run.tick(*nodes, times=NUM_TICKS)) == [("d0", TOKEN_BUDGET)]
    assert moves(run.tick(*nodes, times=int(DWELL_S / 0.5))) == [("d0", 112)]
    assert run.rebalancer.leaving == {}


def test_when_all_prefill_nodes_are_gone_decode_nodes_prefill() -> None:
    run = Run()
    assert moves(run.tick(decode("d0"), decode("d1"), times=NUM_TICKS)) == [("d0", TOKEN_BUDGET)]
    assert moves(run.tick(decode("d0"), decode("d1"), times=60)) == []  # nobody else would


def test_when_all_decode_nodes_are_gone_prefill_nodes_decode() -> None:
    run = Run()
    assert [name for name, _ in moves(run.tick(prefill("p0"), times=NUM_TICKS))] == ["p0"]
    assert moves(run.tick(prefill("p0"), times=100)) == []


def test_while_nodes_start_nobody_is_lent_and_nothing_is_said() -> None:
    run = Run()
    assert run.tick(times=10) == []
    assert run.tick(prefill("p0"), times=NUM_TICKS - 1) == []
    assert run.tick(prefill("p0"), decode("d0"), times=10) == []


def test_overload_asks_for_nodes() -> None:
    nodes = (prefill(queued=9000), decode("d0", running=15), decode("d1", running=15))
    orders = Run().tick(*nodes, times=NUM_TICKS)
    wanted = [order for order in orders if isinstance(order, ScaleWanted)]
    assert [(order.role, order.change) for order in wanted] == [("prefill", 1)]
    assert moves(orders) == []
    assert orders[0] == RegimeChanged(epoch=0, before="normal", after="overload", reason=orders[0].reason)


def wishes(orders: list[Order]) -> list[tuple[str, int]]:
    return [(order.role, order.change) for order in orders if isinstance(order, ScaleWanted)]


def test_a_wish_for_nodes_is_taken_back_when_the_overload_ends() -> None:
    run = Run()
    nodes = (prefill(queued=9000), decode("d0", running=15), decode("d1", running=15))
    assert wishes(run.tick(*nodes, times=NUM_TICKS)) == [("prefill", 1)]
    calm = (prefill(queued=100), decode("d0", running=5), decode("d1", running=5))
    assert wishes(run.tick(*calm, times=NUM_TICKS - 1)) == []  # it may be a moment's calm
    assert wishes(run.tick(*calm)) == [("prefill", 0)]
    assert wishes(run.tick(*calm, times=60)) == []


def test_a_wish_for_nodes_of_one_side_gives_way_to_that_for_the_other() -> None:
    run = Run()
    run.tick(prefill(queued=9000), decode(running=15), times=30)
    orders = run.tick(prefill(queued=1500), decode(running=60), times=60)
    assert wishes(orders)[:2] == [("prefill", 0), ("decode", 2)]


def test_a_wish_for_fewer_nodes_is_taken_back_when_there_is_work_or_one_has_left() -> None:
    nodes = (prefill(), decode("d0"), decode("d1"))
    for after in ((prefill(queued=500), *nodes[1:]), nodes[:2]):
        run = Run()
        assert wishes(run.tick(*nodes, times=121))[-1] == ("decode", -1)
        assert wishes(run.tick(*after)) == [("decode", 0)]


def test_a_long_idle_cluster_could_do_with_fewer_nodes() -> None:
    nodes = (prefill(), decode("d0"), decode("d1"))
    orders = Run().tick(*nodes, times=122)
    assert [(o.role, o.change) for o in orders if isinstance(o, ScaleWanted)] == [("decode", -1)]


@pytest.mark.parametrize("queued", [0, 4000])
def test_without_lending_no_cap_is_moved(queued: int) -> None:
    run = Run(Rebalancer(GOALS, lends=False))
    assert moves(run.tick(prefill(queued=queued), decode(), times=50)) == []
