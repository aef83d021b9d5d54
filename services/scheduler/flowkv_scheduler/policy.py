"""One request against the cluster: who may take which half of it, and the seconds that it would cost there.

Pure: plain data in, costs out; no clock, no I/O.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from itertools import islice
from operator import attrgetter

import msgspec

from flowkv_common.wire.messages import Candidate, ScheduleRequest
from flowkv_common.wire.nodes import expected_tokens
from flowkv_scheduler.cluster import ClusterState, Group, Members, Side
from flowkv_scheduler.prefixes import keys_of
from flowkv_scheduler.views import NOTHING, NodeView, Work
from flowkv_scheduler.waiting import Waiter, Waiting

# Bytes per second of the way between two nodes, by connector: orders of magnitude, all that a choice needs.
LINK_BYTES_PER_S = {"shm": 5e9, "cuda_ipc": 200e9, "nccl": 20e9, "tcp": 1e9}
UNKNOWN_LINK_BYTES_PER_S = 1e9
HERE = "here"
# Reserve, commit and the first token's detour: what a handoff costs however short the prompt is.
HANDOFF_S = 0.005
# A prefill node that decodes besides does so for this part of the time between tokens: the rest is for
# prompts, and who decodes elsewhere waits for these.
HELPING_SHARE = 0.5
# So many nodes per side and class of speed are weighed, and so many more that have cached the most.
NUM_WEIGHED = 4
NUM_BY_PREFIX = 4
NUM_LOOKED_AT = 8  # a prefix may lie on all nodes
MAX_CANDIDATES = 8
NUM_TOLD = 4  # of the candidates of each side, with the answer


Accepts = Callable[[NodeView], bool]


class Goals(msgspec.Struct, frozen=True):
    """What users are to see, in seconds. Who would wait longer than `max_wait_s` is refused at the door."""

    ttft_s: float = 5.0
    itl_s: float = 0.25
    max_wait_s: float = 60.0


class Cost(msgspec.Struct, frozen=True, gc=False):
    """Predicted seconds at one node: behind others, then for this request."""

    node: NodeView
    wait_s: float
    work_s: float
    num_cached_tokens: int
    total_s: float


_rank = attrgetter("total_s", "node.node_id")


class Weighing:
    """One request against the cluster as it is: who may take which half, at what cost."""

    def __init__(
        self,
        request: ScheduleRequest,
        state: ClusterState,
        goals: Goals,
        now: float,
        waiting: Waiting | None = None,
    ) -> None:
        self.request = request
        self.state = state
        self.goals = goals
        self.now = now
        self.waiting = Waiting() if waiting is None else waiting
        self.turn = self.waiting.turn_of(request, now)
        self.hits = state.prefixes.hits(keys_of(request.block_hashes), now)
        self.groups = state.index.groups_of(request.fingerprint)
        self._avoid = frozenset(request.avoid)

    # --- who may -----------------------------------------------------------------------------------

    def is_of_model(self, node: NodeView) -> bool:
        return node.descriptor.model.fingerprint == self.request.fingerprint

    def takes_prompt(self, node: NodeView) -> bool:
        return self._is_for(node) and node.can_ever_compute(self.request)

    def takes_sequence(self, node: NodeView) -> bool:
        return self._is_for(node) and node.can_ever_hold(self.request)

    def _is_for(self, node: NodeView) -> bool:
        return self.is_of_model(node) and node.is_usable(self.now)

    def has_place(self, node: NodeView) -> bool:
        """Does the request fit on the node now, beside what is kept there for those before it?"""
        return self._fits(node, NOTHING) and self._fits(node, self._kept.get(node.node_id, NOTHING))

    @functools.cached_property
    def _kept(self) -> dict[str, Work]:
        """Node id -> the room there that is kept for waiting requests that come before this one.

        Each gets it at one node alone: where it stands, or else another that has enough for it now. If none
        has, room is saved where it stands until there is enough. A node with nothing left is not looked at
        again, so this takes a step per waiting request and one per free place.
        """
        kept: dict[str, Work] = {}
        if not self.waiting:
            return kept
        usable = list(filter(self.is_of_model, self.state.usable(self.now)))
        decode = [node for node in usable if node.may_decode] or usable
        open_nodes = {node.node_id: node for node in decode if _has_room(node, NOTHING)}
        for other in self.waiting.ahead_of(self.turn):
            if not open_nodes:
                break
            if other.request.fingerprint != self.request.fingerprint:
                continue
            node = self._node_for(other, open_nodes, kept)
            if node is None:
                continue
            held = kept.get(node.node_id, NOTHING).plus(need_at(node, other.request))
            kept[node.node_id] = held
            if not _has_room(node, held):
                del open_nodes[node.node_id]
        return kept

    def _node_for(
        self, other: Waiter, open_nodes: Mapping[str, NodeView], kept: Mapping[str, Work]
    ) -> NodeView | None:
        """Of the open nodes the one where room is kept for a waiting request."""
        own = open_nodes.get(other.node_id)
        for node in [own, *open_nodes.values()] if own else open_nodes.values():
            if self._could_take(node, other, kept.get(node.node_id, NOTHING)):
                return node
        return own

    def _fits(self, node: NodeView, held: Work) -> bool:
        """Is there room for the whole prompt and a token, a place, and rhythm, with `held` for others?"""
        if self.num_missing_blocks(node) + held.num_blocks > 0 or num_missing_places(node, held) > 0:
            return False
        return self.over_s(node, held) <= 0.0 or not self.respects_rhythm(node)

    def _could_take(self, node: NodeView, other: Waiter, held: Work) -> bool:
        """Would a waiting request get room there, beside `held`, if it asked now?"""
        num_blocks = node.num_blocks_for_prompt(other.request.num_prompt_tokens)
        if num_blocks + held.num_blocks > node.num_available_blocks or node.node_id in other.request.avoid:
            return False  # most often, and soon seen
        its = Weighing(other.request, self.state, self.goals, self.now, self.waiting)
        return its.takes_sequence(node) and its._fits(node, held)

    @property
    def patience_s(self) -> float:
        """How much longer the request may be held up for the sake of others' rhythm."""
        return max(0.0, self.goals.ttft_s - self.request.age_s)

    def respects_rhythm(self, node: NodeView) -> bool:
        """The retry of a running request is not held up for the sake of others' rhythm, nor for ever anyone:
        but where prompts are computed for others they would be held up in turn."""
        return not self.request.num_output_tokens and (node.helps_decode or self.patience_s > 0.0)

    def num_missing_blocks(self, node: NodeView) -> int:
        # Cached blocks may be idle, and are then among those available: they are not counted twice.
        num_held = max(0, self.hits.of(node.node_id) - node.report.blocks.cached)
        wanted = node.num_blocks_for_prompt(self.request.num_prompt_tokens) - num_held
        return wanted - node.num_available_blocks

    def over_s(self, node: NodeView, held: Work = NOTHING) -> float:
        """By how much the time between tokens would be over its goal. An idle node is as good as it gets."""
        if node.num_sequences + held.num_sequences == 0:
            return 0.0
        step_s = self.step_s(node) + node.speed.beside_s(held.num_sequences, held.context_tokens)
        if node.helps_decode:
            return max(step_s - self.goals.itl_s, step_s - node.chunk_s - HELPING_SHARE * self.goals.itl_s)
        return step_s - self.goals.itl_s

    def is_held_up_by_prompts(self, node: NodeView) -> bool:
        """Would it keep its rhythm if no prompts waited on the node? Then it will when they are computed."""
        return 0.0 < self.over_s(node) <= node.chunk_s and not node.helps_decode

    # --- what it costs -----------------------------------------------------------------------------

    def step_s(self, node: NodeView) -> float:
        """Of a decode step with this request in it."""
        longer = self.request.num_prompt_tokens - self.state.mean_prompt_tokens
        return node.step_s + longer * node.speed.context_token_s

    def num_cached_tokens(self, node: NodeView) -> int:
        """Of the prompt, in the node's prefix cache; the last token is always computed."""
        cached = self.hits.of(node.node_id) * node.descriptor.layout.block_size
        return min(cached, self.request.num_prompt_tokens - 1)

    def prefill_cost(self, node: NodeView) -> Cost:
        """Wait behind the queued tokens and those we have sent since, then what is not cached here."""
        num_cached = self.num_cached_tokens(node)
        num_new = self.request.num_prompt_tokens - num_cached
        work_s = node.speed.prefill_s(num_new, num_cached, node.chunk, node.chunk_beside_s)
        return Cost(node, node.prefill_wait_s, work_s, num_cached, node.prefill_wait_s + work_s)

    def decode_cost(self, node: NodeView) -> Cost:
        """One step: who gets the node has its place in the batch."""
        step_s = self.step_s(node)
        return Cost(node, 0.0, step_s, self.num_cached_tokens(node), step_s)

    def way(self, prefill: NodeView, decode: NodeView) -> str:
        """By which connector, `HERE` if there is nothing to move, "" if that is not known."""
        if prefill.node_id == decode.node_id:
            return HERE
        return prefill.report.links.get(decode.node_id, "")

    def transfer_s(self, prefill: Cost, num_cached_there: int, way: str) -> float:
        """What the second token waits for: handoff and last chunk at least."""
        if way == HERE:
            return 0.0
        layout, rate = prefill.node.descriptor.layout, LINK_BYTES_PER_S.get(way, UNKNOWN_LINK_BYTES_PER_S)
        token_s = layout.block_bytes / layout.block_size / rate
        num_sent = self.request.num_prompt_tokens - num_cached_there
        # Earlier chunks travel while later ones compute, as far as the link keeps up with prefill.
        last_chunk_s = min(num_sent, prefill.node.chunk) * token_s
        return HANDOFF_S + max(last_chunk_s, num_sent * token_s - prefill.work_s)

    # --- weighing ----------------------------------------------------------------------------------

    def prefill_side(self, group: Group) -> list[Cost]:
        """The best of those that take prompts, soonest first."""
        nodes = self._nodes(group, self.state.index.prefill, self.takes_prompt, self.takes_prompt)
        return sorted(map(self.prefill_cost, nodes), key=_rank)[:MAX_CANDIDATES]

    def decode_side(self, group: Group) -> list[Cost]:
        """The best of those that take sequences and have a place now, soonest first.

        Twice as many as of the other side: what is cached here spares a transfer, which this order knows not.
        """
        nodes = self._nodes(
            group,
            self.state.index.decode,
            self.takes_sequence,
            lambda node: self.has_place(node) and self.takes_sequence(node),
        )
        return sorted(map(self.decode_cost, nodes), key=_rank)[: 2 * MAX_CANDIDATES]

    def stands(self, group: Group) -> bool:
        """Is there anyone at all, on both sides, be they full?"""
        index = self.state.index
        return bool(
            self._nodes(group, index.prefill, self.takes_prompt, self.takes_prompt)
            and self._nodes(group, index.decode, self.takes_sequence, self.takes_sequence)
        )

    def _nodes(self, group: Group, side: Side, stands: Accepts, fits: Accepts) -> list[NodeView]:
        """Those of a side that fit, the soonest and those that have cached most of the prompt.

        A side on which nobody stands is taken by all: slow is better than not at all. Who failed the request
        before is left out while there are others.
        """
        for avoid in {self._avoid: None, frozenset[str](): None}:
            for nodes in (side, self.state.index.members):
                if found := nodes.find(group, NUM_WEIGHED, _but(avoid, fits)):
                    return found + self._by_prefix(found, group, nodes, _but(avoid, fits))
                if nodes.find(group, 1, _but(avoid, stands)):
                    return []  # they are full
        return []

    def _by_prefix(
        self, known: list[NodeView], group: Group, nodes: Side | Members, accepts: Accepts
    ) -> list[NodeView]:
        """Further nodes, those that have cached most of the prompt."""
        if not self.hits:
            return []
        seen = {node.node_id for node in known}
        others = (node_id for node_id in self.hits.longest_first() if node_id not in seen)
        members = (node for node_id in others if (node := nodes.member(group, node_id)))
        return list(islice(filter(accepts, islice(members, NUM_LOOKED_AT)), NUM_BY_PREFIX))


