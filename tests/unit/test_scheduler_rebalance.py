"""Moves of nodes, regimes and scaling, case by case."""

from __future__ import annotations

import copy
import heapq
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import msgspec
import pytest

from benchmarks.simulator.batch import Histogram, Life
from benchmarks.simulator.cluster import Cluster as SimulatedCluster
from benchmarks.simulator.kinds import KINDS
from benchmarks.simulator.run import Machines
from flowkv.bench.traces import Request, Targets
from flowkv_common.wire.nodes import OutputForecast, RegimeChanged, ScaleWanted, SetPrefillCap, StepFit
from flowkv_scheduler import lookahead, rebalance
from flowkv_scheduler.cluster import Goals
from flowkv_scheduler.demand import REMEMBERED_S, Demand, OutputLengths, Window
from flowkv_scheduler.lookahead import EVENTS_PER_SLICE, HORIZON_S, Duties, LookAhead
from flowkv_scheduler.node_view import SHARED_ITL, NodeView, Work
from flowkv_scheduler.planner import Planner
from flowkv_scheduler.rebalance import (
    IDLE_S,
    LAST_ENDS_LATER,
    LEAST_NODES,
    MAX_PLAYED,
    MOST_NODES,
    NUM_TICKS,
    RECENT_S,
    SCALE_EVERY_S,
    SETTLED_S,
    TURNS,
    WINDOWS_S,
    Order,
    Rebalancer,
    _busy_s,
)
from flowkv_scheduler.slices import at_once
from tests.described_nodes import BLOCK_SIZE, CAPS, MODEL, TOKEN_BUDGET, Described, cluster, node
from tests.obedient_nodes import (
    FIT,
    GOALS,
    NUM_BLOCKS,
    OTHER_MODEL,
    TICK_S,
    Cluster,
    Mix,
    Node,
    budgets,
    directions,
    four_nodes,
)

LONG_PROMPTS = Mix(2.2, [(1200, 4)])  # 2.8 prefill nodes would serve all
LONG_OUTPUTS = Mix(2.5, [(32, 120)])  # 4 decode nodes would
EVEN = Mix(1.5, [(400, 20)])
IDLE = Mix(0.2, [(100, 4)])
# A fifth of its ITL target has room for a chunk beside sequences.
SLOW_GOALS = Goals(ttft_s=GOALS.ttft_s, itl_s=0.825)

LENGTHS = defaultdict[str, OutputLengths](OutputLengths)


def regimes(orders: list[Order]) -> list[str]:
    return [order.after for order in orders if isinstance(order, RegimeChanged)]


def wishes(orders: list[Order]) -> list[tuple[str, int]]:
    return [(order.role, order.change) for order in orders if isinstance(order, ScaleWanted)]


# --- whether to move -------------------------------------------------------------------------------


def test_an_idle_cluster_is_left_alone() -> None:
    assert Cluster(*four_nodes()).play(Mix(0.1, [(16, 1)]), 50.0) == []


def test_a_cluster_that_serves_all_in_time_is_left_alone() -> None:
    run = Cluster(*four_nodes())
    orders = run.play(EVEN, 100.0)
    assert run.num_lost == 0
    assert (directions(orders), regimes(orders)) == ([], [])


def test_a_node_moves_to_the_side_that_is_short() -> None:
    for mix, name, to in ((LONG_PROMPTS, "d", "prefill"), (LONG_OUTPUTS, "p", "decode")):
        run = Cluster(*four_nodes())
        (first, *_) = directions(run.play(mix, 15.0))
        assert (first[0][0], first[1]) == (name, f"lent to {to}")
        assert run.rebalancer.leaving == {first[0]: name == "d" and "decode" or "prefill"}


def test_nothing_moves_before_demand_is_known_for_ten_seconds() -> None:
    """However much comes: the first seconds may be a burst."""
    run = Cluster(*four_nodes())
    assert directions(run.play(LONG_PROMPTS, RECENT_S - TICK_S)) == []
    assert run.num_lost > 1
    assert len(directions(run.play(LONG_PROMPTS, 2 * TICK_S))) == 1


def test_where_requests_come_fast_two_seconds_and_a_half_are_enough() -> None:
    """A hundred of them say as much as they do in ten seconds elsewhere."""
    fast = Mix(45.0, [(60, 1)])
    run = Cluster(*four_nodes())
    assert directions(run.play(fast, WINDOWS_S[0] - TICK_S)) == []
    assert len(directions(run.play(fast, 4 * TICK_S))) == 1
    slow = Cluster(*four_nodes())
    assert directions(slow.play(fast._replace(rate=35.0), RECENT_S - TICK_S)) == []


