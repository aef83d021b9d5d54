"""What lending never does, whatever the load: checked over random histories of a cluster."""

from __future__ import annotations

from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from flowkv_common.wire.nodes import SetPrefillCap
from flowkv_scheduler.cluster import Goals
from flowkv_scheduler.rebalance import DWELL_S, Order, Rebalancer
from tests.described_nodes import BLOCK_SIZE, CAPS, NUM_BLOCKS, TOKEN_BUDGET, Described, cluster, node

GOALS = Goals(ttft_s=4.0, itl_s=0.25)
TICK_S = 0.5

# Per tick: tokens queued at prefill nodes, sequences at decode nodes, and who answers.
loads = st.tuples(st.sampled_from([0, 100, 9000]), st.sampled_from([0, 2, 15]), st.integers(0, 15))
histories = st.lists(st.tuples(loads, st.integers(1, 12)), max_size=12)


def nodes_under(load: tuple[int, int, int], caps: dict[str, int], num_each: int) -> list[Described]:
    queued, running, absent = load
    found = []
    for number in range(2 * num_each):
        role = "prefill" if number < num_each else "decode"
        if absent & (1 << number):
            continue
        name = f"n{number}"
        busy: dict[str, Any] = (
            {"queued_prefill_tokens": queued} if role == "prefill" else {"num_running": running}
        )
        free = NUM_BLOCKS - 8 * running if role == "decode" else NUM_BLOCKS
        found.append(
            node(name, role, free=free, max_prefill_tokens_per_step=caps.get(name, CAPS[role]), **busy)
        )
    return found


def played(history: list[tuple[tuple[int, int, int], int]], num_each: int = 2) -> list[tuple[float, Order]]:
    """All orders of a history in which nodes obey at once."""
    rebalancer, caps, orders, now = Rebalancer(GOALS), dict[str, int](), list[tuple[float, Order]](), 0.0
    for load, num_ticks in history:
        for _ in range(num_ticks):
            now += TICK_S
            views = cluster(*nodes_under(load, caps, num_each)).views()
            for order in rebalancer.tick(views, load[0] / 5.0, now):
                orders.append((now, order))
                if isinstance(order, SetPrefillCap):
                    caps[order.node.node_id] = order.max_prefill_tokens_per_step
    return orders


@settings(deadline=None)
@given(histories)
@example([((0, 15, 3), 11), ((0, 0, 4), 1), ((0, 0, 0), 11)])  # a lent node is silent for a moment
def test_no_lending_is_undone_within_its_dwell_time(history: list[tuple[tuple[int, int, int], int]]) -> None:
    directed: dict[str, tuple[str, float]] = {}
    for now, order in played(history):
        if not isinstance(order, SetPrefillCap):
            continue
        to = order.reason.partition(",")[0]  # "lent to prefill", "taken back to decode"
        before, since = directed.get(order.node.node_id, (to, now))
        if to != before:
            assert before.startswith("taken back") or now - since >= DWELL_S
            since = now
        directed[order.node.node_id] = (to, since)


@settings(deadline=None)
@given(histories)
def test_caps_stay_between_a_block_and_the_budget(history: list[tuple[tuple[int, int, int], int]]) -> None:
    for _, order in played(history):
        if isinstance(order, SetPrefillCap):
            assert BLOCK_SIZE <= order.max_prefill_tokens_per_step <= TOKEN_BUDGET


@settings(deadline=None)
@given(histories)
def test_the_same_history_gives_the_same_orders(history: list[tuple[tuple[int, int, int], int]]) -> None:
    assert played(history) == played(history)


@settings(deadline=None)
@given(loads, st.integers(40, 80))
def test_under_steady_load_it_comes_to_rest(load: tuple[int, int, int], num_ticks: int) -> None:
    """No load makes it lend and take back for ever: a node goes at most once and comes back at most once,
    each in at most two steps."""
    moves = [order for _, order in played([(load, num_ticks)]) if isinstance(order, SetPrefillCap)]
    for name in {order.node.node_id for order in moves}:
        assert sum(order.node.node_id == name for order in moves) <= 4
