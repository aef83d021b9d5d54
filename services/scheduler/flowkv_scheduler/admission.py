"""Admission control: a request gets its pair now, is told when to ask again, or is refused.

Gateways do the waiting; `WaitingQueue` only knows which requests wait, in which order they are served, and
at which node each of them stands. Predicted waits come from what the sequences of a full node have still to
produce: what a request and those before it lack is a number of ends, and ends are a number of steps.

Pure: `now` is seconds of any clock.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec
from sortedcontainers import SortedDict, SortedList

from flowkv_common import errors
from flowkv_common.wire.messages import ScheduleRequest, Wait
from flowkv_scheduler import policy
from flowkv_scheduler.cluster import NOTHING, ClusterState, Goals, NodeView, Work
from flowkv_scheduler.policy import Choice, Chooser, RequestCosts
from flowkv_scheduler.prefixes import NO_HITS
from flowkv_scheduler.rebalance import CALM_PRESSURE, FULL_PREFILL, SHARED, SHARED_ITL

# A wait may last so many times longer than was predicted: an admitted request stays for that.
WAIT_ERROR = 1.5
# A less urgent request is refused at this part of the longest wait: the rest is for others.
LESS_URGENT_SHARE = 0.5
# Without a live node of the model a request asks again after this, and is refused when it is so old.
NO_NODE_RETRY_S = 0.25
NO_NODE_AGE_S = 10.0
# How soon a request that waits for room asks again.
MIN_RETRY_S = 0.05
MAX_RETRY_S = 0.5
# From when a prefill node is idle, lending it takes so long.
LENT_IN_S = 3.0
# A request that is so much too late to ask again is gone, and its gateway perhaps too.
GRACE_S = 1.0
# Each step of priority counts as so many seconds of age, up to a minute: no request waits forever.
PRIORITY_S = 10.0
MAX_PRIORITY = 6


class Place(NamedTuple):
    """The order of service: requests whose client has output first, then the oldest; priority is age."""

    is_new: bool
    since: float
    request_id: str


class Waiter(NamedTuple):
    """`need`: the room that it takes, and the work that it brings."""

    request: ScheduleRequest
    place: Place
    node_id: str
    need: Work
    began: float
    until: float


class _NodeQueue(NamedTuple):
    """The requests that stand at one node."""

    places: SortedList
    need: Work  # of all of them


class WaitingQueue:
    """A request that does not ask again is forgotten.

    All operations take O(log n), but for `ahead_of`, which goes through those ahead.
    """

    def __init__(self) -> None:
        self._waiters: dict[str, Waiter] = {}
        self._in_order: SortedDict = SortedDict()  # place -> waiter
        self._at_nodes: dict[str, _NodeQueue] = {}
        self._ends: SortedDict = SortedDict()  # (until, request id) -> None

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiters

    def __len__(self) -> int:
        return len(self._waiters)

    def place_of(self, request: ScheduleRequest, now: float) -> Place:
        """It stays what it was when the request first came."""
        known = self._waiters.get(request.request_id)
        began = known.began if known else now - request.age_s
        priority = min(max(request.priority, -MAX_PRIORITY), MAX_PRIORITY)
        return Place(not request.num_output_tokens, began + PRIORITY_S * priority, request.request_id)

    def ahead_of(self, place: Place) -> Iterator[Waiter]:
        """All that come before it, in their order."""
        for other in self._in_order:
            if other >= place:
                return
            yield self._in_order[other]

    def work_ahead(self, node_id: str, place: Place) -> Work:
        """The need of those before it at the node: as many as there are, of the mean of all there."""
        queue = self._at_nodes.get(node_id)
        return queue.need.share(queue.places.bisect_left(place), len(queue.places)) if queue else NOTHING

    def add_waiter(
        self, request: ScheduleRequest, node_id: str, need: Work, retry_in_s: float, now: float
    ) -> None:
        """It will ask again, and until then stands at that node."""
        known = self._waiters.get(request.request_id)
        began = known.began if known else now - request.age_s
        place, until = self.place_of(request, now), now + retry_in_s + GRACE_S
        self.forget(request.request_id)
        waiter = Waiter(request, place, node_id, need, began, until)
        self._waiters[request.request_id] = self._in_order[place] = waiter
        self._ends[until, request.request_id] = None
        queue = self._at_nodes.get(node_id, _NodeQueue(SortedList(), NOTHING))
        queue.places.add(place)
        self._at_nodes[node_id] = queue._replace(need=queue.need.plus(need))

    def forget(self, request_id: str) -> None:
        """It has got its pair, or was refused."""
        waiter = self._waiters.pop(request_id, None)
        if waiter is None:
            return
        del self._in_order[waiter.place]
        del self._ends[waiter.until, request_id]
        queue = self._at_nodes.pop(waiter.node_id)
        queue.places.remove(waiter.place)
        if queue.places:
            self._at_nodes[waiter.node_id] = queue._replace(need=queue.need.plus(waiter.need, -1))

    def forget_gone(self, now: float) -> None:
        """Those that should have asked again and have not."""
        while self._ends and (end := self._ends.peekitem(0)[0])[0] < now:
            self.forget(end[1])


class Later(NamedTuple):
    """When to ask again. Until then `need` is saved for the request at the node; "" is none."""

    wait: Wait
    node_id: str = ""
    need: Work = NOTHING


def decide(
    request: ScheduleRequest,
    state: ClusterState,
    goals: Goals,
    now: float,
    queue: WaitingQueue,
    *,
    lends: bool = False,
    choose: Chooser = policy.choose,
) -> Choice | Later:
    """The pair that `choose` takes, or when to ask again, behind the requests of `queue` that come before it.

    `lends`: prefill nodes are lent to decode where that helps.

    Raises `BadRequest` when no pool could ever hold the request, `Unavailable` when there has been no node
    for too long, `Full` when the wait would be too long or outlast the request's deadline; `retry_after_s` is
    the predicted end of that.
    """
    place = queue.place_of(request, now)
    costs = RequestCosts(request, state, goals, now, find_kept=functools.partial(room_kept, queue, place))
    longest_s = goals.max_wait_s * (LESS_URGENT_SHARE if request.priority > 0 else 1.0)
    # A running request is never refused: its client has seen half of the answer.
    is_running, is_waiting = request.num_output_tokens > 0, request.request_id in queue
    choice = choose(costs)
    if choice is not None:
        if not is_running:
            if not is_waiting and request.age_s + choice.wait_s > longest_s:
                raise _wait_too_long(request, choice.wait_s, longest_s)
            _check_deadline(request, choice.predicted_s)
        return choice
    _check_fits(request, [node for node in state.views() if costs.is_of_model(node)])
    if not costs.has_nodes():
        if request.age_s > NO_NODE_AGE_S:
            raise errors.Unavailable(
                f"no node of the model has been ready for {request.age_s:.0f} s", retry_after_s=NO_NODE_AGE_S
            )
        return Later(Wait(retry_in_s=NO_NODE_RETRY_S, reason="no node of the model is ready"))
    room = foresee_room(costs, queue, place, lends=lends)
    if room is None:
        return Later(Wait(retry_in_s=MAX_RETRY_S, reason="no decode node can take it now"))
    if is_waiting and not is_running:
        # Once admitted it is refused for its age alone, not for what is predicted later.
        if request.age_s > WAIT_ERROR * longest_s:
            raise _wait_too_long(request, room.wait_s, longest_s)
    elif not is_running:
        if request.age_s + room.wait_s > longest_s:
            raise _wait_too_long(request, room.wait_s, longest_s)
        _check_deadline(request, room.first_token_s)
    wait = Wait(
        # Half of the wait: so it is there in time, though rarely asked for while it is far back.
        retry_in_s=min(max(room.room_s / 2, MIN_RETRY_S), MAX_RETRY_S),
        reason=f"all {room.num_nodes} decode nodes are full",
        first_token_in_s=room.first_token_s,
    )
    return Later(wait, room.node.node_id, room.node.need_of(request))


def _wait_too_long(request: ScheduleRequest, wait_s: float, longest_s: float) -> errors.Full:
    return errors.Full(
        f"the first token would wait for about {request.age_s + wait_s:.1f} s, "
        f"at most {longest_s:.1f} s are admitted",
        retry_after_s=request.age_s + wait_s - longest_s,
    )


def _check_deadline(request: ScheduleRequest, predicted_s: float) -> None:
    if predicted_s > request.deadline_in_s:
        raise errors.Full(
            f"{predicted_s:.1f} s to the second token, the request has {request.deadline_in_s:.1f} s left",
            retry_after_s=predicted_s - request.deadline_in_s,
        )


def _check_fits(request: ScheduleRequest, nodes: Sequence[NodeView]) -> None:
    """Nodes that are not ready now count too: they may be when the request is asked for again."""
    if not nodes or any(node.can_ever_hold(request) for node in nodes):
        return
    largest = max(node.num_tokens_held for node in nodes)
    num_all = request.num_prompt_tokens + request.max_new_tokens
    raise errors.BadRequest(
        f"This model's maximum context length is {largest} tokens here: that is the largest KV cache. "
        f"However, you requested {num_all} tokens ({request.num_prompt_tokens} in the prompt, "
        f"{request.max_new_tokens} in the completion).",
        field="prompt" if request.num_prompt_tokens >= largest else "max_tokens",
    )


# --- room that is kept for requests ahead ----------------------------------------------------------


def room_kept(queue: WaitingQueue, place: Place, costs: RequestCosts) -> dict[str, Work]:
    """Node id -> the room there that is kept for waiting requests before `place`.

    Each gets it at one node alone: where it stands, or else another that has enough for it now. If none
    has, room is saved where it stands until there is enough. A node with nothing left is not looked at
    again, so this takes a step per waiting request and one per free place.
    """
    kept: dict[str, Work] = {}
    if not queue:
        return kept
    usable = list(filter(costs.is_of_model, costs.state.usable(costs.now)))
    decode = [node for node in usable if node.may_decode] or usable
    open_nodes = {node.node_id: node for node in decode if _is_open(node, NOTHING)}
    for other in queue.ahead_of(place):
        if not open_nodes:
            break
        if other.request.fingerprint != costs.request.fingerprint:
            continue
        node = own = open_nodes.get(other.node_id)
        for one in [own, *open_nodes.values()] if own else open_nodes.values():
            if _could_take(one, other.request, kept.get(one.node_id, NOTHING), costs):
                node = one
                break
        if node is None:
            continue
        held = kept.get(node.node_id, NOTHING).plus(node.need_of(other.request))
        kept[node.node_id] = held
        if not _is_open(node, held):
            del open_nodes[node.node_id]
    return kept


def _is_open(node: NodeView, held: Work) -> bool:
    """Is there a block and a place left, beside `held`?"""
    return node.num_available_blocks > held.num_blocks and node.num_missing_places(held) <= 0


def _could_take(node: NodeView, other: ScheduleRequest, held: Work, costs: RequestCosts) -> bool:
    """Would a usable node of its model have room for a waiting request, beside `held`, if it asked now?"""
    num_blocks = node.descriptor.layout.blocks_for_prompt(other.num_prompt_tokens)
    if num_blocks + held.num_blocks > node.num_available_blocks or node.node_id in other.avoid:
        return False  # most often, and soon seen
    if not node.can_ever_hold(other):
        return False
    # It has the blocks without those that it would find cached.
    others_costs = RequestCosts(other, costs.state, costs.goals, costs.now, hits=NO_HITS)
    return others_costs.joins_batch(node, held)


# --- predicted waits -------------------------------------------------------------------------------


class Room(NamedTuple):
    """Where a request that fits nowhere will have room first, and the seconds until then."""

    node: NodeView
    room_s: float
    wait_s: float  # until its prompt begins: with room, and after all prompts before it
    first_token_s: float
    num_nodes: int  # that could have given it room


def foresee_room(costs: RequestCosts, queue: WaitingQueue, place: Place, *, lends: bool) -> Room | None:
    """Decode nodes are full, would exceed the ITL target, or have just enough room for requests before it.

    None if no node could ever take it now.
    """
    usable = list(costs.state.usable(costs.now))
    able = [node for node in usable if costs.takes_sequence(node)]
    nodes = [node for node in able if node.may_decode] or able
    if not nodes:
        return None
    ahead = {node.node_id: queue.work_ahead(node.node_id, place) for node in nodes}
    prefill = [node for node in usable if node.may_prefill and costs.takes_prompt(node)] or able
    prompts_s = _prompts_in_s(prefill, functools.reduce(Work.plus, ahead.values()))
    rooms = [(_room_in_s(node, costs, ahead[node.node_id]), node.node_id, node) for node in nodes]
    if lends and (helper := _lent_soon(able, costs)):
        free_s = helper.prefill_wait_s + LENT_IN_S
        behind_s = _room_in_s(helper, costs, queue.work_ahead(helper.node_id, place))
        rooms.append((free_s + behind_s, helper.node_id, helper))
    room_s, _, node = min(rooms, key=lambda room: room[:2])
    wait_s = max(room_s, prompts_s)
    first_token_s = wait_s + min(costs.prefill_cost(node).work_s for node in prefill)
    return Room(node, room_s, wait_s, first_token_s, len(nodes))


def _room_in_s(node: NodeView, costs: RequestCosts, ahead: Work) -> float:
    """Seconds until the request fits there, behind `ahead`, which waits for room on the node too."""
    # Each sequence that ends frees an equal share of the blocks.
    num_missing_blocks = max(0, costs.num_missing_blocks(node) + ahead.num_blocks)
    num_taken = max(1, node.descriptor.num_blocks - node.num_available_blocks)
    for_blocks = num_missing_blocks * max(1, node.num_sequences) / num_taken
    for_room_s = _ends_in_s(node, costs, ahead, max(for_blocks, node.num_missing_places(ahead)))
    if not costs.must_meet_itl(node):
        return for_room_s
    for_itl_s = _itl_in_s(node, costs, ahead)
    # The ITL target delays no request for longer, unless prompts would be delayed.
    if not node.helps_decode:
        for_itl_s = min(for_itl_s, costs.patience_s)
    return max(for_room_s, for_itl_s)


def _prompts_in_s(nodes: Sequence[NodeView], ahead: Work) -> float:
    """Seconds until these nodes have computed what is queued there, and the prompts of `ahead`."""
    soonest_s = min((node.prefill_wait_s for node in nodes), default=0.0)
    if not ahead.num_sequences:
        return soonest_s
    num_tokens, mean = ahead.prefill_tokens, ahead.prefill_tokens / ahead.num_sequences
    alone_s = (node.speed.queue_s(num_tokens, mean, node.chunk_tokens, node.chunk_beside_s) for node in nodes)
    return soonest_s + 1.0 / sum(1.0 / max(seconds, 1e-9) for seconds in alone_s)


def _lent_soon(nodes: Sequence[NodeView], costs: RequestCosts) -> NodeView | None:
    """The prefill node that lending will let decode besides, as it will be then; None if it won't, or has.

    It will if prefill has little to do while the waiting requests get their room one by one. The last node
    of the side goes on with prompts.
    """
    decode = [node for node in nodes if node.may_decode]
    prefill = [node for node in nodes if node.may_prefill and node.descriptor.role == "prefill"]
    if not decode or not prefill or any(node.descriptor.role == "prefill" for node in decode):
        return None
    idlest, *others = sorted(prefill, key=lambda node: (node.prefill_wait_s, node.node_id))
    request = costs.request
    ends_per_s = sum(
        node.num_sequences / (node.step_s * node.need_of(request).output_tokens) for node in decode
    )
    staying = others or prefill
    capacity = sum(1.0 / node.speed.prefill_token_s for node in staying) * (1.0 if others else SHARED)
    if ends_per_s * request.num_prompt_tokens > CALM_PRESSURE * FULL_PREFILL * capacity:
        return None
    return msgspec.structs.replace(
        idlest,
        may_decode=True,
        may_prefill=not others,
        chunk_s=0.0,
        step_s=idlest.step_s - idlest.chunk_s,
    )


def _itl_in_s(node: NodeView, costs: RequestCosts, ahead: Work) -> float:
    """Seconds until the node meets the ITL target with the request, behind `ahead`."""
    if 0.0 < costs.itl_excess_s(node) <= node.chunk_s and not node.helps_decode:
        return node.prefill_wait_s  # it will when the prompts that wait there are computed
    excess_s = costs.itl_excess_s(node, ahead)
    if excess_s <= 0.0:
        return 0.0
    num = max(1, node.num_sequences)
    each_s = node.speed.beside_s(1, 0) + node.num_context_tokens / num * node.speed.context_token_s
    num_all = node.num_sequences + ahead.num_sequences  # when all have left it is idle, and good enough
    return _ends_in_s(node, costs, ahead, excess_s / each_s if excess_s < num_all * each_s else num_all)


def _ends_in_s(node: NodeView, costs: RequestCosts, ahead: Work, num_ends: float) -> float:
    """Seconds until so many sequences have ended, those of `ahead` among them, once they have run.

    Those that run are taken to end evenly, the first after `first_ends_in` steps, the last when a request
    like this one would, had it begun now; later ones live for as long as this one will.
    """
    if num_ends <= 0.0:
        return 0.0
    whole = node.need_of(costs.request).output_tokens
    # So many run at once: those that do, and those of `ahead` that still find room.
    num = max(1.0, node.num_sequences + ahead.num_sequences + 1 - num_ends)
    mean = (node.tokens_left + max(0.0, num - node.num_sequences) * whole) / num
    first = min(node.first_ends_in, mean)
    last = max(mean, min(2.0 * mean - first, whole))
    steps = first + (last - first) * min(1.0, num_ends / num)
    if num_ends > num:
        steps += (num_ends / num - 1.0) * whole
    joining = max(0.0, num - node.num_sequences - 1)
    context = joining * costs.request.num_prompt_tokens
    step_s = costs.step_s(node) + joining * node.speed.sequence_s + context * node.speed.context_token_s
    if node.helps_decode:  # its prompts fill up its steps
        step_s = max(step_s, SHARED_ITL * costs.goals.itl_s)
    return steps * step_s
