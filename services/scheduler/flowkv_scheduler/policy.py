"""The cost of a pair: which nodes may take which half of a request, how long it would take, the best pair.

Pure: plain data in, predicted seconds out; no clock, no I/O.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from operator import attrgetter
from typing import Any

import msgspec
from sortedcontainers import SortedDict

from flowkv_common.wire.messages import Candidate, ScheduleRequest
from flowkv_common.wire.nodes import num_attended
from flowkv_scheduler.cluster import (
    ClusterState,
    Goals,
    NodeGroup,
    decode_rank,
    id_rank,
    prefill_rank,
    room_rank,
)
from flowkv_scheduler.demand import OutputLengths
from flowkv_scheduler.node_view import NOTHING, SHARED_ITL, NodeView, Work
from flowkv_scheduler.prefixes import Hits, keys_of

# Bytes per second between two nodes, by connector: orders of magnitude, all that a choice needs. An unknown
# one passes for TCP.
LINK_BYTES_PER_S = {"shm": 5e9, "nixl": 5e9, "cuda_ipc": 200e9, "nccl": 20e9, "tcp": 1e9}
HERE = "here"
# Reserve, commit and the first token's detour: what a handoff costs however short the prompt is.
HANDOFF_S = 0.005
# So many nodes per side and class of speed are compared, and so many more that have cached the most.
NUM_COMPARED = 4
NUM_FULL = 16
NUM_BY_PREFIX = 4
NUM_LOOKED_AT = 8  # a prefix may lie on all nodes
MAX_CANDIDATES = 8
NUM_TOLD = 4  # of the candidates of each side, with the answer

Accepts = Callable[[NodeView], bool]
Rank = Callable[[NodeView], tuple[Any, ...] | None]


class Cost(msgspec.Struct, frozen=True, gc=False):
    """Predicted seconds at one node: for this request, and with the wait behind others."""

    node: NodeView
    work_s: float
    num_cached_tokens: int
    total_s: float


# Equals stay in the order of their side: by node id.
_rank = attrgetter("total_s")


def excess_s(node: NodeView, excess_tokens: float, held: Work, target_s: float) -> float:
    """How far a decode step with one more sequence exceeds the target, beside `held`. Of an idle node 0.

    `excess_tokens`: what its prompt has more than the mean one.
    """
    if node.num_sequences + held.num_sequences == 0:
        return 0.0
    step_s = node.step_s + excess_tokens * node.speed.context_token_s
    if held is not NOTHING:
        step_s += node.speed.beside_s(held.num_sequences, held.context_tokens)
    if node.helps_decode:
        return max(step_s - target_s, step_s - node.chunk_s - SHARED_ITL * target_s)
    return step_s - target_s


class RequestCosts:
    """One request against the cluster at `now`: which nodes may take which half, and at what cost."""

    def __init__(
        self,
        request: ScheduleRequest,
        state: ClusterState,
        goals: Goals,
        now: float,
        *,
        hits: Hits | None = None,
        find_kept: Callable[[RequestCosts], Mapping[str, Work]] | None = None,
        is_interruptible: bool = False,
    ) -> None:
        """`hits`: looked up if None. `find_kept`: see `kept`. `is_interruptible`: prompts in time come before
        its own, so that it interrupts none. Raises `BadRequest` for malformed hashes.
        """
        self.request = request
        self.state = state
        self.goals = goals.of_request(request)
        self.now = now
        self.cluster_goals = goals
        self.hits = state.prefixes.hits(keys_of(request.block_hashes), now) if hits is None else hits
        self._find_kept = find_kept
        self._kept: Mapping[str, Work] | None = None
        self.is_interruptible = is_interruptible
        # Tokens that the prompt has more than the mean one, or fewer.
        self.mean_prompt_tokens = state.mean_prompt_tokens_of(request.fingerprint)
        self._excess_tokens = request.num_prompt_tokens - self.mean_prompt_tokens
        self._most_tokens = request.num_prompt_tokens + request.max_new_tokens
        self._needs: dict[int, Work] = {}  # by block size: all else about it is the request's
        # A prefill node with more to do is no candidate.
        self.longest_prefill_wait_s = math.inf

    @property
    def kept(self) -> Mapping[str, Work]:
        """Node id -> the room that is kept there for waiting requests that come before this one."""
        if self._kept is None:
            self._kept = self._find_kept(self) if self._find_kept else {}
        return self._kept

    @functools.cached_property
    def lengths(self) -> OutputLengths:
        """How long outputs of the model become."""
        return self.state.lengths_of(self.request.fingerprint)

    # --- which nodes may take it -------------------------------------------------------------------

    def takes_prompt(self, node: NodeView) -> bool:
        """Of a node of the model: one that may get work, and whose whole pool could hold the prompt."""
        return self.now <= node.usable_until and self.request.num_prompt_tokens < node.num_tokens_held

    def takes_sequence(self, node: NodeView) -> bool:
        """Of a node of the model: one that may get work, and whose whole pool could hold the request."""
        return self.now <= node.usable_until and self._most_tokens <= node.num_tokens_held

    def has_room(self, node: NodeView) -> bool:
        """Does the request fit on the node now, beside what is kept there?"""
        kept = self._kept
        if kept is None:
            # It is found only if there is room at all.
            if not self._fits(node, NOTHING):
                return False
            kept = self.kept
        return self._fits(node, kept.get(node.node_id, NOTHING))

    def _fits(self, node: NodeView, held: Work) -> bool:
        """The whole prompt and a token, a place in the batch, and the ITL target, beside `held`."""
        return (
            held.num_sequences < node.num_free_places
            and not self.num_missing_blocks(node, held)
            and self.may_slow(node, held)
        )

    def may_slow(self, node: NodeView, held: Work) -> bool:
        """Is the ITL target met or of no matter, beside `held`?"""
        # The target is no less than the goal, which is known at once.
        return (
            excess_s(node, self._excess_tokens, held, self.goals.itl_s) <= 0.0
            or not self.must_meet_itl
            or self.itl_excess_s(node, held) <= 0.0
        )

    @property
    def must_meet_itl(self) -> bool:
        """Retries of running requests skip the ITL check, but for one that may stay where it runs."""
        return not self.request.num_output_tokens or bool(self.request.runs_on)

    @functools.cached_property
    def itl_target_s(self) -> float:
        """The stricter of the request's and the cluster's that the fastest nodes meet, were it there alone.

        Infinite if they meet neither: that would only make requests wait.
        """
        fastest = [group.decode.peekitem(0)[1] for group in self.groups if group.decode]
        num_tokens = self.request.num_prompt_tokens
        alone_s = min((node.speed.decode_step_s(1, num_tokens) for node in fastest), default=0.0)
        return min(
            (s for s in (self.goals.itl_s, self.cluster_goals.itl_s) if s >= alone_s), default=math.inf
        )

    def num_missing_blocks(self, node: NodeView, held: Work = NOTHING) -> int:
        """Beside `held`; 0 if there are enough."""
        num_missing = self.need_on(node).num_blocks + held.num_blocks - node.num_available_blocks
        if num_missing <= 0:
            return 0
        # Cached blocks may be idle, and are then among those available: they are not counted twice.
        num_more = max(0, self.hits.num_blocks(node.node_id) - node.report.blocks.cached)
        return max(0, num_missing - num_more)

    def itl_excess_s(self, node: NodeView, held: Work = NOTHING) -> float:
        """How far a step would exceed the ITL target. An idle node is as good as it gets: 0."""
        return excess_s(node, self._excess_tokens, held, self.itl_target_s)

    def need_on(self, node: NodeView) -> Work:
        """The room that the request takes there, with its output as long as is expected."""
        need = self._needs.get(node.descriptor.layout.block_size)
        if need is None:
            need = node.need_of(self.request, self.lengths)
            self._needs[node.descriptor.layout.block_size] = need
        return need

    def least_blocks(self) -> int:
        """Blocks that the request takes anew on any node, whatever that has cached; at least one."""
        needs = (self.need_on(group.members.peekitem(0)[1]).num_blocks for group in self.groups)
        return max(1, min(needs, default=0) - self.hits.longest)

    # --- what it costs -----------------------------------------------------------------------------

    def step_s(self, node: NodeView) -> float:
        """Of a decode step with this request in it."""
        return node.step_s + self._excess_tokens * node.speed.context_token_s

    def num_cached_tokens(self, node: NodeView) -> int:
        """Of the prompt, in the node's prefix cache; the last token is always computed."""
        cached = self.hits.num_blocks(node.node_id) * node.descriptor.layout.block_size
        return min(cached, self.request.num_prompt_tokens - 1)

    def prefill_wait_s(self, node: NodeView) -> float:
        """Behind the prompts that come before its own there, those that we have sent since included."""
        return node.idle_wait_s if self.is_interruptible else node.prefill_wait_s

    def prefill_cost(self, node: NodeView) -> Cost:
        """The wait, then what is not cached here."""
        num_cached = self.num_cached_tokens(node)
        work_s = self.prefill_work_s(node, num_cached)
        return Cost(node, work_s, num_cached, self.prefill_wait_s(node) + work_s)

    def prefill_work_s(self, node: NodeView, num_cached: int) -> float:
        """Of all but so many tokens of the prompt."""
        num_new = self.request.num_prompt_tokens - num_cached
        return node.speed.prefill_s(num_new, num_cached, node.chunk_tokens, node.chunk_beside_s)

    def decode_cost(self, node: NodeView) -> Cost:
        """One step: a request that gets the node has its place in the batch."""
        step_s = self.step_s(node)
        return Cost(node, step_s, self.num_cached_tokens(node), step_s)

    def link_between(self, prefill: NodeView, decode: NodeView) -> str:
        """The connector; `HERE` if there is nothing to move, "" if that is not known.

        A peer that is not linked yet passes for one like most: the link is there when the handoff is.
        """
        if prefill.node_id == decode.node_id:
            return HERE
        report = prefill.report
        return report.links.get(decode.node_id, report.usual_connector)

    def transfer_s(self, prefill: Cost, num_cached_there: int, link: str) -> float:
        """What the second token waits for: handoff and last chunk at least."""
        if link == HERE:
            return 0.0
        layout, rate = prefill.node.descriptor.layout, LINK_BYTES_PER_S.get(link, LINK_BYTES_PER_S["tcp"])
        token_s = layout.block_bytes / layout.block_size / rate
        num_sent = self.request.num_prompt_tokens - num_cached_there
        # Earlier chunks travel while later ones compute, as far as the link keeps up with prefill.
        last_chunk_s = min(num_sent, prefill.node.chunk_tokens) * token_s
        return HANDOFF_S + max(last_chunk_s, num_sent * token_s - prefill.work_s)

    # --- candidates --------------------------------------------------------------------------------

    @functools.cached_property
    def groups(self) -> list[NodeGroup]:
        """The nodes of the model."""
        return self.state.groups_of(self.request.fingerprint)

    def has_nodes(self) -> bool:
        """Whether both sides have a live node for the request, even if it is full."""
        return any(
            any(map(self.takes_prompt, group.members.values()))
            and any(map(self.takes_sequence, group.members.values()))
            for group in self.groups
        )

    def prefill_side(self, group: NodeGroup) -> list[Cost]:
        """The best nodes for the prompt, soonest first."""
        sides = (group.prefill, prefill_rank), (group.members, id_rank)
        found = self._candidates(sides, self.takes_prompt, lambda _: True)
        able = (node for node in found if self.prefill_wait_s(node) <= self.longest_prefill_wait_s)
        return sorted(map(self.prefill_cost, able), key=_rank)[:MAX_CANDIDATES]

    def decode_side(self, group: NodeGroup) -> list[Cost]:
        """The best nodes that have room for the sequence now, soonest first.

        Twice as many as of the other side: what is cached here spares a transfer, which this order ignores.
        """
        sides = (group.decode, decode_rank), (group.roomiest, room_rank), (group.members, id_rank)
        found = self._candidates(sides, self.takes_sequence, self.has_room)
        return sorted(map(self.decode_cost, found), key=_rank)[: 2 * MAX_CANDIDATES]

    def _candidates(
        self, sides: Sequence[tuple[SortedDict, Rank]], is_able: Accepts, fits: Accepts
    ) -> list[NodeView]:
        """The soonest nodes of a side that fit, and those that have cached most of the prompt.

        A side without able nodes is taken by all of the group: slow is better than not at all. Nodes that
        failed the request before are left out while there are others.
        """
        (soonest, rank), (everyone, _) = sides[0], sides[-1]
        for avoid in dict.fromkeys([frozenset(self.request.avoid), frozenset[str]()]):
            able = _but(avoid, is_able)
            for nodes, _ in sides[:-1]:
                if found := first_of_each_class(nodes, able, fits):
                    return found + self._longest_cached(soonest, rank, found, able, fits)
            if any(map(able, soonest.values())):
                return []  # they are full
            if found := first_of_each_class(everyone, able, fits):
                return found
        return []

    def _longest_cached(
        self, nodes: SortedDict, rank: Rank, known: list[NodeView], is_able: Accepts, fits: Accepts
    ) -> list[NodeView]:
        """Further nodes, those that have cached most of the prompt."""
        if not self.hits:
            return []
        seen = {node.node_id for node in known}
        others = (self.state.view(name) for name in self.hits.longest_first() if name not in seen)
        members = (node for node in others if node is not None and rank(node) in nodes and is_able(node))
        return list(islice(filter(fits, islice(members, NUM_LOOKED_AT)), NUM_BY_PREFIX))