def test_only_one_node_moves_at_a_time() -> None:
    """The next when what the first one does has been seen: in what came since its move."""
    nodes = [Node(f"p{number}", "prefill") for number in range(6)] + [Node("d0", "decode")]
    run = Cluster(*nodes)
    orders = run.play(Mix(8.0, [(32, 100)]), 60.0)
    assert len(directions(orders)) > 1
    began = [at for at, order in run.orders if isinstance(order, SetPrefillCap)]
    newest = dict[str, str]()
    moved_at = []
    for at, order in run.orders:
        if isinstance(order, SetPrefillCap) and newest.get(order.node.node_id) != order.reason:
            newest[order.node.node_id] = order.reason
            moved_at.append(at)
    assert len(set(moved_at)) == len(moved_at), "one per tick"
    assert min(began) >= RECENT_S


def test_in_a_large_cluster_several_nodes_move_at_once() -> None:
    """One of 64 serves too little more to be told from chance."""
    nodes = [Node(f"p{number:02}", "prefill") for number in range(32)]
    nodes += [Node(f"d{number:02}", "decode") for number in range(32)]
    for mix, to in ((LONG_PROMPTS, "prefill"), (LONG_OUTPUTS, "decode")):
        run = Cluster(*(Node(one.name, one.role) for one in nodes))
        moved = directions(run.play(mix._replace(rate=16 * mix.rate), RECENT_S + TICK_S))
        assert [where for _, where in moved] == [f"lent to {to}"] * (len(nodes) // MOST_NODES)


def on_host(
    nodes: list[Node], num_host_cores: int, num_cores: float = 1.0, boot_id: str = "one"
) -> list[Node]:
    for one in nodes:
        one.host = {"num_host_cores": num_host_cores, "num_cores": num_cores, "boot_id": boot_id}
    return nodes


def two_hosts(num_cores_each: int) -> list[Node]:
    nodes = four_nodes()
    return on_host(nodes[:2], num_cores_each) + on_host(nodes[2:], num_cores_each, boot_id="other")


@pytest.mark.parametrize(
    ("nodes", "is_lent"),
    [
        pytest.param(on_host(four_nodes(), 2), False, id="two cores for the three that one side would have"),
        pytest.param(on_host(four_nodes(), 3), True, id="three cores"),
        pytest.param(on_host(four_nodes(), 2, num_cores=0.5), True, id="two cores, half a core each"),
        pytest.param(on_host(four_nodes(), 2, num_cores=0.7), False, id="two cores, more than half each"),
        pytest.param(on_host(four_nodes(), 2, num_cores=0.0), True, id="nodes on GPUs"),
        pytest.param(on_host(four_nodes(), 2, boot_id=""), True, id="hosts that are not known"),
        pytest.param(two_hosts(1), True, id="one core for the node of a host that would join"),
    ],
)
@pytest.mark.parametrize("mix", [LONG_PROMPTS, LONG_OUTPUTS])
def test_nodes_are_lent_only_where_there_are_cores_for_them(
    nodes: list[Node], is_lent: bool, mix: Mix
) -> None:
    """On cores that the other side keeps busy already, one node more takes from it what it computes."""
    run = Cluster(*copy.deepcopy(nodes))
    assert bool(directions(run.play(mix, 60.0))) == is_lent


def test_no_more_nodes_move_at_once_than_there_are_cores_for() -> None:
    nodes = [Node(f"p{number:02}", "prefill") for number in range(32)]
    nodes += [Node(f"d{number:02}", "decode") for number in range(32)]
    run = Cluster(*on_host(nodes, 35))
    moved = directions(run.play(LONG_PROMPTS._replace(rate=16 * LONG_PROMPTS.rate), 60.0))
    assert [where for _, where in moved] == ["lent to prefill"] * 3


def test_a_node_goes_home_though_there_are_no_cores_for_it_there() -> None:
    """That is where it was put."""
    run = Cluster(*four_nodes())
    run.play(LONG_PROMPTS, 20.0)
    (moved,) = run.rebalancer.leaving
    on_host(run.nodes, 1)
    assert (moved, "taken back to decode") in directions(run.play(LONG_OUTPUTS, 60.0))


def test_longer_windows_move_nothing_where_nothing_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """What came long ago and was served in time proves that it can be. One window is played per tick."""
    played: list[float] = []

    class Watched(LookAhead):
        def __init__(self, nodes: Sequence[NodeView], duties: Duties, window: Window, *rest: Any) -> None:
            super().__init__(nodes, duties, window, *rest)
            played.append(window.span_s)

    monkeypatch.setattr(rebalance, "LookAhead", Watched)
    demand, lengths = Demand(), {"f": OutputLengths()}
    views = cluster(*(one.described() for one in four_nodes())).views()
    # Long prompts until 15 s ago, more than two nodes seem to serve, and little since.
    for number in range(75):
        demand.add_request(1200, 0, 4, number * 0.4)
    for number in range(30, 45):
        demand.add_request(16, 0, 1, float(number))

    def said(rebalancer: Rebalancer) -> list[str]:
        """A move is found at two ticks in a row, when its window has the turn. For the shortest few came."""
        played.clear()
        orders = [
            at_once(rebalancer.tick(views, {"f": demand}, lengths, 45.0)) for _ in range(len(TURNS) // 2)
        ]
        return [to for _, to in directions([order for each in orders for order in each])]

    assert said(Rebalancer(GOALS)) == []
    for number in range(20):
        demand.add_loss(10.0 + number)
    assert said(Rebalancer(GOALS)) == ["lent to prefill"]
    assert played == [RECENT_S, WINDOWS_S[2], WINDOWS_S[2], RECENT_S]


def test_a_moved_node_stays_while_it_is_needed_and_goes_home_when_it_is_needed_there() -> None:
    run = Cluster(*four_nodes())
    run.play(LONG_PROMPTS, 20.0)
    (moved,) = run.rebalancer.leaving
    assert [name for name, _ in directions(run.play(LONG_PROMPTS, 80.0))] in ([], [moved])
    assert run.rebalancer.leaving == {moved: "decode"}
    # Nothing goes home by itself: little traffic is served as well so.
    assert directions(run.play(Mix(0.5, [(100, 10)]), 100.0)) == []
    assert run.rebalancer.leaving == {moved: "decode"}
    back = directions(run.play(LONG_OUTPUTS, 60.0))
    assert (moved, "taken back to decode") in back


def test_turns_are_forgotten_after_quiet_minutes() -> None:
    """Else a cluster that has turned back often long ago would be slow to move for ever."""
    run = Cluster(*four_nodes())
    run.play(LONG_PROMPTS, 20.0)
    run.play(LONG_OUTPUTS, 60.0)
    past = run.rebalancer._pasts["f"]
    assert past.num_turns > 0
    run.now = past.moved_at + REMEMBERED_S - 2 * TICK_S
    run.play(IDLE, TICK_S)
    assert past.num_turns > 0
    run.play(IDLE, 2 * TICK_S)
    assert past.num_turns == 0


def test_a_node_that_is_home_again_is_as_if_it_had_never_left() -> None:
    run = Cluster(*four_nodes())
    run.play(LONG_PROMPTS, 20.0)
    (moved,) = run.rebalancer.leaving
    while run.rebalancer.leaving.get(moved) == "decode":
        run.play(LONG_OUTPUTS, TICK_S)
        assert run.now < 100.0
    run.play(LONG_OUTPUTS, SETTLED_S + 2.0)
    assert moved not in {ref.node_id for ref in run.rebalancer.moved}
    assert {one.name: one.budget for one in run.nodes}[moved] == CAPS["decode"]


@pytest.mark.parametrize("mix", [LONG_PROMPTS, LONG_OUTPUTS])
def test_without_lending_no_budget_is_moved(mix: Mix) -> None:
    run = Cluster(*four_nodes(), rebalancer=Rebalancer(GOALS, lends=False))
    orders = run.play(mix, 60.0)
    assert budgets(orders) == []
    assert run.rebalancer.leaving == {}
    assert "overload" in regimes(orders)


@pytest.mark.parametrize("num_sequences", [1, 4, 16, 64])
def test_a_decode_node_that_leaves_is_busy_for_twice_as_long_as_outputs_at_random(num_sequences: int) -> None:
    """If each token is as likely the last, the longest is far longer than the mean."""
    draw, mean = random.Random(0), 100.0
    drained_s = []
    for _ in range(500):
        lengths = [draw.expovariate(1 / mean) for _ in range(num_sequences)]
        drained_s.append(max(lengths) * FIT.base_s + sum(lengths) * FIT.sequence_s)
    forecast = OutputForecast(tokens_left=mean * num_sequences, first_ends_in=1.0, stop_rate=1 / mean)
    leaving = decode(running=num_sequences, forecast=forecast, num_context_tokens=0)
    (view,) = cluster(leaving).views()
    assert _busy_s(view, "decode") == pytest.approx(LAST_ENDS_LATER * fmean(drained_s), rel=0.2)


# --- what is no reason to move: on simulated nodes, with the whole planner ---------------------------


def simulated(kind: str, requests: Sequence[Request], targets: Targets) -> list[tuple[str, str]]:
    """Where nodes were moved, of two that prefill and two that decode."""
    lives = [Life(number, one) for number, one in enumerate(requests)]
    planner = Planner(Goals(targets.ttft_s, targets.tpot_s))
    nodes = Machines(KINDS[kind], 4).nodes(2, Histogram())
    run = SimulatedCluster(nodes, planner, lives, targets)
    run.run()
    assert all(life.is_done or life.refused_with for life in lives)
    return directions(order for _, order in run.orders)


@pytest.mark.parametrize("ttft_s", [5.0, 10.0, 30.0])
@pytest.mark.parametrize("kind", ["smollm2-cpu", "a10g"])
def test_prompts_that_queue_take_no_prefill_node_away(kind: str, ttft_s: float) -> None:
    """24 prompts at once that become outputs of a few tokens each: they look like work for decode nodes."""
    moves = simulated(kind, [Request(1500, 8)] * 24, Targets(ttft_s, 0.25))
    assert not [to for _, to in moves if to != "lent to prefill"]


@pytest.mark.parametrize("rate", [1, 2, 4])
@pytest.mark.parametrize("place", [20, 41, 61])
def test_one_giant_prompt_among_many_moves_nothing(rate: int, place: int) -> None:
    """No split serves it in time. Others behind it are late, and will not be again."""
    requests = [Request(1000, 100, arrival_s=number / rate) for number in range(100)]
    requests[place] = requests[place]._replace(num_prompt_tokens=100_000)
    assert simulated("a100", requests, Targets(4.0, 0.15)) == []


def test_mixed_nodes_that_serve_all_in_time_are_normal() -> None:
    run = Cluster(*(Node(f"m{number}", "mixed") for number in range(3)))
    assert run.play(Mix(1.0, [(100, 20)]), 60.0) == []
    assert run.rebalancer.regime == "normal"


# --- the last node of a side, and sides without a node ---------------------------------------------


def played(ticks: int, *nodes: Described, rebalancer: Rebalancer | None = None) -> list[list[Order]]:
    """What is said in each tick of nodes that nobody asks for anything, and that do not obey."""
    rebalancer = rebalancer or Rebalancer(GOALS)
    views = cluster(*nodes).views()
    return [at_once(rebalancer.tick(views, {}, LENGTHS, TICK_S * number)) for number in range(ticks)]


def prefill(name: str = "p0", queued: int = 0, **changes: Any) -> Described:
    return node(name, "prefill", queued_prefill_tokens=queued, step=FIT, **changes)


def decode(name: str = "d0", running: int = 0, **changes: Any) -> Described:
    context = {"num_context_tokens": 100 * running}
    return node(name, "decode", num_running=running, step=FIT, **(context | changes))


def test_the_last_node_of_a_side_never_leaves_it() -> None:
    """It may serve both."""
    for mix in (LONG_PROMPTS, LONG_OUTPUTS, Mix(6.0, [(1200, 60)])):
        run = Cluster(Node("p0", "prefill"), Node("d0", "decode"))
        orders = run.play(mix, 50.0)
        assert {to for _, to in directions(orders)} <= {"lent to both"}
        assert run.rebalancer.leaving == {}
        for _, budget in budgets(orders):
            assert BLOCK_SIZE < budget < TOKEN_BUDGET


@pytest.mark.parametrize(
    ("nodes", "name", "budget"),
    [
        ((decode("d0"), decode("d1")), "d0", TOKEN_BUDGET),
        ((prefill("p0", queued=100), prefill("p1")), "p1", BLOCK_SIZE),
    ],
)
def test_an_empty_side_gets_the_idlest_node(nodes: tuple[Described, ...], name: str, budget: int) -> None:
    """But not in the first tick: while nodes start, those of one side are often first."""
    said = played(NUM_TICKS, *nodes)
    assert [budgets(orders) for orders in said] == [[]] * (NUM_TICKS - 1) + [[(name, budget)]]


def test_a_lone_node_serves_both() -> None:
    for alone in (prefill(), decode()):
        *before, last = played(NUM_TICKS, alone)
        assert before == [[]] * (NUM_TICKS - 1)
        ((_, budget),) = budgets(last)
        assert BLOCK_SIZE < budget < TOKEN_BUDGET


def test_an_empty_side_is_filled_once() -> None:
    run = Cluster(Node("d0", "decode"), Node("d1", "decode"))
    assert directions(run.play(Mix(0.5, [(100, 4)]), 60.0)) == [("d0", "lent to prefill")]


@pytest.mark.parametrize("nodes", [(prefill(),), (prefill("p0"), prefill("p1"))])
def test_who_fills_an_empty_side_goes_home_when_it_has_its_own(nodes: tuple[Described, ...]) -> None:
    rebalancer = Rebalancer(GOALS)
    ((lent, budget),) = budgets(played(NUM_TICKS, *nodes, rebalancer=rebalancer)[-1])
    there = [
        one._replace(report=msgspec.structs.replace(one.report, max_prefill_tokens_per_step=budget))
        if one.node_id == lent
        else one
        for one in nodes
    ]
    said = played(3, *there, decode(), rebalancer=rebalancer)
    assert budgets(said[0]) == [(lent, TOKEN_BUDGET)]
    said = played(10, *nodes, decode(), rebalancer=rebalancer)
    assert [budgets(orders) for orders in said] == [[]] * 10


def test_while_nodes_start_nobody_moves() -> None:
    rebalancer = Rebalancer(GOALS)
    assert played(10, rebalancer=rebalancer) == [[]] * 10
    assert played(NUM_TICKS - 1, prefill(), rebalancer=rebalancer) == [[]] * (NUM_TICKS - 1)
    assert played(10, prefill(), decode(), rebalancer=rebalancer) == [[]] * 10


# --- budgets of nodes on their way -------------------------------------------------------------------


class Directed:
    """A rebalancer that has moved `d0` from decode to prefill, and its next orders."""

    def __init__(self) -> None:
        self.rebalancer = Rebalancer(SLOW_GOALS)
        self.now = 0.0
        self.budgets = {"d0": CAPS["decode"]}

    def tick(self, *nodes: Described, obey: bool = True) -> list[tuple[str, int]]:
        self.now += TICK_S
        found = [
            one._replace(
                report=msgspec.structs.replace(
                    one.report, max_prefill_tokens_per_step=self.budgets[one.node_id]
                )
            )
            if one.node_id in self.budgets
            else one
            for one in nodes
        ]
        said = budgets(at_once(self.rebalancer.tick(cluster(*found).views(), {}, LENGTHS, self.now)))
        if obey:
            self.budgets |= dict(said)
        return said


def test_a_node_that_leaves_decode_works_off_its_sequences_within_the_itl_target() -> None:
    run = Directed()
    busy = decode("d1", running=20)
    run.tick(decode(running=3), busy)
    # 0.2 x 825 ms, less the base of 50 ms and three sequences of 10 ms: 85 tokens of 1 ms.
    assert run.tick(decode(running=3), busy) == [("d0", 85)]
    assert run.rebalancer.leaving == {"d0": "decode"}
    assert run.tick(decode(running=3), busy) == []
    assert run.tick(decode(running=1), busy) == []  # 105 tokens: not worth an order
    assert run.tick(decode(running=0), busy) == [("d0", TOKEN_BUDGET)]
    assert run.tick(decode(running=0), busy) == []


def test_a_sequence_that_comes_late_to_a_node_that_has_left_is_not_slowed_by_whole_chunks() -> None:
    """Its prompt waited elsewhere for longer than it was told, while the node worked off all others."""
    run = Directed()
    busy = decode("d1", running=20)
    for _ in range(NUM_TICKS):
        said = run.tick(decode(running=0), busy)
    assert said == [("d0", TOKEN_BUDGET)]
    assert run.tick(decode(running=1), busy) == [("d0", 105)]
    assert run.tick(decode(running=1), busy) == []
    assert run.tick(decode(running=0), busy) == [("d0", TOKEN_BUDGET)]


def test_a_prompt_that_comes_late_to_a_node_that_has_left_is_not_computed_by_the_block() -> None:
    rebalancer = Rebalancer(SLOW_GOALS)
    nodes = [prefill("p0", queued=3000), prefill("p1")]
    said = [budgets(orders) for orders in played(NUM_TICKS, *nodes, rebalancer=rebalancer)][-1]
    assert said == [("p1", BLOCK_SIZE)]
    late = [nodes[0], prefill("p1", queued=900, max_prefill_tokens_per_step=BLOCK_SIZE)]
    assert budgets(at_once(rebalancer.tick(cluster(*late).views(), {}, LENGTHS, 5.0))) == [("p1", 115)]


def test_a_chunk_is_never_of_less_than_a_block_and_a_token() -> None:
    """One block would be a decode node's."""
    run = Directed()
    busy = decode("d1", running=20)
    for _ in range(NUM_TICKS):
        said = run.tick(decode(running=15), busy)
    assert said == [("d0", BLOCK_SIZE + 1)]


def test_sequences_that_are_to_come_do_not_shorten_the_chunks_they_wait_for() -> None:
    run = Directed()
    busy = decode("d1", running=20)
    given = Work(num_sequences=60, num_blocks=180, context_tokens=2400)
    for _ in range(NUM_TICKS):
        said = run.tick(decode(running=3, given=given), busy)
    assert said == [("d0", 85)]


def test_a_node_that_leaves_prefill_computes_its_queue_first() -> None:
    rebalancer = Rebalancer(SLOW_GOALS)
    late: dict[str, Any] = {"interruptible_prefill_tokens": 900}  # it computes these too
    queue = [prefill("p0", queued=3000), prefill("p1", queued=900, **late)]
    said = [budgets(orders) for orders in played(NUM_TICKS, *queue, rebalancer=rebalancer)][-1]
    # 0.2 x 825 ms, less the base of 50 ms.
    assert said == [("p1", 115)]
    assert rebalancer.leaving == {"p1": "prefill"}
    done = [queue[0], prefill("p1", max_prefill_tokens_per_step=115)]
    assert budgets(at_once(rebalancer.tick(cluster(*done).views(), {}, LENGTHS, 5.0))) == [("p1", BLOCK_SIZE)]


@pytest.mark.parametrize("num_running", [0, 3, 9])
def test_a_shared_nodes_budget_follows_its_sequences(num_running: int) -> None:
    run = Directed()
    for _ in range(NUM_TICKS + 2):
        run.tick(decode(running=num_running))
    left_s = SHARED_ITL * SLOW_GOALS.itl_s - (FIT.base_s + num_running * FIT.sequence_s)
    assert run.budgets["d0"] == pytest.approx(left_s / FIT.prefill_token_s, abs=1)


def test_an_order_is_repeated_until_the_report_shows_it() -> None:
    run = Directed()
    nodes = decode(), decode("d1")
    run.tick(*nodes, obey=False)
    assert run.tick(*nodes, obey=False) == run.tick(*nodes, obey=False) == [("d0", TOKEN_BUDGET)]
    run.budgets["d0"] = TOKEN_BUDGET
    assert run.tick(*nodes) == []


def test_a_moved_node_that_is_silent_for_a_moment_is_not_forgotten() -> None:
    run = Directed()
    nodes = decode(running=1), decode("d1", running=2)
    for _ in range(NUM_TICKS):
        run.tick(*nodes)
    assert run.rebalancer.leaving == {"d0": "decode"}
    for _ in range(3):
        run.tick(nodes[1])
    assert run.rebalancer.leaving["d0"] == "decode"


# --- a new leader ----------------------------------------------------------------------------------


def test_a_new_leader_adopts_what_another_has_lent() -> None:
    rebalancer = Rebalancer(GOALS)
    nodes = prefill(), decode("d0", max_prefill_tokens_per_step=TOKEN_BUDGET), decode("d1")
    assert [order for orders in played(50, *nodes, rebalancer=rebalancer) for order in budgets(orders)] == []
    assert rebalancer.leaving == {"d0": "decode"}


def test_a_new_leader_goes_on_with_nodes_on_their_way() -> None:
    rebalancer = Rebalancer(GOALS)
    nodes = prefill(), decode("d0", max_prefill_tokens_per_step=82), decode("d1")
    assert {
        budget for orders in played(5, *nodes, rebalancer=rebalancer) for _, budget in budgets(orders)
    } == {TOKEN_BUDGET}
    assert rebalancer.leaving == {"d0": "decode"}


def test_a_new_leader_leaves_the_last_node_of_a_side_to_both() -> None:
    rebalancer = Rebalancer(GOALS)
    played(2, prefill(), decode("d0", max_prefill_tokens_per_step=112), rebalancer=rebalancer)
    assert rebalancer.leaving == {}
    rebalancer = Rebalancer(GOALS)
    lent = [
        decode(name, max_prefill_tokens_per_step=budget)
        for name, budget in (("d0", 144), ("d1", TOKEN_BUDGET))
    ]
    played(2, prefill(), *lent, rebalancer=rebalancer)
    assert rebalancer.leaving == {"d1": "decode"}


def test_mixed_nodes_are_not_taken_for_lent_ones() -> None:
    rebalancer = Rebalancer(GOALS)
    mixed = [node(f"m{number}", "mixed", step=FIT) for number in range(2)]
    assert played(20, *mixed, rebalancer=rebalancer) == [[]] * 20
    assert rebalancer.moved == {}


# --- regimes and scaling -----------------------------------------------------------------------------


def test_overload_is_that_requests_were_lost_lately() -> None:
    run = Cluster(*four_nodes(), rebalancer=Rebalancer(GOALS, lends=False))
    assert regimes(run.play(EVEN, 20.0)) == []
    assert regimes(run.play(Mix(6.0, [(1200, 30)]), 60.0)) == ["overload"]
    # Until that is no longer recent.
    assert regimes(run.play(EVEN, RECENT_S - TICK_S)) == []
    assert regimes(run.play(EVEN, 30.0)) == ["normal"]


def test_a_cluster_that_is_too_small_is_overloaded_between_its_moves() -> None:
    run = Cluster(*four_nodes())
    run.play(Mix(6.0, [(1200, 30)]), 60.0)
    told = [order for _, order in run.orders if isinstance(order, RegimeChanged)]
    assert {order.after for order in told} == {"overload", "imbalance"}
    assert run.rebalancer.regime == "overload"
    assert [order.before for order in told] == ["normal", *(order.after for order in told[:-1])]


def test_a_move_is_an_imbalance_until_it_has_settled() -> None:
    run = Cluster(*four_nodes())
    run.play(LONG_PROMPTS, RECENT_S + TICK_S)
    moved_at = next(at for at, order in run.orders if isinstance(order, SetPrefillCap))
    changes = [(at, order.after) for at, order in run.orders if isinstance(order, RegimeChanged)]
    assert changes[-1] == (moved_at, "imbalance")
    run.play(Mix(0.1, [(16, 1)]), RECENT_S + SETTLED_S)
    (after, *_) = [
        order.after for at, order in run.orders if isinstance(order, RegimeChanged) and at > moved_at
    ]
    assert after in ("normal", "overload")
    assert run.rebalancer.regime == "normal"


def test_overload_must_last_for_two_ticks() -> None:
    demand, lengths = Demand(), {"f": OutputLengths()}
    rebalancer = Rebalancer(GOALS)
    views = cluster(prefill(), decode()).views()
    demand.add_request(100, 0, 4, 0.0)
    demand.add_loss(0.0)
    said = [
        regimes(at_once(rebalancer.tick(views, {"f": demand}, lengths, TICK_S * tick))) for tick in range(3)
    ]
    assert said == [[], ["overload"], []]


def test_overload_asks_for_nodes_of_the_side_that_serves_more() -> None:
    for mix, side in ((Mix(6.0, [(1200, 4)]), "prefill"), (Mix(6.0, [(32, 160)]), "decode")):
        run = Cluster(*four_nodes())
        orders = run.play(mix, 60.0)
        assert {role for role, _ in wishes(orders)} == {side}
        # It holds while a node moves: at most as many again as there are.
        assert all(0 < change <= len(run.nodes) for _, change in wishes(orders))
        told = [at for at, order in run.orders if isinstance(order, ScaleWanted)]
        assert all(later - before >= SCALE_EVERY_S for before, later in zip(told, told[1:], strict=False))


def test_the_fewest_nodes_that_serve_nearly_all_are_wanted() -> None:
    """3.8 prefill nodes would serve all of it, and there are two."""
    run = Cluster(*four_nodes(), rebalancer=Rebalancer(GOALS, lends=False))
    wanted = wishes(run.play(Mix(3.0, [(1200, 4)]), 60.0))
    assert wanted[-1] == ("prefill", 2)


def test_a_wish_for_nodes_is_taken_back_when_the_overload_ends() -> None:
    run = Cluster(*four_nodes())
    run.play(Mix(6.0, [(1200, 4)]), 60.0)
    after = wishes(run.play(EVEN, 40.0))
    assert after[-1] == ("prefill", 0)
    assert wishes(run.play(EVEN, 20.0)) == []


def test_a_wish_for_one_side_gives_way_to_that_for_the_other() -> None:
    run = Cluster(*four_nodes())
    run.play(Mix(6.0, [(1200, 4)]), 20.0)
    told = wishes(run.play(Mix(8.0, [(32, 200)]), 40.0))
    first_decode = next(place for place, (role, _) in enumerate(told) if role == "decode")
    assert told[first_decode - 1] == ("prefill", 0)
    assert told[first_decode][1] > 0


def test_a_long_idle_cluster_could_do_with_fewer_nodes() -> None:
    run = Cluster(*four_nodes())
    assert run.play(IDLE, IDLE_S - TICK_S) == []
    assert wishes(run.play(IDLE, 2.0)) == [("decode", -1)]


def test_whether_fewer_nodes_would_do_is_played_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    plays = []

    class Counted(LookAhead):
        def __init__(self, *args: Any) -> None:
            plays.append(args)
            super().__init__(*args)

    monkeypatch.setattr(rebalance, "LookAhead", Counted)
    Cluster(*four_nodes(), rebalancer=Rebalancer(GOALS, lends=False)).play(EVEN, 3 * SCALE_EVERY_S)
    assert 1 <= len(plays) <= 3


@pytest.mark.parametrize(("num_nodes", "rate"), [(8, 200.0), (64, 200.0), (1000, 2000.0)])
def test_a_play_is_short_however_many_requests_and_nodes_there_are(
    num_nodes: int, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each slice of it is shorter: asks wait for that."""
    played, num_events = [], 0

    class Counted(LookAhead):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            played.append(self.num_played)

    def counting(work: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **changes: Any) -> Any:
            nonlocal num_events
            num_events += 1
            return work(*args, **changes)

        return counted

    monkeypatch.setattr(rebalance, "LookAhead", Counted)
    monkeypatch.setattr(lookahead, "Job", counting(lookahead.Job))
    for name in ("heappush", "heappop"):  # a sequence begins, and ends
        monkeypatch.setattr(heapq, name, counting(getattr(heapq, name)))
    demand, lengths = Demand(), {"f": OutputLengths()}
    for number in range(int(20 * rate)):
        demand.add_request(400, 0, 20, number / rate)
        demand.add_loss(number / rate)
    nodes = (prefill(f"p{n}") if n % 2 else decode(f"d{n}", running=100) for n in range(num_nodes))
    views = cluster(*nodes).views()
    num_events, most_events = 0, 0
    for _ in Rebalancer(GOALS).tick(views, {"f": demand}, lengths, 20.0):
        most_events, num_events = max(most_events, num_events), 0
    # Two parts of the work may share a slice.
    assert 0.5 * EVENTS_PER_SLICE < max(most_events, num_events) <= 2 * EVENTS_PER_SLICE
    # On at least four nodes, whatever comes.
    most = max(MAX_PLAYED, HORIZON_S * rate * LEAST_NODES / num_nodes)
    assert 0.5 * MAX_PLAYED < max(played) <= 1.1 * most


def test_two_nodes_are_never_too_many() -> None:
    run = Cluster(Node("p0", "prefill"), Node("d0", "decode"))
    assert run.play(IDLE, 2 * IDLE_S) == []


def leave_one(run: Cluster) -> None:
    del run.nodes[3], run.nodes[1]


def ask_for_much(run: Cluster) -> None:
    run.play(Mix(6.0, [(1200, 4)]), 10.0)


@pytest.mark.parametrize("change", [leave_one, ask_for_much])
def test_a_wish_for_fewer_nodes_is_taken_back_when_they_are_needed(change: Callable[[Cluster], None]) -> None:
    run = Cluster(*four_nodes())
    assert wishes(run.play(IDLE, IDLE_S + 2.0)) == [("decode", -1)]
    num_before = len(run.orders)
    change(run)
    run.play(IDLE, 2.0)
    assert wishes([order for _, order in run.orders[num_before:]])[0] == ("decode", 0)


# --- several models ----------------------------------------------------------------------------------


def test_models_do_not_disturb_each_other() -> None:
    """One is short of prefill nodes, the other idle: each is told what it is told alone."""
    alone = Cluster(*four_nodes())
    alone.play(LONG_PROMPTS, 60.0)
    others = [Node(f"o{one.name}", one.role, OTHER_MODEL) for one in four_nodes()]
    both = Cluster(*four_nodes(), *others)
    both.play_all({"f": LONG_PROMPTS, OTHER_MODEL.fingerprint: EVEN}, 60.0)
    moves = [
        [(at, order) for at, order in run.orders if isinstance(order, SetPrefillCap)] for run in (alone, both)
    ]
    assert moves[0] == moves[1]
    assert not [one for one in both.nodes if one.name[0] == "o" and one.budget != CAPS[one.role]]


def test_a_side_of_a_model_that_is_empty_gets_a_node_of_its_own() -> None:
    other = (
        node("o0", "decode", model=OTHER_MODEL, step=FIT),
        node("o1", "decode", model=OTHER_MODEL, step=FIT),
    )
    said = played(NUM_TICKS, prefill(), decode(), *other)
    assert [name for name, _ in budgets(said[-1])] == ["o0"]


def test_a_cluster_that_is_slower_than_its_goals_moves_nothing_in_vain() -> None:
    """No split serves anything in time: no move gains, and more nodes are of no use."""
    slow = StepFit(1.0, 1e-2, attended_token_s=0.0, sequence_s=0.1, context_token_s=0.0)
    demand, lengths = Demand(), {"f": OutputLengths()}
    nodes = [
        node(name, role, num_blocks=NUM_BLOCKS, step=slow)
        for name, role in (("p0", "prefill"), ("p1", "prefill"), ("d0", "decode"), ("d1", "decode"))
    ]
    rebalancer, orders = Rebalancer(Goals(ttft_s=0.5, itl_s=0.25)), list[Order]()
    for tick in range(60):
        now = TICK_S * tick
        demand.add_request(400, 0, 20, now)
        demand.add_loss(now)
        orders += at_once(rebalancer.tick(cluster(*nodes).views(), {"f": demand}, lengths, now))
    assert budgets(orders) == []


def test_each_model_has_a_regime_and_wishes_of_its_own() -> None:
    others = [Node(f"o{one.name}", one.role, OTHER_MODEL) for one in four_nodes()]
    run = Cluster(*four_nodes(), *others)
    run.play_all({"f": Mix(6.0, [(1200, 4)]), OTHER_MODEL.fingerprint: EVEN}, 60.0)
    told = [order for _, order in run.orders if isinstance(order, RegimeChanged | ScaleWanted)]
    assert {type(order) for order in told} == {RegimeChanged, ScaleWanted}
    assert {order.model for order in told} == {MODEL.name}
    assert run.rebalancer.regime == "overload"


def test_what_was_told_of_a_model_ends_with_its_nodes_and_it_is_forgotten() -> None:
    """Else a cluster whose models change would remember each of them for ever."""
    views = cluster(prefill(), decode()).views()
    demand, lengths = Demand(), {"f": OutputLengths()}
    rebalancer = Rebalancer(GOALS)
    rebalancer.set_descriptors(view.descriptor for view in views)
    for number in range(60):
        demand.add_request(1200, 0, 4, number / 6)
        demand.add_loss(number / 6)
    orders = list[Order]()
    for tick in range(2 * NUM_TICKS):
        orders += at_once(rebalancer.tick(views, {"f": demand}, lengths, 10.0 + TICK_S * tick))
    assert regimes(orders)[-1] == "overload"
    assert wishes(orders)
    rebalancer.set_descriptors([])
    last = [at_once(rebalancer.tick([], {}, {}, 20.0 + TICK_S * tick)) for tick in range(2 * NUM_TICKS)]
    ended = [order for orders in last for order in orders]
    assert (regimes(ended), wishes(ended)) == (["normal"], [(wishes(orders)[-1][0], 0)])
    assert {order.model for order in ended if isinstance(order, RegimeChanged | ScaleWanted)} == {MODEL.name}
    assert not rebalancer._pasts
