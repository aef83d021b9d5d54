"""What the load-aware scheduler is compared with: the same admission, no lending, another choice of nodes."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

from flowkv_common.wire.messages import NodeRef, ScheduleRequest, Wait
from flowkv_common.wire.nodes import LoadReport, NodeDescriptor
from flowkv_scheduler.orders import Order
from flowkv_scheduler.planner import Planner
from flowkv_scheduler.weighing import Goals

# A choice that no report shows yet counts for so long: two report periods.
CHOICES_COUNT_FOR_S = 1.0


class Pair(NamedTuple):
    """Where a request goes."""

    prefill: NodeRef
    decode: NodeRef


class Known(NamedTuple):
    """A node as its last report shows it, and what it has been given in the last second."""

    descriptor: NodeDescriptor
    report: LoadReport
    given: list[tuple[float, int, int]]  # when, prompt tokens, blocks (0: it only prefills them)

    @property
    def node_id(self) -> str:
        return self.descriptor.node.node_id

    def may_prefill(self) -> bool:
        return self.report.max_prefill_tokens_per_step > self.descriptor.layout.block_size

    def may_decode(self) -> bool:
        return self.report.max_prefill_tokens_per_step < self.descriptor.token_budget

    def num_queued_tokens(self) -> int:
        return self.report.queued_prefill_tokens + sum(tokens for _, tokens, _ in self.given)

    def num_sequences(self) -> int:
        given = sum(blocks > 0 for _, _, blocks in self.given)
        return self.report.num_running + self.report.num_waiting + given

    def has_room(self, num_blocks: int) -> bool:
        available = self.report.blocks.free + self.report.blocks.cached
        return num_blocks <= available - sum(blocks for _, _, blocks in self.given)


# Of the nodes of a side, one; `load` tells how much a node has to do on that side.
Load = Callable[[Known], int]
Pick = Callable[[ScheduleRequest, Sequence[Known], Load], Known]


class Baseline:
    """A planner that takes FlowKV's word for whether a request is served now, and its own for where.

    FlowKV's planner counts what it would have chosen. So its idea of the last second's choices is about other
    nodes than they went to; reports put that right.
    """

    def __init__(self, goals: Goals, pick_prefill: Pick, pick_decode: Pick) -> None:
        self._admission = Planner(goals, lends=False)
        self._descriptors: dict[NodeRef, NodeDescriptor] = {}
        self._known: dict[NodeRef, Known] = {}
        self._pick_prefill = pick_prefill
        self._pick_decode = pick_decode

    def set_descriptors(self, descriptors: Mapping[str, NodeDescriptor]) -> None:
        self._admission.set_descriptors(descriptors)
        self._descriptors = {descriptor.node: descriptor for descriptor in descriptors.values()}

    def add_report(self, report: LoadReport, now: float) -> None:
        self._admission.add_report(report, now)
        known = self._known.get(report.node)
        given = [one for one in known.given if now - one[0] < CHOICES_COUNT_FOR_S] if known else []
        self._known[report.node] = Known(self._descriptors[report.node], report, given)

    def schedule(self, request: ScheduleRequest, now: float) -> Pair | Wait:
        """As `Planner.schedule`, which says whether; the picks say where."""
        decision = self._admission.schedule(request, now)
        if isinstance(decision, Wait):
            return decision
        nodes = list(self._known.values())
        num_blocks = -(-(request.num_prompt_tokens + 1) // nodes[0].descriptor.layout.block_size)
        prefill = [node for node in nodes if node.may_prefill()] or nodes
        decode = [node for node in nodes if node.may_decode()] or nodes
        roomy = [node for node in decode if node.has_room(num_blocks)] or decode
        p = self._pick_prefill(request, prefill, Known.num_queued_tokens)
        d = self._pick_decode(request, roomy, Known.num_sequences)
        p.given.append((now, request.num_prompt_tokens, 0))
        d.given.append((now, 0, num_blocks))
        return Pair(p.descriptor.node, d.descriptor.node)

    def tick(self, now: float) -> list[Order]:
        return []


def at_random(goals: Goals, seed: int) -> Baseline:
    draw = random.Random(seed)

    def pick(request: ScheduleRequest, nodes: Sequence[Known], load: Load) -> Known:
        return draw.choice(nodes)

    return Baseline(goals, pick, pick)


def round_robin(goals: Goals, seed: int) -> Baseline:
    """In turn, each side for itself."""
    return Baseline(goals, _in_turn(), _in_turn())


def least_loaded(goals: Goals, seed: int) -> Baseline:
    """The node with the least to do, as if all were alike: queued tokens at prefill, sequences at decode."""
    return Baseline(goals, _least, _least)


def two_choices(goals: Goals, seed: int) -> Baseline:
    """The less loaded of two drawn at random (Mitzenmacher's power of two choices)."""
    draw = random.Random(seed)

    def pick(request: ScheduleRequest, nodes: Sequence[Known], load: Load) -> Known:
        return _least(request, draw.sample(nodes, min(2, len(nodes))), load)

    return Baseline(goals, pick, pick)


# Affinity goes by the hash that names the prompt up to this token. Less is the system prompt that all share.
AFFINITY_TOKENS = 2048


def prefix_affinity(goals: Goals, seed: int) -> Baseline:
    """Prompts that begin alike go to the same prefill node, whatever it has to do; the least loaded decodes.
    Prompts without hashes are spread by their id."""

    def pick(request: ScheduleRequest, nodes: Sequence[Known], load: Load) -> Known:
        num_blocks = AFFINITY_TOKENS // nodes[0].descriptor.layout.block_size
        hashes = request.block_hashes[:num_blocks]
        key = hashes[-1] if hashes else request.request_id
        return max(nodes, key=lambda node: _draw_for(key, node.node_id))

    return Baseline(goals, pick, _least)


BASELINES: dict[str, Callable[[Goals, int], Baseline]] = {
    "random": at_random,
    "round_robin": round_robin,
    "least_loaded": least_loaded,
    "two_choices": two_choices,
    "prefix_affinity": prefix_affinity,
}


def _least(request: ScheduleRequest, nodes: Sequence[Known], load: Load) -> Known:
    return min(nodes, key=lambda node: (load(node), node.node_id))


def _in_turn() -> Pick:
    turn = 0

    def pick(request: ScheduleRequest, nodes: Sequence[Known], load: Load) -> Known:
        nonlocal turn
        turn += 1
        return nodes[turn % len(nodes)]

    return pick


def _draw_for(key: str, node_id: str) -> bytes:
    """Rendezvous hashing: for each key the nodes have another order, which new nodes don't upset."""
    return blake2b(f"{key}/{node_id}".encode(), digest_size=8).digest()