def need_at(node: NodeView, request: ScheduleRequest) -> Work:
    """The room that the request takes there, and the work that it brings."""
    return Work(
        prefill_tokens=request.num_prompt_tokens,
        num_sequences=1,
        num_blocks=node.num_blocks_for_prompt(request.num_prompt_tokens),
        context_tokens=request.num_prompt_tokens,
        output_tokens=expected_tokens(request.max_new_tokens, node.stop_rate),
    )


def num_missing_places(node: NodeView, ahead: Work) -> int:
    """In the batch, for one more behind those ahead."""
    return node.num_sequences + ahead.num_sequences + 1 - max(1, node.report.max_num_seqs)


def _has_room(node: NodeView, held: Work) -> bool:
    """Is there a block and a place left, beside `held`?"""
    return node.num_available_blocks > held.num_blocks and num_missing_places(node, held) <= 0


def _but(avoid: frozenset[str], accepts: Accepts) -> Accepts:
    """Those that are accepted, without these."""
    return (lambda node: node.node_id not in avoid and accepts(node)) if avoid else accepts


class Choice(msgspec.Struct, frozen=True, gc=False):
    """The pair, what it is predicted to take, and the best candidates of each side."""

    prefill: NodeView
    decode: NodeView
    predicted_s: float
    wait_s: float
    first_token_s: float
    prefill_s: float  # of its own, without the wait
    num_cached_tokens: int  # at prefill
    reason: str
    prefill_candidates: list[Candidate]
    decode_candidates: list[Candidate]


