"""Whole simulated clusters: one request by hand, many by what must hold for all of them."""

from __future__ import annotations

import heapq
import random
from collections.abc import Mapping
from functools import partial

import msgspec
import pytest

from benchmarks.baselines import POLICIES
from benchmarks.simulator.batch import Batch, Histogram, Life, step_s
from benchmarks.simulator.cluster import CONTROL_S, Cluster
from benchmarks.simulator.kinds import KINDS, NodeKind
from benchmarks.simulator.node import SimNode
from benchmarks.simulator.pool import Pool
from benchmarks.simulator.run import Machines, Outcome, figures, simulate
from benchmarks.traffic import synthetic
from flowkv.bench.traces import Request, Targets
from flowkv_common.wire.messages import PoolLayout, ScheduleRequest
from flowkv_common.wire.nodes import (
    PRIOR_TOKENS,
    BlocksChanged,
    LoadReport,
    NodeDescriptor,
    SetPrefillCap,
    StepFit,
    num_attended,
)
from flowkv_scheduler.cluster import Goals
from flowkv_scheduler.planner import Planner
from flowkv_scheduler.policy import Choice
from flowkv_scheduler.rebalance import Order
from flowkv_scheduler.slices import Sliced

# A token takes 1 KiB.
LAYOUT = PoolLayout(num_layers=2, block_size=64, num_kv_heads=4, head_dim=32, dtype="bfloat16")
FIT = StepFit(base_s=0.01, prefill_token_s=1e-4, attended_token_s=1e-8, sequence_s=1e-3, context_token_s=1e-7)
KIND = NodeKind(
    name="by-hand",
    fit=FIT,
    layout=LAYOUT,
    num_blocks=1000,
    token_budget=1024,
    max_num_seqs=8,
    max_model_len=32_768,
    connector="tcp",
    link_bytes_per_s=1024e4,
    link_latency_s=0.005,
)
LOOSE = Targets(10.0, 1.0)


class Listener(Planner):
    """Keeps what it hears."""

    def __init__(self, goals: Goals, *, lends: bool) -> None:
        super().__init__(goals, lends=lends)
        self.heard: list[tuple[float, LoadReport]] = []

    def add_report(self, report: LoadReport, now: float) -> None:
        self.heard.append((now, report))
        super().add_report(report, now)


def run(
    requests: list[Request], policy: str = "static", num_nodes: int = 4, *, slow_half: bool = False
) -> Outcome:
    return simulate(Machines(KIND, num_nodes, slow_half), num_nodes // 2, policy, requests, LOOSE, seed=1)


def test_one_request_takes_what_its_steps_and_its_handoff_take() -> None:
    (life,) = run([Request(1500, 11, (), 0.1)]).lives
    chunks = 0.01 + 0.1024 + 1e-8 * 1024 * 1025 / 2 + 0.01 + 0.0476 + 1e-8 * (476 * 1024 + 476 * 477 / 2)
    assert life.ttft_s == pytest.approx(CONTROL_S + chunks, rel=1e-9)
    # At 100 us per token the first chunk is still on its way when the second has been computed.
    first_chunk_s = 0.01 + 0.1024 + 1e-8 * 1024 * 1025 / 2
    sent_s = first_chunk_s + 0.1024 + 0.0476
    steps = sum(0.01 + 1e-3 + 1e-7 * (1501 + j) for j in range(10))
    assert life.tpot_s == pytest.approx((sent_s - chunks + 0.005 + steps) / 10, rel=1e-9)


def test_on_one_node_nothing_is_sent() -> None:
    machines = Machines(KIND, 1)
    (life,) = simulate(machines, 0, "static", [Request(64, 3)], LOOSE).lives
    # A decode node's cap: one block a step.
    assert life.ttft_s == pytest.approx(CONTROL_S + 0.01 + 64e-4 + 1e-8 * 64 * 65 / 2, rel=1e-9)
    assert life.tpot_s == pytest.approx(0.011 + 1e-7 * 65.5, rel=1e-9)


def test_a_cached_prefix_is_neither_computed_nor_sent() -> None:
    first, second = run([Request(1100, 2, (1, 2, 3)), Request(1100, 2, (1, 2, 4), 5.0)], num_nodes=2).lives
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 1024)
    assert second.ttft_s == pytest.approx(
        CONTROL_S + step_s(FIT, 76, 76 * 1024 + 76 * 77 // 2, 0, 0), rel=1e-9
    )
    assert second.tpot_s == pytest.approx(76e-4 / 76 * 76 + 0.005 + 0.011 + 1e-7 * 1101, rel=1e-9)


@pytest.mark.parametrize(("num_tokens", "num_cached"), [(1024, 960), (1100, 1088)])
def test_of_a_prompt_that_comes_again_only_the_end_is_computed(num_tokens: int, num_cached: int) -> None:
    prompt = Request(num_tokens, 2, (1, 2, 3))
    first, second = run([prompt, prompt._replace(arrival_s=5.0)], num_nodes=2).lives
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, num_cached)
    assert second.num_moved_tokens == num_tokens - num_cached