def _but(avoid: frozenset[str], accepts: Accepts) -> Accepts:
    """Those that are accepted, without these."""
    return (lambda node: node.node_id not in avoid and accepts(node)) if avoid else accepts


def first_of_each_class(
    nodes: SortedDict, is_able: Accepts, fits: Accepts, most: int = NUM_COMPARED
) -> list[NodeView]:
    """The first `most` fitting nodes of each class, which a rank begins with.

    After `NUM_FULL` nodes that are full the others of the class are taken to be full too.
    """
    found: list[NodeView] = []
    start = 0
    while start < len(nodes):
        end = nodes.bisect_left((nodes.peekitem(start)[0][0] + 1,))
        num_found = num_full = 0
        for node in filter(is_able, map(nodes.get, nodes.islice(start, end))):
            if fits(node):
                found.append(node)
                num_found += 1
            else:
                num_full += 1
            if num_found == most or num_full == NUM_FULL:
                break
        start = end
    return found


class Choice(msgspec.Struct, frozen=True, gc=False):
    """The pair, what it is predicted to take, and the best candidates of each side."""

    prefill: NodeView
    decode: NodeView
    predicted_s: float  # to the second token
    wait_s: float
    first_token_s: float
    prefill_s: float  # of its own, without the wait
    num_cached_tokens: int  # at prefill
    reason: str
    prefill_candidates: list[Candidate]
    decode_candidates: list[Candidate]
    due_in_s: float = 0.0  # the first token, for the order of prompts at the node
    interruptible_for_s: float = 0.0  # by prompts in time, so that its own may take longer than predicted

    def added_work(self, request: ScheduleRequest, lengths: OutputLengths) -> tuple[Work, Work]:
        """What the choice adds to its prefill node and to its decode node."""
        num_new = request.num_prompt_tokens - self.num_cached_tokens
        attended = num_attended(num_new, self.num_cached_tokens)
        is_interruptible = self.interruptible_for_s > 0
        for_prefill = Work(
            prefill_tokens=num_new,
            prefill_attended=attended,
            interruptible_tokens=num_new * is_interruptible,
            interruptible_attended=attended * is_interruptible,
        )
        if request.max_new_tokens == 1:
            return for_prefill, NOTHING
        return (
            for_prefill,
            # Blocks of the prompt: those that its output will need count as tokens that are left.
            msgspec.structs.replace(
                self.decode.need_of(request, lengths),
                prefill_tokens=0,
                num_blocks=self.decode.descriptor.layout.blocks_for_prompt(request.num_prompt_tokens),
            ),
        )