class _Pair(msgspec.Struct, frozen=True, gc=False):
    predicted_s: float
    prefill: Cost
    decode: Cost
    transfer_s: float


Chooser = Callable[[Weighing], Choice | None]


def choose(weighing: Weighing) -> Choice | None:
    """The best pair of the request's model; None when no pair has room for the prompt now.

    Ties go to the less loaded prefill node, then to the smaller node ids.
    """
    groups_of_model = weighing.groups
    whole = [group for group in groups_of_model if weighing.state.index.is_whole(group)]
    # A node with nobody to exchange blocks with serves alone, if nobody else can.
    for groups in (whole, groups_of_model):
        choices = [choice for group in groups if (choice := _choose_in(weighing, group))]
        if choices:
            return min(choices, key=lambda choice: choice.predicted_s)
    return None


def _choose_in(weighing: Weighing, group: Group) -> Choice | None:
    decode = weighing.decode_side(group)
    if not decode:
        return None
    prefill = weighing.prefill_side(group)
    staying = [(weighing.prefill_cost(d.node), d) for d in decode if _stays(weighing, d.node)]
    best = _best_pair(weighing, prefill, decode, staying)
    if best is None:
        return None
    num_pairs = len(prefill) * len(decode) + len(staying)
    return _choice(weighing.request, best, num_pairs, prefill, decode)


