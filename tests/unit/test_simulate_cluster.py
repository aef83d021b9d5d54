"""Whole simulated clusters: one request by hand, many by what must hold for all of them."""

from __future__ import annotations

import random
from collections.abc import Mapping

import msgspec
import pytest

from benchmarks.baselines import POLICIES
from benchmarks.simulator.batch import Histogram, Life, step_s
from benchmarks.simulator.cluster import CONTROL_S, Cluster
from benchmarks.simulator.kinds import KINDS, NodeKind
from benchmarks.simulator.node import SimNode
from benchmarks.simulator.run import Machines, Outcome, figures, simulate
from benchmarks.traces import Request, Targets
from benchmarks.traffic import synthetic
from flowkv_common.wire.messages import PoolLayout
from flowkv_common.wire.nodes import BlocksChanged, LoadReport, NodeDescriptor, SetPrefillCap, StepFit
from flowkv_scheduler.cluster import Goals
from flowkv_scheduler.planner import Planner
from flowkv_scheduler.rebalance import Order

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
        assert (batch.num_context, batch.num_early_blocks) == (0, 0)
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

    def tick(self, now: float) -> list[Order]:
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
    full = request.block_hashes(LAYOUT.block_size)[: 1024 // LAYOUT.block_size]
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


@pytest.mark.parametrize(("max_tokens", "stop_rate"), [(100, 0.0), (2048, 1 / 100)])
def test_answers_as_long_as_asked_for_end_by_no_stop(max_tokens: int, stop_rate: float) -> None:
    planner = Listener(Goals(), lends=False)
    lives = [Life(n, Request(100, 100, (), 2.0 * n, max_tokens)) for n in range(30)]
    Cluster(Machines(KIND, 2).nodes(1, Histogram()), planner, lives, LOOSE).run()
    forecasts = [r.forecast for _, r in planner.heard if r.node.node_id == "node-0001" and r.forecast]
    assert forecasts[-1].stop_rate == pytest.approx(stop_rate, rel=0.1, abs=1e-3)
    assert max(forecast.tokens_left for forecast in forecasts) < max_tokens
