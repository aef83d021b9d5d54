"""What a scheduling decision costs: `python -m benchmarks.decisions --json FILE`.

One planner, fed with the reports of many nodes and asked for pairs, as the scheduler's process does it, but
without NATS. Half of the nodes prefill, half decode; a third of each is three times slower. Requests end
after a while, so that a steady number of them is in flight. Nodes tell what is in their prefix caches.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.result import write_result
from flowkv_common.errors import Full
from flowkv_common.wire.messages import ModelCard, NodeRef, PoolLayout, ScheduleRequest, Wait
from flowkv_common.wire.nodes import BlockCounts, BlocksChanged, LoadReport, NodeDescriptor, StepFit
from flowkv_scheduler.planner import Planner
from flowkv_scheduler.policy import Choice, Goals

PERIOD_S = 0.5
NUM_BLOCKS = 20_000
TOKEN_BUDGET = 2048
PROMPTS_CACHED = 10  # by each node: the last ones
LAYOUT = PoolLayout(num_layers=32, block_size=16, num_kv_heads=8, head_dim=128, dtype="bfloat16")
CARD = ModelCard(name="m", fingerprint="f", max_model_len=131072, vocab_size=128256, eos_token_ids=[2])


class Timed(NamedTuple):
    """What was measured, in microseconds where nothing else is said."""

    num_nodes: int
    num_in_flight: int
    num_decisions: int
    decisions_per_s: float
    decision_p50_us: float
    decision_p99_us: float
    decision_max_us: float
    report_p50_us: float
    news_p50_us: float
    tick_ms: float
    rss_mb_before: float
    rss_mb_after: float
    num_waits_and_refusals: int


class Cache:
    """The prefix cache of one node, and what of it has changed since it was asked."""

    def __init__(self) -> None:
        self._prompts: deque[list[str]] = deque()
        self._uses: Counter[str] = Counter()
        self._touched: set[str] = set()
        self._seq = 0

    def add(self, hashes: list[str]) -> None:
        self._take(hashes, 1)
        self._prompts.append(hashes)
        if len(self._prompts) > PROMPTS_CACHED:
            self._take(self._prompts.popleft(), -1)

    def news(self, node_id: str) -> BlocksChanged:
        stored = [block_hash for block_hash in self._touched if self._uses[block_hash]]
        removed = [block_hash for block_hash in self._touched if not self._uses[block_hash]]
        for block_hash in removed:
            del self._uses[block_hash]
        self._touched.clear()
        self._seq += 1
        ref = NodeRef(node_id=node_id, incarnation="i")
        return BlocksChanged(node=ref, seq=self._seq, stored=stored, removed=removed)

    def _take(self, hashes: list[str], sign: int) -> None:
        for block_hash in hashes:
            self._uses[block_hash] += sign
        self._touched.update(hashes)


class Nodes:
    """What the nodes would report: counts of what they were given and have not finished."""

    def __init__(self, num_nodes: int) -> None:
        self.ids = [f"node-{number:04}" for number in range(num_nodes)]
        self.tokens = dict.fromkeys(self.ids, 0)
        self.sequences = dict.fromkeys(self.ids, 0)
        self.prompts = dict.fromkeys(self.ids, 0)
        self.handed_over = dict.fromkeys(self.ids, 0)
        self.caches = {node_id: Cache() for node_id in self.ids}
        self._seq = 0

    def descriptors(self) -> dict[str, NodeDescriptor]:
        return {node_id: _descriptor(node_id, _role(number)) for number, node_id in enumerate(self.ids)}

    def report(self, number: int) -> LoadReport:
        node_id = self.ids[number]
        self._seq += 1
        used = self.sequences[node_id] * 70
        return LoadReport(
            node=NodeRef(node_id=node_id, incarnation="i"),
            seq=self._seq,
            period_s=PERIOD_S,
            ready=True,
            draining=False,
            max_prefill_tokens_per_step=TOKEN_BUDGET if _role(number) == "prefill" else 16,
            queued_prefill_tokens=self.tokens[node_id],
            num_waiting=0,
            num_running=self.sequences[node_id],
            max_num_seqs=256,
            blocks=BlockCounts(
                total=NUM_BLOCKS,
                free=NUM_BLOCKS - used,
                cached=0,
                leased=used,
                quarantined=0,
                longest_free_run=NUM_BLOCKS - used,
            ),
            prefill_tokens_per_s=20_000.0,
            decode_step_s=0.01,
            num_handoffs=0,
            handoff_bytes=0,
            num_context_tokens=self.sequences[node_id] * 1100,
            num_prompts_accepted=self.prompts[node_id],
            num_rooms_given=self.handed_over[node_id],
            num_sequences_accepted=self.handed_over[node_id],
            step=_fit(1.0 if number % 3 else 3.0),
        )


def _role(number: int) -> str:
    return "decode" if number % 2 else "prefill"


def _descriptor(node_id: str, role: str) -> NodeDescriptor:
    return NodeDescriptor(
        node=NodeRef(node_id=node_id, incarnation="i"),
        role=role,
        model=CARD,
        layout=LAYOUT,
        num_blocks=NUM_BLOCKS,
        token_budget=TOKEN_BUDGET,
        max_prefill_tokens_per_step=TOKEN_BUDGET if role == "prefill" else 16,
        hosted_roles=["decode", "prefill"],
        connectors=["tcp"],
        host="h",
        pid=1,
        metrics_url="",
        version="0",
    )


def _fit(slower: float) -> StepFit:
    return StepFit(
        base_s=0.008 * slower,
        prefill_token_s=4e-5 * slower,
        attended_token_s=1e-9 * slower,
        sequence_s=2e-5 * slower,
        context_token_s=1e-8 * slower,
    )


def requests(seed: int) -> Iterator[ScheduleRequest]:
    """Prompts of about 1,000 tokens; every second one begins like one of 200 others."""
    draw = random.Random(seed)
    number = 0
    while True:
        number += 1
        num_tokens = max(16, round(draw.lognormvariate(6.9, 0.8)))
        chain = draw.randrange(200) if draw.random() < 0.5 else 1000 + number
        hashes = [f"{chain:08x}{place:08x}" * 2 for place in range(num_tokens // 16)]
        yield ScheduleRequest(
            request_id=f"r{number}",
            attempt=0,
            fingerprint=CARD.fingerprint,
            num_prompt_tokens=num_tokens,
            max_new_tokens=300,
            block_hashes=hashes,
        )


def measure(num_nodes: int, num_in_flight: int, num_decisions: int) -> Timed:
    """Asks `num_decisions` times, 5,000 a second; reports come in between as they would in that time."""
    planner, nodes = Planner(Goals(max_wait_s=1e9)), Nodes(num_nodes)
    planner.set_descriptors(nodes.descriptors())
    for number in range(num_nodes):
        planner.add_report(nodes.report(number), 0.0)
    running: deque[str] = deque()  # decode nodes; the scheduler keeps no choices either
    decisions, reports, news, ticks = [], [], [], []
    num_others, due, now = 0, 0.0, 0.0
    memory_before = 0.0
    for place, request in enumerate(requests(0)):
        if place == num_decisions:
            break
        if place == num_decisions // 10:
            memory_before = _rss_mb()
        now += 1 / 5000
        due += num_nodes / PERIOD_S / 5000
        while due >= 1:
            due -= 1
            report = nodes.report(len(reports) % num_nodes)
            reports.append(_timed(partial(planner.add_report, report, now)))
            changed = nodes.caches[report.node.node_id].news(report.node.node_id)
            news.append(_timed(partial(planner.state.prefixes.apply, changed)))
        if place % 2500 == 0:
            ticks.append(_timed(partial(planner.tick, now)))
        began = time.perf_counter()
        try:
            decision = planner.schedule(request, now)
        except Full:
            decision = Wait(retry_in_s=1.0, reason="refused")
        decisions.append(time.perf_counter() - began)
        if isinstance(decision, Choice):
            _begin(nodes, request, decision, running, num_in_flight)
        else:
            num_others += 1
        if len(reports) > 100_000:
            del reports[num_nodes * (50_000 // num_nodes) :], news[50_000:]
    decisions.sort()
    return Timed(
        num_nodes=num_nodes,
        num_in_flight=len(running),
        num_decisions=num_decisions,
        decisions_per_s=num_decisions / sum(decisions),
        decision_p50_us=decisions[len(decisions) // 2] * 1e6,
        decision_p99_us=decisions[len(decisions) * 99 // 100] * 1e6,
        decision_max_us=decisions[-1] * 1e6,
        report_p50_us=sorted(reports)[len(reports) // 2] * 1e6,
        news_p50_us=sorted(news)[len(news) // 2] * 1e6,
        tick_ms=sorted(ticks)[len(ticks) // 2] * 1e3,
        rss_mb_before=memory_before,
        rss_mb_after=_rss_mb(),
        num_waits_and_refusals=num_others,
    )


def _begin(
    nodes: Nodes, request: ScheduleRequest, choice: Choice, running: deque[str], num_in_flight: int
) -> None:
    """The nodes take it on; the oldest ends when there are enough."""
    for node_id in {choice.prefill.node_id, choice.decode.node_id}:
        nodes.caches[node_id].add(request.block_hashes)
    nodes.prompts[choice.prefill.node_id] += 1
    nodes.handed_over[choice.decode.node_id] += 1
    nodes.sequences[choice.decode.node_id] += 1
    running.append(choice.decode.node_id)
    if len(running) > num_in_flight:
        nodes.sequences[running.popleft()] -= 1


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _rss_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decisions", description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--nodes", type=int, nargs="+", default=[8, 100, 1000])
    parser.add_argument("--in-flight", type=int, default=10_000)
    parser.add_argument("--decisions", type=int, default=100_000)
    options = parser.parse_args(argv)
    rows = []
    for num_nodes in options.nodes:
        row = measure(num_nodes, options.in_flight, options.decisions)
        rows.append(row._asdict())
        print("  ".join(f"{name} {value:,.1f}" for name, value in row._asdict().items()), flush=True)
    write_result(options.json, "decisions", {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
