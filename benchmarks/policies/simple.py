"""The policies that everyone has: in turn, by chance, and the least loaded node of each side.

All choose among the pairs that FlowKV's policy would weigh: nodes that are usable, can exchange blocks and
have room. A function made here keeps its own place in the turn, so make one per cluster.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

from flowkv_common.wire.messages import ScheduleRequest
from flowkv_scheduler.index import group_of
from flowkv_scheduler.policy import Choice, Chooser
from flowkv_scheduler.state import ClusterState, NodeView
from flowkv_scheduler.weighing import Goals, Weighing

Pair = tuple[NodeView, NodeView]


def round_robin(seed: int = 0) -> Chooser:
    """One pair after the other; `seed` is the first place in the turn."""
    turn = itertools.count(seed)

    def choose(request: ScheduleRequest, state: ClusterState, goals: Goals, now: float) -> Choice | None:
        pairs = possible_pairs(Weighing(request, state, goals, now))
        if not pairs:
            return None
        return chosen(pairs[next(turn) % len(pairs)], f"its turn among {len(pairs)} pairs")

    return choose


def at_random(seed: int = 0) -> Chooser:
    """Any pair, all alike."""
    rng = random.Random(seed)

    def choose(request: ScheduleRequest, state: ClusterState, goals: Goals, now: float) -> Choice | None:
        pairs = possible_pairs(Weighing(request, state, goals, now))
        return chosen(rng.choice(pairs), f"drawn from {len(pairs)} pairs") if pairs else None

    return choose


def least_loaded(_: int = 0) -> Chooser:
    """The fewest queued prompt tokens at prefill, then the fewest sequences at decode; then by id."""

    def choose(request: ScheduleRequest, state: ClusterState, goals: Goals, now: float) -> Choice | None:
        pairs = possible_pairs(Weighing(request, state, goals, now))
        if not pairs:
            return None
        p, d = min(pairs, key=_load)
        return chosen((p, d), f"{p.num_queued_tokens} tokens queued, {d.num_sequences} sequences")

    return choose


# By the names of `--policy`. Each takes a seed.
SIMPLE: dict[str, Callable[[int], Chooser]] = {
    "round_robin": round_robin,
    "least_loaded": least_loaded,
    "random": at_random,
}


def possible_pairs(weighing: Weighing) -> list[Pair]:
    """All pairs that could take the request now, by id."""
    usable = sorted(weighing.state.usable(weighing.now), key=lambda node: node.node_id)
    return [
        (p, d)
        for p in usable
        for d in usable
        if p.may_prefill and weighing.takes_prompt(p)
        if d.may_decode and weighing.takes_sequence(d) and weighing.has_place(d)
        if group_of(p) == group_of(d)
    ]


def chosen(pair: Pair, reason: str) -> Choice:
    """A choice that predicts nothing."""
    return Choice(
        prefill=pair[0],
        decode=pair[1],
        predicted_s=0.0,
        wait_s=0.0,
        first_token_s=0.0,
        num_cached_tokens=0,
        reason=reason,
        prefill_candidates=[],
        decode_candidates=[],
    )


def _load(pair: Pair) -> tuple[int, int, str, str]:
    p, d = pair
    return p.num_queued_tokens, d.num_sequences, p.node_id, d.node_id