def _best_pair(
    weighing: Weighing, prefill: list[Cost], decode: list[Cost], staying: list[tuple[Cost, Cost]]
) -> _Pair | None:
    """Both sides come soonest first. So of equal pairs the first is kept, and of the decode nodes that are
    reached alike only the first is looked at."""
    best: _Pair | None = None
    best_s = math.inf
    for p in prefill:
        ways = set()
        for d in decode:
            if p.total_s + d.total_s >= best_s:
                break
            way = d.num_cached_tokens, weighing.way(p.node, d.node)
            if way in ways:
                continue
            ways.add(way)
            moved_s = weighing.transfer_s(p, *way)
            if p.total_s + moved_s + d.total_s < best_s:
                best_s = p.total_s + moved_s + d.total_s
                best = _Pair(best_s, p, d, moved_s)
    for p, d in staying:
        best = _better(best, _Pair(p.total_s + d.total_s, p, d, 0.0))
    return best


def _better(one: _Pair | None, other: _Pair) -> _Pair:
    return other if one is None or _pair_rank(other) < _pair_rank(one) else one


def _stays(weighing: Weighing, node: NodeView) -> bool:
    """May a prompt be computed where it will be decoded, though the node is no prefill node?

    Only where it disturbs nobody: lending is for more. And in steps that keep the rhythm of who comes next.
    """
    chunk_s = node.cap * node.speed.prefill_token_s
    is_idle = not (node.num_sequences or node.report.num_prompts or node.may_prefill)
    return is_idle and weighing.step_s(node) + chunk_s <= weighing.goals.itl_s


def added_work(request: ScheduleRequest, choice: Choice) -> tuple[Work, Work]:
    """What the choice adds to its prefill node and to its decode node."""
    return (
        Work(prefill_tokens=request.num_prompt_tokens - choice.num_cached_tokens),
        msgspec.structs.replace(need_at(choice.decode, request), prefill_tokens=0),
    )


def _pair_rank(pair: _Pair) -> tuple[float, float, str, str]:
    return pair.predicted_s, pair.prefill.total_s, pair.prefill.node.node_id, pair.decode.node.node_id


def _choice(
    request: ScheduleRequest, best: _Pair, num_pairs: int, prefill: list[Cost], decode: list[Cost]
) -> Choice:
    p, d = best.prefill, best.decode
    return Choice(
        prefill=p.node,
        decode=d.node,
        predicted_s=best.predicted_s,
        wait_s=p.wait_s,
        first_token_s=p.total_s,
        prefill_s=p.work_s,
        num_cached_tokens=p.num_cached_tokens,
        reason=(
            f"best of {num_pairs} pairs, {best.predicted_s:.3f} s to the second token: wait at "
            f"{p.node.node_id} {p.wait_s:.3f} s, prefill of "
            f"{request.num_prompt_tokens - p.num_cached_tokens} tokens {p.work_s:.3f} s, transfer "
            f"{best.transfer_s:.3f} s, step at {d.node.node_id} {d.work_s:.3f} s"
        ),
        prefill_candidates=[_candidate(cost, _prefill_reason(cost)) for cost in prefill[:NUM_TOLD]],
        decode_candidates=[_candidate(cost, _decode_reason(cost)) for cost in decode[:NUM_TOLD]],
    )


def _candidate(cost: Cost, reason: str) -> Candidate:
    return Candidate(node_id=cost.node.node_id, predicted_s=cost.total_s, reason=reason)


def _prefill_reason(cost: Cost) -> str:
    return f"{cost.node.num_queued_tokens} tokens ahead, {cost.num_cached_tokens} of the prompt cached"


def _decode_reason(cost: Cost) -> str:
    node = cost.node
    return (
        f"{node.num_sequences} of {node.report.max_num_seqs} sequences, "
        f"{node.num_available_blocks} blocks available, step {cost.work_s * 1e3:.0f} ms"
    )