class _Pair(msgspec.Struct, frozen=True, gc=False):
    predicted_s: float
    prefill: Cost
    decode: Cost
    transfer_s: float


# Of equal pairs the one with the less loaded prefill node, then that of the smaller node ids.
_pair_rank = attrgetter("predicted_s", "prefill.total_s", "prefill.node.node_id", "decode.node.node_id")

Chooser = Callable[[RequestCosts], Choice | None]


def choose(costs: RequestCosts) -> Choice | None:
    """The best pair of the request's model; None when no pair has room for the prompt now."""
    whole = [group for group in costs.groups if group.prefill and group.decode]
    others = [group for group in costs.groups if not (group.prefill and group.decode)]
    # A node that can exchange blocks with no other serves alone, if no other can.
    for groups in (whole, others):
        choices = [choice for group in groups if (choice := _choose_in(costs, group))]
        if choices:
            return min(choices, key=lambda choice: choice.predicted_s)
    return None


def _choose_in(costs: RequestCosts, group: NodeGroup) -> Choice | None:
    ends_at_once = costs.request.max_new_tokens == 1  # its first token is its last
    decode = [] if ends_at_once else costs.decode_side(group)
    if not decode and not ends_at_once:
        return None
    prefill = costs.prefill_side(group)
    if ends_at_once:
        decode = [Cost(cost.node, 0.0, cost.num_cached_tokens, 0.0) for cost in prefill[:1]]
    best = _best_pair(costs, prefill, decode)
    # A prompt may be computed where it will be decoded, though that is no prefill node.
    staying = [d for d in decode if _may_stay(costs, d.node)]
    for d in staying:
        p = costs.prefill_cost(d.node)
        pair = _Pair(p.total_s + d.total_s, p, d, 0.0)
        if best is None or _pair_rank(pair) < _pair_rank(best):
            best = pair
    if best is None:
        return None
    p, d = best.prefill, best.decode
    wait_s = costs.prefill_wait_s(p.node)
    return Choice(
        prefill=p.node,
        decode=d.node,
        predicted_s=best.predicted_s,
        wait_s=wait_s,
        first_token_s=p.total_s,
        prefill_s=p.work_s,
        num_cached_tokens=p.num_cached_tokens,
        reason=(
            f"best of {len(prefill) * len(decode) + len(staying)} pairs, {best.predicted_s:.3f} s to the "
            f"second token: wait at {p.node.node_id} {wait_s:.3f} s, prefill of "
            f"{costs.request.num_prompt_tokens - p.num_cached_tokens} tokens {p.work_s:.3f} s, transfer "
            f"{best.transfer_s:.3f} s, step at {d.node.node_id} {d.work_s:.3f} s"
        ),
        prefill_candidates=[_prefill_candidate(cost) for cost in prefill[:NUM_TOLD]],
        decode_candidates=[_decode_candidate(cost) for cost in decode[:NUM_TOLD]],
    )


