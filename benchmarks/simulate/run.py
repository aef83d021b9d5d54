"""One simulation: a cluster, a policy, and the requests; and what came out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.policies.baselines import BASELINES
from benchmarks.simulate.cluster import Cluster
from benchmarks.simulate.histogram import Histogram
from benchmarks.simulate.judge import Judge
from benchmarks.simulate.life import Life
from benchmarks.simulate.node import SimNode
from benchmarks.simulate.presets import NodeKind
from benchmarks.simulate.targets import Targets
from benchmarks.traces import Request
from flowkv_scheduler.planner import Planner
from flowkv_scheduler.policy import Goals
from flowkv_scheduler.rebalance import MoveCap

SLOW_FACTOR = 3.0
# Who would wait longer than this part of the target is refused: with its prefill it would miss it.
WAIT_SHARE = 0.6
# Of the simulated time, between two looks at it.
NUM_SAMPLES = 200


class Machines(NamedTuple):
    """The nodes of a cluster. `slow_half`: every second node takes three times as long for everything.

    `decode_kind`: what decode nodes are, if not of the same `kind`; both must have one layout.
    """

    kind: NodeKind
    num_nodes: int
    slow_half: bool = False
    fit_noise: float = 0.0
    decode_kind: NodeKind | None = None

    def nodes(self, num_prefill: int, itl: Histogram) -> list[SimNode]:
        return [
            SimNode(
                index,
                self.kind if index < num_prefill else self.decode_kind or self.kind,
                "prefill" if index < num_prefill else "decode",
                itl,
                slow=SLOW_FACTOR if self.slow_half and index % 2 else 1.0,
                fit_noise=self.fit_noise,
            )
            for index in range(self.num_nodes)
        ]


@dataclass
class Outcome:
    """All that a run gave. `wall_s` is real time, everything else is a function of the input."""

    policy: str
    num_prefill: int
    targets: Targets
    lives: list[Life]
    itl: Histogram
    nodes: list[SimNode]
    span_s: float = 0.0  # simulated, to the end of the last request
    num_good: int = 0  # requests that met both targets
    has_failed: bool = False  # ended early
    num_lendings: int = 0
    num_events: int = 0
    wall_s: float = 0.0
    samples: list[Sample] = field(default_factory=list)


class Sample(NamedTuple):
    """The cluster at one moment."""

    at_s: float
    caps: list[int]
    num_queued_tokens: int
    num_decoding: int


def make_planner(policy: str, targets: Targets, seed: int) -> Planner:
    """FlowKV's planner (`static`: without lending), or a baseline. Raises KeyError for an unknown name."""
    goals = Goals(ttft_s=targets.ttft_s, itl_s=targets.tpot_s, max_wait_s=WAIT_SHARE * targets.ttft_s)
    if policy in ("flowkv", "static"):
        return Planner(goals, lends=policy == "flowkv")
    return Planner(goals, lends=False, choose=BASELINES[policy](seed))


POLICIES = ("flowkv", "static", *BASELINES)


def simulate(
    machines: Machines,
    num_prefill: int,
    policy: str,
    requests: Sequence[Request],
    targets: Targets,
    seed: int = 0,
    max_bad: int | None = None,
) -> Outcome:
    """Run all requests to their ends on `num_prefill` prefill nodes and the rest as decode nodes.

    With `max_bad` a run ends early, with `has_failed`, when more requests than that have missed the targets.
    """
    began = time.perf_counter()
    itl = Histogram()
    lives = [Life(number, request) for number, request in enumerate(requests)]
    outcome = Outcome(policy, num_prefill, targets, lives, itl, machines.nodes(num_prefill, itl))
    watch = _sampler(outcome, every_s=max(1.0, requests[-1].arrival_s / NUM_SAMPLES))
    judge = Judge(targets, max_bad)
    planner = make_planner(policy, targets, seed)
    cluster = Cluster(outcome.nodes, planner, lives, judge, watch, planner.state.prefixes.apply)
    cluster.run()
    outcome.has_failed = judge.has_failed
    outcome.num_good = len(lives) - judge.num_bad
    outcome.span_s = cluster.now
    outcome.num_events = cluster.num_events
    outcome.num_lendings = sum(isinstance(order, MoveCap) for _, order in cluster.orders)
    outcome.wall_s = time.perf_counter() - began
    return outcome


def best_static(
    machines: Machines,
    requests: Sequence[Request],
    targets: Targets,
    seed: int = 0,
    likely: int | None = None,
) -> Outcome:
    """Of all splits without lending the one with the most good requests.

    Those around `likely` prefill nodes are tried first: the others give up once they are worse.
    """
    splits = splits_around(machines.num_nodes, likely or machines.num_nodes // 2)
    best = simulate(machines, splits[0], "static", requests, targets, seed)
    for num_prefill in splits[1:]:
        max_bad = len(requests) - best.num_good - 1
        outcome = simulate(machines, num_prefill, "static", requests, targets, seed, max_bad)
        if not outcome.has_failed:
            best = outcome
    return best


def splits_around(num_nodes: int, likely: int) -> list[int]:
    """Numbers of prefill nodes that leave one for each side, the likely ones first."""
    return sorted(range(1, num_nodes), key=lambda num_prefill: (abs(num_prefill - likely), num_prefill))


def _sampler(outcome: Outcome, every_s: float) -> Callable[[float], None]:
    def watch(now: float) -> None:
        if outcome.samples and now < outcome.samples[-1].at_s + every_s:
            return
        batches = [node.batch for node in outcome.nodes]
        outcome.samples.append(
            Sample(
                now,
                [batch.cap for batch in batches],
                sum(node.num_queued_tokens(now) for node in outcome.nodes),
                sum(batch.num_decoding for batch in batches),
            )
        )

    return watch
