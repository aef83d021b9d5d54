"""What the load-aware scheduler is compared with: the same admission, no lending, another choice of nodes."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b

from flowkv_common.wire.messages import LoadReport, NodeDescriptor, ScheduleRequest, Wait
from flowkv_scheduler import admission, policy
from flowkv_scheduler.planner import Order
from flowkv_scheduler.policy import Choice
from flowkv_scheduler.state import ClusterState, NodeView

# One of the nodes of a side; `load` tells how much a node has to do on that side.
Load = Callable[[NodeView], float]
Pick = Callable[[ScheduleRequest, Sequence[NodeView], Load], NodeView]


def prefill_load(node: NodeView) -> float:
    """Prompt tokens in its queue, and those that it was given since it reported."""
    return node.report.queued_prefill_tokens + node.given.prefill_tokens


def decode_load(node: NodeView) -> float:
    """Sequences on it, and those that it was given since it reported."""
    return node.report.num_running + node.report.num_waiting + node.given.num_sequences


class Baseline:
    """A planner whose pairs come from `pick`, once for each side."""

    def __init__(self, pick_prefill: Pick, pick_decode: Pick) -> None:
        self._state = ClusterState()
        self._limits = admission.Limits()
        self._pick_prefill = pick_prefill
        self._pick_decode = pick_decode

    def set_descriptors(self, descriptors: Mapping[str, NodeDescriptor]) -> None:
        self._state.set_descriptors(descriptors)

    def add_report(self, report: LoadReport, now: float) -> None:
        self._state.add_report(report, now)

    def schedule(self, request: ScheduleRequest, now: float) -> Choice | Wait:
        """As `Planner.schedule`: its admission decides whether, this planner decides where."""
        views = self._state.views(now)
        decision = admission.decide(request, views, self._limits)
        if isinstance(decision, Wait):
            return decision
        sides = policy.split(request, views)
        with_room = [node for node in sides.decode if policy.has_room(request, node)]
        choice = decision._replace(
            prefill=self._pick_prefill(request, sides.prefill, prefill_load),
            decode=self._pick_decode(request, with_room, decode_load),
        )
        for_prefill, for_decode = policy.added_work(request, choice)
        self._state.add_work(choice.prefill.descriptor.node, for_prefill, now)
        self._state.add_work(choice.decode.descriptor.node, for_decode, now)
        return choice

    def tick(self, now: float) -> list[Order]:
        return []


def at_random(seed: int) -> Baseline:
    draw = random.Random(seed)

    def pick(request: ScheduleRequest, nodes: Sequence[NodeView], load: Load) -> NodeView:
        return draw.choice(nodes)

    return Baseline(pick, pick)


def round_robin(seed: int) -> Baseline:
    """In turn, each side for itself."""
    return Baseline(_in_turn(), _in_turn())


def least_loaded(seed: int) -> Baseline:
    """The node with the least to do: in tokens at prefill, in sequences at decode, as if all were alike."""
    return Baseline(_least, _least)


def two_choices(seed: int) -> Baseline:
    """The less loaded of two drawn at random (Mitzenmacher's power of two choices)."""
    draw = random.Random(seed)

    def pick(request: ScheduleRequest, nodes: Sequence[NodeView], load: Load) -> NodeView:
        return _least(request, draw.sample(nodes, min(2, len(nodes))), load)

    return Baseline(pick, pick)


def prefix_affinity(seed: int) -> Baseline:
    """Prompts with the same beginning go to the same prefill node, whatever it has to do; the least loaded
    decodes. Who has no hashes is spread by its id."""

    def pick(request: ScheduleRequest, nodes: Sequence[NodeView], load: Load) -> NodeView:
        # A service's system prompt shares the very first blocks: what lies a little behind tells users apart.
        place = min(AFFINITY_BLOCKS, len(request.block_hashes)) - 1
        key = request.block_hashes[place] if place >= 0 else request.request_id
        return max(nodes, key=lambda node: _draw_for(key, node.node_id))

    return Baseline(pick, _least)


# Affinity is by the hash of this block, which names all before it.
AFFINITY_BLOCKS = 32

BASELINES: dict[str, Callable[[int], Baseline]] = {
    "random": at_random,
    "round_robin": round_robin,
    "least_loaded": least_loaded,
    "two_choices": two_choices,
    "prefix_affinity": prefix_affinity,
}


def _least(request: ScheduleRequest, nodes: Sequence[NodeView], load: Load) -> NodeView:
    return min(nodes, key=lambda node: (load(node), node.node_id))


def _in_turn() -> Pick:
    turn = 0

    def pick(request: ScheduleRequest, nodes: Sequence[NodeView], load: Load) -> NodeView:
        nonlocal turn
        turn += 1
        return nodes[turn % len(nodes)]

    return pick


def _draw_for(key: str, node_id: str) -> bytes:
    """Rendezvous hashing: of the nodes that are there, each key has its own order."""
    return blake2b(f"{key}/{node_id}".encode(), digest_size=8).digest()