def test_a_prompt_that_is_being_computed_is_cached_as_far_as_it_is() -> None:
    prompt = Request(4096, 2, tuple(range(8)))
    first, second = run([prompt, prompt._replace(arrival_s=0.3)], num_nodes=2).lives
    two_chunks_s = sum(step_s(FIT, 1024, 1024 * done + 1024 * 1025 // 2, 0, 0) for done in (0, 1024))
    assert CONTROL_S + two_chunks_s < 0.3 < first.first_token_s
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 2048)


def busy_traffic(seed: int) -> list[Request]:
    """More than the nodes can hold, with prompts that only just fit, and answers of one token."""
    draw = random.Random(seed)
    requests = synthetic(60, seed)
    return [
        request._replace(
            arrival_s=request.arrival_s / 40, num_output_tokens=draw.choice([1, 2, request.num_output_tokens])
        )
        for request in requests
    ]


def check_all_is_back(nodes: list[SimNode], lives: list[Life], itl: Histogram) -> None:
    """Each request has ended in one way, and nobody holds anything any more."""
    assert all((life.last_token_s > 0) != (life.refused_with > 0) for life in lives)
    assert sum(life.is_done for life in lives) > 20
    for node in nodes:
        batch = node.batch
        assert node.pool.num_free + node.pool.num_cached == node.pool.num_blocks
        assert not node.line
        assert (node.num_sending, node.sending_tokens) == (0, 0)
        assert (len(batch.prompts), len(batch.waiting), batch.num_decoding) == (0, 0, 0)
        assert (batch.num_context, batch.num_grown, len(node.preempted)) == (0, 0, 0)
    assert itl.total() == sum(life.request.num_output_tokens - 1 for life in lives if life.is_done)


@pytest.mark.parametrize("policy", POLICIES)
def test_each_request_ends_once_and_all_blocks_come_back(policy: str) -> None:
    outcome = run(busy_traffic(3), policy, slow_half=True)
    check_all_is_back(outcome.nodes, outcome.lives, outcome.itl)


class Restless(Planner):
    """Lends nodes at random, to and fro, so that all of them send to all others."""

    def set_descriptors(self, descriptors: Mapping[str, NodeDescriptor]) -> None:
        super().set_descriptors(descriptors)
        self.refs = [descriptor.node for descriptor in descriptors.values()]

    def tick(self, now: float) -> Sliced[list[Order]]:
        yield
        draw = random.Random(now)
        return [
            SetPrefillCap(
                node=ref,
                epoch=0,
                max_prefill_tokens_per_step=draw.choice([64, 200, 1024]),
                reason="restless",
            )
            for ref in self.refs
        ]


@pytest.mark.parametrize("seed", range(4))
def test_nodes_that_change_sides_all_the_time_end_all_requests(seed: int) -> None:
    itl = Histogram()
    nodes = Machines(msgspec.structs.replace(KIND, num_blocks=400), 3).nodes(1, itl)
    lives = [Life(number, request) for number, request in enumerate(busy_traffic(seed))]
    cluster = Cluster(nodes, Restless(Goals()), lives, LOOSE)
    cluster.run()
    check_all_is_back(nodes, lives, itl)
    assert sum(isinstance(order, SetPrefillCap) for _, order in cluster.orders) > 3
    assert any(life.prefill == life.decode for life in lives)


@pytest.mark.parametrize("policy", ["flowkv", "two_choices"])
def test_the_same_input_gives_the_same_output(policy: str) -> None:
    one, other = (figures(run(busy_traffic(5), policy)) | {"wall_s": 0.0} for _ in range(2))
    assert one == other
    assert one != figures(run(busy_traffic(6), policy)) | {"wall_s": 0.0}


def test_a_hopeless_run_ends_early() -> None:
    machines, strict = Machines(KIND, 4), Targets(1e-3, 1e-3)
    outcome = simulate(machines, 2, "static", busy_traffic(3), strict, max_bad=5)
    assert outcome.has_failed
    assert sum(life.is_bad for life in outcome.lives) == 6
    assert not simulate(machines, 2, "static", busy_traffic(3), strict, max_bad=60).has_failed


def test_reports_tell_nothing_of_the_length_of_answers() -> None:
    """Two runs that differ only in how long the answer will be look alike while it runs."""
    seen = []
    for num_output in (200, 300):
        planner = Listener(Goals(), lends=False)
        lives = [Life(0, Request(500, num_output))]
        cluster = Cluster(Machines(KIND, 2).nodes(1, Histogram()), planner, lives, LOOSE)
        cluster.run()
        assert cluster.now > 2.1
        seen.append([report for at, report in planner.heard if at <= 2.0])
    assert seen[0] == seen[1]
    at_decode = [report for report in seen[0] if report.node.node_id == "node-0001"]
    leased = [report.blocks.leased for report in at_decode]
    assert leased == sorted(leased)  # as far as the answer has come
    assert (leased[0], leased[-1]) == (0, 10)
    assert [report.forecast.tokens_left > 0 for report in at_decode if report.forecast][-1]


def test_news_of_blocks_name_what_a_request_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(1100, 2, (1, 2, 3))
    heard: list[BlocksChanged] = []
    lives = [Life(0, request), Life(1, Request(1, 2, (), 9.0))]
    nodes = Machines(KIND, 2).nodes(1, Histogram())
    planner = Planner(Goals(), lends=False)
    monkeypatch.setattr(planner.state.prefixes, "apply_change", heard.append)
    Cluster(nodes, planner, lives, LOOSE).run()
    assert {news.node.node_id for news in heard} == {node.ref.node_id for node in nodes}
    assert [(news.seq, news.removed) for news in heard] == [(1, []), (1, [])]
    full = request.block_hashes(LAYOUT.block_size)
    assert len(full) == 1100 // LAYOUT.block_size
    assert [news.stored for news in heard] == [full, full]


@pytest.mark.parametrize("name", KINDS)
def test_presets_are_nodes_that_can_serve(name: str) -> None:
    kind = KINDS[name]
    assert kind.num_blocks * kind.layout.block_size > 8192
    (life,) = simulate(Machines(kind, 2), 1, "static", [Request(1000, 10)], LOOSE).lives
    assert 0 < life.tpot_s < life.ttft_s < 3


def test_nodes_report_twice_a_second_by_their_own_clocks_and_when_they_accept() -> None:
    planner = Listener(Goals(), lends=False)
    lives = [Life(0, Request(500, 100, (), 1.1))]
    Cluster(Machines(KIND, 2).nodes(1, Histogram()), planner, lives, LOOSE).run()
    times: dict[str, list[float]] = {"node-0000": [], "node-0001": []}
    for at, report in planner.heard:
        times[report.node.node_id].append(at)
    prefill, decode = times.values()
    # One before all begins, then by the clock; 1 ms after the prompt came, and half a second after that.
    accepted_s = 1.1 + 2 * CONTROL_S
    assert prefill[:6] == pytest.approx([0, 0, 0.5, 1.0, accepted_s, accepted_s + 0.5])
    (landed_s,) = (life.first_token_s for life in lives)
    assert decode[:4] == pytest.approx([0, 0.25, 0.75, landed_s + 0.0547], abs=0.02)
    counted = [report.num_sequences_accepted for at, report in planner.heard if at > landed_s + 0.1]
    assert max(counted) == 1


def test_nodes_learn_what_steps_cost() -> None:
    """A decode node has computed no prompt: it does not know what one costs."""
    planner = Listener(Goals(), lends=False)
    lives = [Life(n, Request(500 + 100 * n, 100, (), 0.3 * n)) for n in range(20)]
    Cluster(Machines(KIND, 2).nodes(1, Histogram()), planner, lives, LOOSE).run()
    prefill, decode = (
        [r.step for _, r in planner.heard if r.node.node_id == name] for name in ("node-0000", "node-0001")
    )
    assert prefill[0] is None
    assert prefill[-1] is not None
    assert decode[-1] is not None
    assert prefill[-1].prefill_token_s == pytest.approx(FIT.prefill_token_s, rel=0.1)
    assert prefill[-1].sequence_s == decode[-1].prefill_token_s == 0
    assert decode[-1].base_s + decode[-1].sequence_s == pytest.approx(0.011, rel=0.05)


@pytest.mark.parametrize(("max_tokens", "mean_tokens"), [(100, PRIOR_TOKENS), (2048, 100)])
def test_answers_that_may_be_no_longer_tell_nothing_of_others(max_tokens: int, mean_tokens: int) -> None:
    """An answer of 100 tokens of 100 may have been cut short, one of 2048 has ended of itself."""
    planner = Listener(Goals(), lends=False)
    lives = [Life(n, Request(100, 100, (), 2.0 * n, max_tokens)) for n in range(30)]
    Cluster(Machines(KIND, 2).nodes(1, Histogram()), planner, lives, LOOSE).run()
    heard = [r for _, r in planner.heard if r.node.node_id == "node-0001"]
    forecasts = [report.forecast for report in heard if report.forecast]
    assert forecasts[-1].stop_rate == pytest.approx(1 / mean_tokens, rel=0.1)
    # What is expected of one that runs: all that it may have, or what others had.
    seen = [
        (r.num_context_tokens - 100, r.forecast.tokens_left) for r in heard if r.num_running and r.forecast
    ]
    assert len(seen) > 30
    for produced, left in seen:
        assert left == max_tokens - produced if max_tokens == 100 else left < 256
    produced, left = seen[-1]
    assert left == pytest.approx(100 - produced, abs=8)


# --- full pools -------------------------------------------------------------------------------------


class Fixed(Planner):
    """Prefill on the first node, decode on the last, whatever room they have."""

    def schedule(self, request: ScheduleRequest, now: float) -> Choice:
        nodes = sorted(self.state.usable(now), key=lambda node: node.node_id)
        return Choice(
            prefill=nodes[0],
            decode=nodes[-1],
            predicted_s=0.0,
            wait_s=0.0,
            first_token_s=0.0,
            prefill_s=0.0,
            num_cached_tokens=0,
            reason="fixed",
            prefill_candidates=[],
            decode_candidates=[],
        )


def run_on_small_pools(
    requests: list[Request], num_blocks: int, *, num_nodes: int = 2, slow_prefill: float = 1.0
) -> tuple[Cluster, list[Life]]:
    """All requests by the same nodes. Fails if they have not ended after an hour."""
    itl = Histogram()
    lives = [Life(number, request) for number, request in enumerate(requests)]
    kind = msgspec.structs.replace(KIND, num_blocks=num_blocks)
    nodes = [
        SimNode(index, kind, role, itl, slow)
        for index, (role, slow) in enumerate([("prefill", slow_prefill), ("decode", 1.0)][2 - num_nodes :])
    ]
    cluster = Cluster(nodes, Fixed(Goals()), lives, LOOSE)

    def give_up() -> None:
        pytest.fail("requests wait for ever")

    cluster._at(3600.0, give_up)
    cluster.run()
    for node in nodes:
        assert node.pool.num_free + node.pool.num_cached == node.pool.num_blocks
        assert (len(node.line), len(node.preempted), node.num_sending) == (0, 0, 0)
        assert (node.batch.num_context, node.batch.num_grown, len(node.batch.prompts)) == (0, 0, 0)
    assert itl.total() == sum(life.num_produced - 1 for life in lives)
    return cluster, lives


def test_the_newest_gives_way_and_ends_later_with_all_its_tokens() -> None:
    """Two of 7 blocks, and one for both to grow into: 64 tokens each, then the new one finds no room."""
    requests = [Request(400, 300), Request(400, 300, (), 0.1)]
    _, roomy = run_on_small_pools(requests, 1000)
    cluster, (old, new) = run_on_small_pools(requests, 15)
    assert cluster.num_preempted == 1
    assert [life.num_produced for life in (old, new)] == [300, 300]
    # The old one has the node to itself from then on. The new one waits for its end, and is computed again:
    # no token of it comes meanwhile, and its mean time per token says so.
    assert old.tpot_s < roomy[0].tpot_s
    assert old.ttft_s == roomy[0].ttft_s
    assert new.ttft_s == roomy[1].ttft_s
    alone_s = 0.011 + 1e-7 * 600  # of one step
    assert new.last_token_s - old.last_token_s > 200 * alone_s
    assert new.tpot_s * 299 == pytest.approx(new.last_token_s - new.first_token_s)
    assert new.tpot_s > 1.5 * roomy[1].tpot_s
    # One interval is the pause: what the old one had still to produce, and the prompt again.
    pause_s = cluster.nodes[1].batch._itl.quantile(1.0)
    assert 180 * alone_s < pause_s < old.last_token_s - old.first_token_s + 1.0


def test_a_node_with_room_preempts_nothing() -> None:
    cluster, lives = run_on_small_pools([Request(400, 300), Request(400, 300, (), 0.1)], 24)
    assert cluster.num_preempted == 0
    assert all(life.num_produced == 300 for life in lives)


@pytest.mark.parametrize("num_nodes", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_sequences_give_way_only_in_a_full_pool_and_the_newest_first(
    seed: int, num_nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    requests = [
        Request(draw.randint(1, 900), draw.randint(1, 400), (9 * n, 9 * n + 1), 0.2 * n) for n in range(40)
    ]
    preempted: list[Life] = []
    had_room: list[bool] = []
    grow, preempt = Pool.grow_to, Batch.preempt_newest

    def grow_watched(pool: Pool, num_tokens: int) -> bool:
        num_missing = num_tokens // LAYOUT.block_size - pool._num_grown
        had_room.append(grow(pool, num_tokens))
        assert had_room[-1] or num_missing > pool.num_free + pool.num_cached
        return had_room[-1]

    def preempt_watched(batch: Batch, now: float) -> Life:
        assert not had_room[-1]
        newest = max((life.joined_at_step, life.number) for _, _, life in batch._decoding)
        preempted.append(preempt(batch, now))
        assert (preempted[-1].joined_at_step, preempted[-1].number) == newest
        return preempted[-1]

    monkeypatch.setattr(Pool, "grow_to", grow_watched)
    monkeypatch.setattr(Batch, "preempt_newest", preempt_watched)
    cluster, lives = run_on_small_pools(requests, 40, num_nodes=num_nodes)
    assert len(preempted) == cluster.num_preempted > 3
    assert all(life.num_produced == life.request.num_output_tokens for life in lives)
    assert all(life.is_done for life in lives)


def test_a_preempted_sequence_comes_back_when_a_prompt_elsewhere_gives_its_room_back() -> None:
    """The idle node hears of it: nothing else happens there any more."""
    long, prompt = Request(400, 600), Request(800, 1, (), 2.35)
    cluster, lives = run_on_small_pools([long, prompt], 22, slow_prefill=20.0)
    assert cluster.num_preempted == 1
    assert [life.num_produced for life in lives] == [600, 1]


def test_a_sequence_that_outgrows_its_node_is_refused_as_nodes_do() -> None:
    cluster, (life, other) = run_on_small_pools([Request(400, 700), Request(400, 300, (), 20.0)], 16)
    assert cluster.num_preempted == 1
    assert (life.refused_with, life.is_done) == (429, False)
    assert (other.refused_with, other.num_produced) == (0, 300)


def test_who_waits_for_a_node_hears_that_a_sequence_has_outgrown_it() -> None:
    _, (life, other) = run_on_small_pools([Request(400, 700), Request(900, 3, (), 1.0)], 16)
    assert (life.refused_with, other.num_produced) == (429, 3)


def test_no_newcomer_takes_the_block_into_which_a_sequence_grows() -> None:
    """The second fits beside the first, but the first would not any more."""
    cluster, (old, new) = run_on_small_pools([Request(400, 100), Request(500, 3, (), 0.1)], 15)
    assert cluster.num_preempted == 0
    assert old.num_produced == 100
    assert new.first_token_s > old.last_token_s
    _, (old, new) = run_on_small_pools([Request(400, 100), Request(500, 3, (), 0.1)], 16)
    assert new.last_token_s < old.last_token_s


@pytest.mark.parametrize("interruptible_until_s", [0.0, 60.0])
def test_a_prompt_that_is_due_first_interrupts_one_that_is_due_later(interruptible_until_s: float) -> None:
    """At the next border of a step. The other goes on where it was; a late one shares no step with it."""

    def life(number: int, num_tokens: int, due_s: float, until_s: float = 0.0) -> Life:
        request = Request(num_tokens, 2, max_tokens=2)
        return Life(number, request, due_s=due_s, interruptible_until_s=until_s)

    late, soon = life(0, 10_000, 60.0, interruptible_until_s), life(1, 500, 1.0)
    node = SimNode(0, KIND, "mixed", Histogram(), chunk=1024)
    cluster = Cluster([node], Planner(Goals(), lends=False), [late, soon], LOOSE)
    for one in (late, soon):
        one.prefill = one.decode = 0
        cluster._at(0.05 * one.number, partial(cluster._accept, node, one))
    told, attended = list[tuple[int, int]](), list[tuple[int, int]]()
    while not late.first_token_s:
        cluster.now, _, what = heapq.heappop(cluster._events)
        what()
        report = node.report(cluster.now)
        told.append((report.queued_prefill_tokens, report.interruptible_prefill_tokens))
        attended.append((report.queued_attended, report.interruptible_attended))
    # Behind the step that runs when it comes, and its own; each takes 0.11 s, and the late one ten.
    is_late = interruptible_until_s > 0.0
    assert 0.0 < soon.first_token_s < (0.19 if is_late else 0.4) < 1.0 < late.first_token_s
    assert told[0] == (10_000, 10_000 * is_late)
    assert (10_500, 10_000 * is_late) in told
    both = num_attended(10_000) + num_attended(500)
    assert attended[0] == (num_attended(10_000), num_attended(10_000) * is_late)
    assert (both, num_attended(10_000) * is_late) in attended
    left = num_attended(10_000 - 1024, num_cached=1024)
    assert {(left, left * is_late), (left + num_attended(500), left * is_late)} & set(attended)
    assert told[-1] == attended[-1] == (0, 0)
