"""One simulation and searches over many: the best split, the highest rate, and the figures of a run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks import BenchmarkFailed
from benchmarks.baselines import ONE_NODE, POLICIES, make_planner
from benchmarks.report import Quantiles, quantiles
from benchmarks.simulator.batch import Histogram, Life
from benchmarks.simulator.cluster import Cluster
from benchmarks.simulator.kinds import NodeKind
from benchmarks.simulator.node import SimNode
from flowkv.bench.traces import Request, Targets, at_rate
from flowkv_common.wire.nodes import SetPrefillCap
from flowkv_scheduler.cluster import Goals

SLOW_FACTOR = 3.0
# Of all requests, so many have to meet both targets.
GOOD_SHARE = 0.9
# Of the search for a capacity: the relative width of the bracket at the end; the requests per second and node
# at which it begins and gives up. Requests too few to queue are carried at any rate.
PRECISION = 0.03
FIRST_RATE = 0.1
LEAST_RATE = 0.001
MOST_RATE = 100.0

# With hindsight: the best static split; all nodes mixed, the best chunk budget of these.
BEST_STATIC, MIXED = "best_static", "mixed"
ALL_POLICIES = (*POLICIES, BEST_STATIC, MIXED)
CHUNKS = (512, 256, 1024, 128, 2048, 64)


class Machines(NamedTuple):
    """The nodes of a cluster. `slow_half`: every second node takes three times as long for everything.

    `decode_kind`: what decode nodes are, if not of the same `kind`; both must have one layout.
    `mixed_chunk`: not 0, all nodes serve both roles, with this prefill chunk budget.
    """

    kind: NodeKind
    num_nodes: int
    slow_half: bool = False
    decode_kind: NodeKind | None = None
    mixed_chunk: int = 0

    def nodes(self, num_prefill: int, itl: Histogram) -> list[SimNode]:
        nodes = []
        for index in range(self.num_nodes):
            kind = self.kind if index < num_prefill else self.decode_kind or self.kind
            role = "mixed" if self.mixed_chunk else "prefill" if index < num_prefill else "decode"
            slow = SLOW_FACTOR if self.slow_half and index % 2 else 1.0
            nodes.append(SimNode(index, kind, role, itl, slow, self.mixed_chunk))
        return nodes


@dataclass
class Outcome:
    """All that a run gave. `wall_s` is real time, everything else is a function of the input."""

    policy: str
    machines: Machines
    num_prefill: int
    lives: list[Life]
    itl: Histogram
    nodes: list[SimNode]
    span_s: float  # simulated, to the end of the last request
    num_good: int  # requests that met both targets
    has_failed: bool  # ended early
    num_lendings: int
    wall_s: float

    @property
    def good_share(self) -> float:
        return self.num_good / len(self.lives)


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
    goals = Goals(ttft_s=targets.ttft_s, itl_s=targets.tpot_s)
    planner = make_planner(policy, goals, seed)
    cluster = Cluster(machines.nodes(num_prefill, itl), planner, lives, targets, max_bad)
    cluster.run()
    return Outcome(
        policy=policy,
        machines=machines,
        num_prefill=num_prefill,
        lives=lives,
        itl=itl,
        nodes=list(cluster.nodes),
        span_s=cluster.now,
        num_good=len(lives) - cluster.num_bad,
        has_failed=cluster.has_failed,
        num_lendings=sum(isinstance(order, SetPrefillCap) for _, order in cluster.orders),
        wall_s=time.perf_counter() - began,
    )


def run_policy(
    policy: str,
    machines: Machines,
    num_prefill: int,
    requests: Sequence[Request],
    targets: Targets,
    seed: int,
    likely: int,
) -> Outcome:
    """One of `ALL_POLICIES`, from `num_prefill` prefill nodes on unless it is one with hindsight.

    The best static split is searched from `likely` prefill nodes on.
    """
    if policy == BEST_STATIC:
        return best_static(machines, requests, targets, seed, likely)
    if policy == MIXED:
        return best_mixed(machines, num_prefill, requests, targets, seed)
    return simulate(machines, num_prefill, policy, requests, targets, seed)


def splits_around(num_nodes: int, likely: int) -> list[int]:
    """Numbers of prefill nodes that leave one for each side, the likely ones first."""
    return sorted(range(1, num_nodes), key=lambda num_prefill: (abs(num_prefill - likely), num_prefill))


def best_static(
    machines: Machines, requests: Sequence[Request], targets: Targets, seed: int = 0, likely: int = 0
) -> Outcome:
    """Of all splits without lending the one with the most good requests.

    Those around `likely` prefill nodes (0: half) are tried first: the others give up once they are worse.
    """
    splits = splits_around(machines.num_nodes, likely or machines.num_nodes // 2)
    trials = [(machines, num_prefill, "static") for num_prefill in splits]
    return _best_of(BEST_STATIC, trials, requests, targets, seed)


def best_mixed(
    machines: Machines, num_prefill: int, requests: Sequence[Request], targets: Targets, seed: int = 0
) -> Outcome:
    """All nodes mixed: of all chunk budgets the one with the most good requests.

    Requests are paired as FlowKV does, so a prompt may be computed elsewhere; or stay on one node. As many
    nodes as `num_prefill` are of the first kind.
    """
    budgets = [chunk for chunk in CHUNKS if chunk < machines.kind.token_budget]
    mixed = [machines._replace(mixed_chunk=chunk) for chunk in budgets]
    trials = [(nodes, num_prefill, policy) for nodes in mixed for policy in ("static", ONE_NODE)]
    return _best_of(MIXED, trials, requests, targets, seed)


def _best_of(
    name: str,
    trials: Sequence[tuple[Machines, int, str]],
    requests: Sequence[Request],
    targets: Targets,
    seed: int,
) -> Outcome:
    """The run with the most good requests. All but the first give up once they are worse than the best."""
    best: Outcome | None = None
    for machines, num_prefill, policy in trials:
        max_bad = len(requests) - best.num_good - 1 if best else None
        outcome = simulate(machines, num_prefill, policy, requests, targets, seed, max_bad)
        if not outcome.has_failed:
            best = outcome
    assert best is not None, "the first run has no limit"
    best.policy = name
    return best


class Capacity(NamedTuple):
    """Requests per second, and the number of prefill nodes in the split that carries them."""

    rate: float
    num_prefill: int


def capacity(
    machines: Machines,
    requests: Sequence[Request],
    targets: Targets,
    seed: int = 0,
    policy: str = "static",
    splits: Sequence[int] = (),
) -> Capacity:
    """By bisection the highest rate that one of `splits` carries: numbers of prefill nodes; without, all.

    The rate is 0 when even a crawl misses the targets.
    """
    best = Capacity(0.0, machines.num_nodes // 2)
    too_much: float | None = None
    rate = FIRST_RATE * machines.num_nodes
    while LEAST_RATE < rate / machines.num_nodes < MOST_RATE:
        if too_much is not None and too_much - best.rate <= PRECISION * too_much:
            break
        timed = at_rate(requests, rate, seed)
        tried = splits or splits_around(machines.num_nodes, best.num_prefill)
        found = carrying_split(machines, tried, timed, targets, seed, policy)
        if found is None:
            too_much = rate
        else:
            best = Capacity(rate, found)
        rate = 2 * rate if too_much is None else (best.rate + too_much) / 2
    return best


def carried_by(machines: Machines, requests: Sequence[Request], targets: Targets, seed: int) -> Capacity:
    """The capacity, to load the machines with a share of it. Raises BenchmarkFailed if there is none."""
    carried = capacity(machines, requests, targets, seed)
    if not carried.rate:
        raise BenchmarkFailed("no split keeps the targets at any rate: there is nothing to take a share of")
    return carried


def carrying_split(
    machines: Machines,
    splits: Sequence[int],
    requests: Sequence[Request],
    targets: Targets,
    seed: int,
    policy: str = "static",
) -> int | None:
    """The first of the splits, as numbers of prefill nodes, that keeps the targets."""
    max_bad = int((1 - GOOD_SHARE) * len(requests))
    for num_prefill in splits:
        if not simulate(machines, num_prefill, policy, requests, targets, seed, max_bad).has_failed:
            return num_prefill
    return None


def figures(outcome: Outcome) -> dict[str, Any]:
    """One run in numbers.

    Good requests met both targets; goodput is those per second of arrivals; utilisation is by the role that a
    node was started as.
    """
    lives = outcome.lives
    done = [life for life in lives if life.is_done]
    num_prompt_tokens = sum(life.request.num_prompt_tokens for life in done)
    refusals = Counter(str(life.refused_with) for life in lives if life.refused_with)
    return {
        "policy": outcome.policy,
        "split": (
            f"chunks of {outcome.machines.mixed_chunk}"
            if outcome.machines.mixed_chunk
            else f"{outcome.num_prefill}P:{len(outcome.nodes) - outcome.num_prefill}D"
        ),
        "num_requests": len(lives),
        "num_good": outcome.num_good,
        "good_share": outcome.good_share,
        "goodput": outcome.num_good / max(lives[-1].request.arrival_s, 1e-9),
        "ttft_s": quantiles([life.ttft_s for life in done]),
        "tpot_s": quantiles([life.tpot_s for life in done if life.request.num_output_tokens > 1]),
        "itl_s": Quantiles(outcome.itl.total(), *map(outcome.itl.quantile, (0.5, 0.9, 0.99, 1.0))),
        "total_s": quantiles([life.last_token_s - life.request.arrival_s for life in done]),
        "prefill_utilisation": _utilisation(outcome, "prefill"),
        "decode_utilisation": _utilisation(outcome, "decode"),
        "cached_share": sum(life.num_cached_tokens for life in done) / max(1, num_prompt_tokens),
        "num_lendings": outcome.num_lendings,
        "num_waits": sum(life.num_waits for life in lives),
        "num_refused": refusals.total(),
        "refusals": dict(refusals),
        "simulated_s": outcome.span_s,
        "wall_s": outcome.wall_s,
    }


def _utilisation(outcome: Outcome, role: str) -> float:
    nodes = [node for node in outcome.nodes if node.role == role]
    busy_s = sum(node.batch.busy_s for node in nodes)
    return busy_s / (len(nodes) * outcome.span_s) if nodes and outcome.span_s else 0.0