def _best_pair(costs: RequestCosts, prefill: list[Cost], decode: list[Cost]) -> _Pair | None:
    """Both sides come soonest first. So of equal pairs the first is kept, and of the decode nodes that are
    reached alike only the first is looked at."""
    best, best_s = None, math.inf
    for p in prefill:
        reached = set()
        for d in decode:
            if p.total_s + d.total_s >= best_s:
                break
            how = d.num_cached_tokens, costs.link_between(p.node, d.node)
            if how in reached:
                continue
            reached.add(how)
            moved_s = costs.transfer_s(p, *how)
            predicted_s = p.total_s + moved_s + d.total_s
            if predicted_s < best_s:
                best, best_s = _Pair(predicted_s, p, d, moved_s), predicted_s
    return best


def _may_stay(costs: RequestCosts, node: NodeView) -> bool:
    """Only where it disturbs no other request: lending is for more. And in steps that meet the ITL target of
    the requests that come next."""
    chunk_s = node.chunk_budget * node.speed.prefill_token_s
    is_idle = not (node.num_sequences or node.report.num_prompts or node.may_prefill)
    is_idle = is_idle and costs.prefill_wait_s(node) <= costs.longest_prefill_wait_s
    return is_idle and costs.step_s(node) + chunk_s <= costs.goals.itl_s


def _prefill_candidate(cost: Cost) -> Candidate:
    reason = f"{cost.node.num_queued_tokens} tokens queued, {cost.num_cached_tokens} of the prompt cached"
    return Candidate(node_id=cost.node.node_id, predicted_s=cost.total_s, reason=reason)


def _decode_candidate(cost: Cost) -> Candidate:
    node = cost.node
    reason = (
        f"{node.num_sequences} of {node.report.max_num_seqs} sequences, "
        f"{node.num_available_blocks} blocks available, step {cost.work_s * 1e3:.0f} ms"
    )
    return Candidate(node_id=node.node_id, predicted_s=cost.total_s, reason=reason)
