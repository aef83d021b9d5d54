"""The policies that everyone has: in turn, by chance, and the least loaded node of each side.

All choose among the pairs that FlowKV's policy would weigh: nodes that are usable, can exchange blocks and
have room. A function made here keeps its own place in the turn, so make one per cluster.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

from flowkv_common.wire.messages import ScheduleRequest
from flowkv_scheduler import policy
from flowkv_scheduler.planner import Chooser, Goals
from flowkv_scheduler.policy import Choice
from flowkv_scheduler.state import ClusterState, NodeView

Pair = tuple[NodeView, NodeView]


def round_robin(seed: int = 0) -> Chooser:
    """One pair after the other; `seed` is the first place in the turn."""
    turn = itertools.count(seed)

    def choose(request: ScheduleRequest, state: ClusterState, _: Goals, now: float) -> Choice | None:
        pairs = possible_pairs(request, state.views(now))
        if not pairs:
            return None
        return chosen(pairs[next(turn) % len(pairs)], f"its turn among {len(pairs)} pairs")

    return choose


def at_random(seed: int = 0) -> Chooser:
    """Any pair, all alike."""
    rng = random.Random(seed)

    def choose(request: ScheduleRequest, state: ClusterState, _: Goals, now: float) -> Choice | None:
        pairs = possible_pairs(request, state.views(now))
        return chosen(rng.choice(pairs), f"drawn from {len(pairs)} pairs") if pairs else None

    return choose


def least_loaded(_: int = 0) -> Chooser:
    """The fewest queued prompt tokens at prefill, then the fewest sequences at decode; then by id."""

    def choose(request: ScheduleRequest, state: ClusterState, _: Goals, now: float) -> Choice | None:
        pairs = possible_pairs(request, state.views(now))
        if not pairs:
            return None
        p, d = min(pairs, key=_load)
        return chosen((p, d), f"{num_queued(p)} tokens queued, {num_sequences(d)} sequences")

    return choose


# By the names of `--policy`. Each takes a seed.
SIMPLE: dict[str, Callable[[int], Chooser]] = {
    "round_robin": round_robin,
    "least_loaded": least_loaded,
    "random": at_random,
}


def possible_pairs(request: ScheduleRequest, nodes: list[NodeView]) -> list[Pair]:
    """All pairs that could take the request now, by id."""
    sides = policy.split(request, nodes)
    return [
        (p, d)
        for p in sides.prefill
        for d in sides.decode
        if policy.can_pair(p, d) and policy.has_room(request, d)
    ]


def chosen(pair: Pair, reason: str) -> Choice:
    """A choice that predicts nothing."""
    return Choice(
        prefill=pair[0],
        decode=pair[1],
        predicted_s=0.0,
        wait_s=0.0,
        reason=reason,
        prefill_candidates=[],
        decode_candidates=[],
    )


def num_queued(node: NodeView) -> int:
    return node.report.queued_prefill_tokens + node.given.prefill_tokens


def num_sequences(node: NodeView) -> int:
    return node.report.num_running + node.report.num_waiting + node.given.num_sequences


def _load(pair: Pair) -> tuple[int, int, str, str]:
    p, d = pair
    return num_queued(p), num_sequences(d), p.node_id, d.node_id
