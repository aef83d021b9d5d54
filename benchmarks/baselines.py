"""Policies that FlowKV's is compared with: the same admission, no lending, another choice of nodes.

The simulator and the replay run these alike. A chooser keeps its own state, so make one per cluster.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from hashlib import blake2b

import msgspec

from flowkv_common.wire.messages import ScheduleRequest
from flowkv_scheduler import policy
from flowkv_scheduler.cluster import Goals
from flowkv_scheduler.node_view import NOTHING, NodeView, group_of
from flowkv_scheduler.planner import Planner
from flowkv_scheduler.policy import Choice, Chooser, RequestCosts

# Affinity goes by the hash that names the prompt up to this token. Less is the system prompt that all share.
AFFINITY_TOKENS = 2048

# Of the nodes of a side, one; `load` tells how much a node has to do on that side.
Load = Callable[[NodeView], int]
Pick = Callable[[ScheduleRequest, Sequence[NodeView], Load], NodeView]


def baseline(pick_prefill: Pick, pick_decode: Pick) -> Chooser:
    """FlowKV decides whether a request is served now, the picks decide where.

    The picks get nodes that are usable, can exchange blocks and have room. What is predicted is of FlowKV's
    own choice: a bad pick shall show in what comes of it, not in what is refused.
    """

    def choose(costs: RequestCosts) -> Choice | None:
        choice = policy.choose(costs)
        if choice is None:
            return None
        group = group_of(choice.decode.descriptor)
        usable = sorted(costs.state.usable(costs.now), key=lambda node: node.node_id)
        nodes = [node for node in usable if group_of(node.descriptor) == group]
        prefill = [node for node in nodes if node.may_prefill and costs.takes_prompt(node)]
        decode = [node for node in nodes if node.may_decode and costs.takes_sequence(node)]
        roomy = [node for node in decode if not costs.num_missing_blocks(node)]
        p = pick_prefill(costs.request, prefill or [choice.prefill], lambda node: node.num_queued_tokens)
        d = pick_decode(costs.request, roomy or [choice.decode], lambda node: node.num_sequences)
        return msgspec.structs.replace(
            choice,
            prefill=p,
            decode=d,
            first_token_s=costs.prefill_cost(p).total_s,
            num_cached_tokens=costs.num_cached_tokens(p),
            reason=f"picked from {len(prefill)} prefill nodes and {len(roomy)} decode nodes with room",
            prefill_candidates=[],
            decode_candidates=[],
        )

    return choose


def at_random(seed: int) -> Chooser:
    draw = random.Random(seed)

    def pick(request: ScheduleRequest, nodes: Sequence[NodeView], load: Load) -> NodeView:
        return draw.choice(nodes)

    return baseline(pick, pick)


def round_robin(seed: int) -> Chooser:
    """Each side goes through its nodes in order; `seed` is the first place."""

    def in_order() -> Pick:
        place = seed - 1

        def pick(request: ScheduleRequest, nodes: Sequence[NodeView], load: Load) -> NodeView:
            nonlocal place
            place += 1
            return nodes[place % len(nodes)]

        return pick

    return baseline(in_order(), in_order())


def least_loaded(seed: int) -> Chooser:
    """The node with the least to do, as if all were alike: queued tokens at prefill, sequences at decode."""
    return baseline(_least, _least)


def two_choices(seed: int) -> Chooser:
    """The less loaded of two drawn at random (Mitzenmacher's power of two choices)."""
    draw = random.Random(seed)

    def pick(request: ScheduleRequest, nodes: Sequence[NodeView], load: Load) -> NodeView:
        return _least(request, draw.sample(nodes, min(2, len(nodes))), load)

    return baseline(pick, pick)


def prefix_affinity(seed: int) -> Chooser:
    """Prompts that begin alike go to the same prefill node, however busy; the least loaded node decodes.

    By rendezvous hashing: for each key the nodes have another order, which new nodes don't upset. The key of
    a prompt without hashes is its id.
    """

    def pick(request: ScheduleRequest, nodes: Sequence[NodeView], load: Load) -> NodeView:
        num_blocks = AFFINITY_TOKENS // nodes[0].descriptor.layout.block_size
        hashes = request.block_hashes[:num_blocks]
        key = hashes[-1] if hashes else request.request_id
        return max(nodes, key=lambda node: blake2b(f"{key}/{node.node_id}".encode(), digest_size=8).digest())

    return baseline(pick, _least)


def one_node(costs: RequestCosts) -> Choice | None:
    """Of mixed nodes that which takes both halves of the request with the least predicted time."""

    def has_room(node: NodeView) -> bool:
        held = costs.kept.get(node.node_id, NOTHING)
        if costs.num_missing_blocks(node, held) or node.num_missing_places(held) > 0:
            return False
        # Prompts delay some of its steps in any case: without them its steps are to meet the target.
        step_s = costs.step_s(node) - node.chunk_s
        step_s += node.speed.beside_s(held.num_sequences, held.context_tokens)
        return not node.num_sequences or step_s <= costs.goals.itl_s or not costs.must_meet_itl

    members = (node for group in costs.groups for node in group.members.values())
    able = filter(costs.takes_sequence, members)
    roomy = [costs.prefill_cost(node) for node in able if has_room(node)]
    if not roomy:
        return None
    best = min(roomy, key=lambda cost: (cost.total_s + costs.step_s(cost.node), cost.node.node_id))
    return Choice(
        prefill=best.node,
        decode=best.node,
        predicted_s=best.total_s + costs.step_s(best.node),
        wait_s=costs.prefill_wait_s(best.node),
        first_token_s=best.total_s,
        prefill_s=best.work_s,
        num_cached_tokens=best.num_cached_tokens,
        reason=f"best of {len(roomy)} nodes",
        prefill_candidates=[],
        decode_candidates=[],
    )


def _least(request: ScheduleRequest, nodes: Sequence[NodeView], load: Load) -> NodeView:
    return min(nodes, key=lambda node: (load(node), node.node_id))


# By the names of `--policy`. Each takes a seed.
BASELINES: dict[str, Callable[[int], Chooser]] = {
    "random": at_random,
    "round_robin": round_robin,
    "least_loaded": least_loaded,
    "two_choices": two_choices,
    "prefix_affinity": prefix_affinity,
}
ONE_NODE = "one_node"  # only for mixed nodes
POLICIES = ("flowkv", "static", *BASELINES)


def make_planner(policy: str, goals: Goals, seed: int) -> Planner:
    """FlowKV's planner (`static`: without lending), or a baseline. Raises KeyError for an unknown name."""
    if policy in ("flowkv", "static"):
        return Planner(goals, lends=policy == "flowkv")
    return Planner(goals, lends=False, choose=one_node if policy == ONE_NODE else BASELINES[policy](seed))
