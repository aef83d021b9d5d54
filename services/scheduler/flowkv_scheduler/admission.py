"""Admission control: a request gets its pair now, is told when to ask again, or is refused.

Predicted waits come from what the sequences of a full node have still to produce: what a request and those
before it lack is a number of ends, and ends are a number of steps.

Pure: `now` is seconds of any clock.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec
from sortedcontainers import SortedDict

from flowkv_common import errors
from flowkv_common.wire.messages import ScheduleRequest, Wait
from flowkv_scheduler import policy
from flowkv_scheduler.cluster import ClusterState, Goals
from flowkv_scheduler.lookahead import IDLE_WAIT
from flowkv_scheduler.node_view import NOTHING, SHARED_ITL, NodeView, Work
from flowkv_scheduler.policy import Choice, Chooser, RequestCosts, excess_s, first_of_each_class
from flowkv_scheduler.prefixes import NO_HITS, Hits
from flowkv_scheduler.waiting import WAIT_ERROR, Later, Place, Rank, WaitingQueue

# A first token that is predicted within this part of the TTFT target comes in time: predictions err.
IN_TIME = 0.9
# A less urgent request is refused at this part of the longest wait: the rest is for others.
LESS_URGENT_SHARE = 0.5
# Without a live node of the model a request is refused when it is so old: one may be about to start.
NO_NODE_AGE_S = 10.0
# Of many nodes so many are asked when they will have room; by a request that waits at one, so many others.
# Room is kept at so many, for so many requests.
NUM_FORESEEN = 8
NUM_FORESEEN_AGAIN = 4
NUM_KEPT_AT = 32
NUM_KEPT_FOR = 32
# How soon a request that waits for room asks again.
MIN_RETRY_S = 0.05
MAX_RETRY_S = 0.5
# So many requests of the class `batch` may wait. Each asks twice a second, however long it waits: together
# they cost a tenth of the decisions that a scheduler can make.
MAX_BATCH_WAITING = 256


def decide(
    request: ScheduleRequest,
    state: ClusterState,
    goals: Goals,
    now: float,
    queue: WaitingQueue,
    *,
    hits: Hits | None = None,
    choose: Chooser = policy.choose,
) -> Choice | Later:
    """The pair that `choose` takes, or when to ask again, behind the requests of `queue` that come before it.

    A request that can't meet its TTFT goal is served when a prefill node has nothing else to do.

    Raises `BadRequest` when no pool could ever hold the request, `Unavailable` when there has been no node
    for too long, `Full` when the wait would be too long or outlast the request's deadline; `retry_after_s` is
    the predicted end of that.
    """
    place = queue.place_of(request, now)
    in_time_s = IN_TIME * goals.of_request(request).ttft_s - request.age_s
    while True:
        find_kept = functools.partial(room_kept, queue, place)
        costs = RequestCosts(
            request,
            state,
            goals,
            now,
            hits=hits,
            find_kept=find_kept,
            is_interruptible=place.is_interruptible,
        )
        choice = choose(costs) if has_free_place(costs, queue, place) else None
        later = None if choice else foresee_room(costs, queue, place)
        first_token_s = choice.first_token_s if choice else later.wait.first_token_in_s if later else 0.0
        if place.rank is not Rank.IN_TIME or first_token_s <= in_time_s:
            break
        place = place._replace(rank=Rank.LATE)  # look again, behind those in time
    if choice is not None:
        if place.rank is Rank.BATCH or (place.rank is Rank.LATE and first_token_s > in_time_s):
            choice, later = _take_idle_prefill(costs, queue, place, choice, choose)
        if choice is not None:
            # A running request is never refused: its client has seen half of the answer.
            if place.rank is not Rank.RUNNING:
                _check_deadline(request, choice.predicted_s)
            due_in_s = place.due_in_s(request, costs.goals, now)
            # A newcomer has its whole TTFT goal before it.
            interruptible_for_s = max(0.0, due_in_s - goals.ttft_s) if place.is_interruptible else 0.0
            return msgspec.structs.replace(choice, due_in_s=due_in_s, interruptible_for_s=interruptible_for_s)
    if later is None:
        return _without_nodes(costs)
    if place.rank is not Rank.RUNNING:
        later = later._replace(is_late=place.rank is Rank.LATE)
        _check_wait(costs, later, place, queue)
    return later


def _take_idle_prefill(
    costs: RequestCosts, queue: WaitingQueue, place: Place, choice: Choice, choose: Chooser
) -> tuple[Choice | None, Later]:
    """The pair of a request that must be in the way of no other: its prompt is the next one of its node.

    Or when a prefill node will have nothing else to do. One of the class `batch` comes after all others.
    """
    idle_s = IDLE_WAIT * costs.goals.ttft_s
    later = foresee_idle_prefill(costs, queue, place, choice)
    if later.wait_s > idle_s or (place.rank is Rank.BATCH and queue.has_others(costs.request.fingerprint)):
        return None, later
    if choice.wait_s <= idle_s:
        return choice, later
    # The best pair's is not idle: another one's may do.
    costs.longest_prefill_wait_s = idle_s
    return choose(costs), Later(later.wait, later.wait_s)  # the idle one is for those behind it


def _without_nodes(costs: RequestCosts) -> Later:
    request = costs.request
    if costs.has_nodes():
        return Later(Wait(retry_in_s=MAX_RETRY_S, reason="no decode node can take it now"))
    if request.age_s > NO_NODE_AGE_S:
        raise errors.Unavailable(
            f"no node of the model has been ready for {request.age_s:.0f} s", retry_after_s=NO_NODE_AGE_S
        )
    return Later(Wait(retry_in_s=MAX_RETRY_S, reason="no node of the model is ready"))


def _check_wait(costs: RequestCosts, later: Later, place: Place, queue: WaitingQueue) -> None:
    """A newcomer is refused for what is predicted, one that was told to wait for its age alone.

    One of the class `batch` waits for as long as its deadline allows.
    """
    request, is_known = costs.request, costs.request.request_id in queue
    if place.rank is Rank.BATCH:
        if not is_known and queue.num_batch(request.fingerprint) >= MAX_BATCH_WAITING:
            raise errors.Full(
                f"{MAX_BATCH_WAITING} requests of the class batch wait already",
                retry_after_s=max(later.wait_s, MAX_RETRY_S),
            )
    else:
        longest_s = costs.goals.longest_wait_s * (LESS_URGENT_SHARE if request.priority > 0 else 1.0)
        if is_known:
            if request.age_s > WAIT_ERROR * longest_s:
                raise _wait_too_long(request, later.wait_s, longest_s)
            return
        if request.age_s + later.wait_s > longest_s:
            raise _wait_too_long(request, later.wait_s, longest_s)
        # Who sets a longest wait means it.
        if (
            later.is_late
            and not costs.goals.max_wait_s
            and queue.is_late_overdue(request.fingerprint, costs.now)
        ):
            raise errors.Full(
                "the first token would be late, and others that are late wait for longer than was predicted",
                retry_after_s=max(later.wait_s, MAX_RETRY_S),
            )
    if not is_known:
        _check_deadline(request, later.wait.first_token_in_s)


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


def _check_fits(costs: RequestCosts) -> None:
    """Nodes that are not ready now count too: they may be when the request is asked for again."""
    request, members = costs.request, [group.members.values() for group in costs.groups]
    nodes: Iterator[NodeView] = itertools.chain.from_iterable(members)
    if not members or any(node.can_ever_hold(request) for node in nodes):
        return
    largest = max(node.num_tokens_held for node in itertools.chain.from_iterable(members))
    num_all = request.num_prompt_tokens + request.max_new_tokens
    raise errors.BadRequest(
        f"This model's maximum context length is {largest} tokens here: that is the largest KV cache. "
        f"However, you requested {num_all} tokens ({request.num_prompt_tokens} in the prompt, "
        f"{request.max_new_tokens} in the completion).",
        field="prompt" if request.num_prompt_tokens >= largest else "max_tokens",
    )


# --- room that is kept for requests ahead ----------------------------------------------------------


def has_free_place(costs: RequestCosts, queue: WaitingQueue, place: Place) -> bool:
    """Whether the decode side has more free places than requests that come before: each of them takes one.

    Of a short line each place is looked at, for some may be no use to those ahead.
    """
    if costs.request.max_new_tokens == 1:
        return True  # it takes none
    ahead = queue.work_ahead_of_model(costs.request.fingerprint, place)
    num_ahead = ahead.num_sequences - queue.work_ahead(_idle_line(costs), place).num_sequences
    return num_ahead < max(NUM_KEPT_FOR, sum(group.num_free_places for group in costs.groups))


def room_kept(queue: WaitingQueue, place: Place, costs: RequestCosts) -> dict[str, Work]:
    """Node id -> the room there that is kept for waiting requests before `place`.

    Each gets it at one node alone: where it stands, or else another that has enough for it now. If none
    has, room is saved where it stands until there is enough. A node with nothing left is not looked at
    again, and none is when no node is left with enough for the request itself. Only the roomiest nodes are
    looked at, and the first who wait: with more of both there is enough.
    """
    kept: dict[str, Work] = {}
    if not queue:
        return kept
    roomiest = itertools.chain.from_iterable(
        itertools.islice(group.roomiest.values(), NUM_KEPT_AT) for group in costs.groups
    )
    open_nodes = {
        node.node_id: node for node in roomiest if node.num_available_blocks > 0 and node.is_usable(costs.now)
    }
    free = {node_id: node.num_available_blocks for node_id, node in open_nodes.items()}
    most_free = max(free.values(), default=0)
    least_blocks, idle_line = costs.least_blocks(), _idle_line(costs)
    for other in itertools.islice(queue.ahead_of(place, costs.request.fingerprint), NUM_KEPT_FOR):
        if most_free < least_blocks:
            break  # there is no room for the request: who else waits makes it no less
        if other.node_id == idle_line:
            continue  # it takes its room only when its prompt can begin
        node, need = open_nodes.get(other.node_id), other.need
        if not need.num_sequences:  # none was told to one that found no node
            need = next(iter(open_nodes.values())).need_of(other.request, costs.lengths)
        if need.num_blocks <= most_free:
            own = (node,) if node else ()
            roomy = (
                one
                for one in itertools.chain(own, open_nodes.values())
                if need.num_blocks <= free[one.node_id]
            )
            node = _first_able(other.request, roomy, kept, costs) or node
        if node is None:
            continue
        held = kept[node.node_id] = kept[node.node_id].plus(need) if node.node_id in kept else need
        had_free = free[node.node_id]
        free[node.node_id] -= need.num_blocks
        if free[node.node_id] <= 0 or held.num_sequences >= node.num_free_places:
            del open_nodes[node.node_id], free[node.node_id]
        if had_free == most_free:
            most_free = max(free.values(), default=0)
    return kept


def _first_able(
    request: ScheduleRequest, nodes: Iterable[NodeView], kept: Mapping[str, Work], costs: RequestCosts
) -> NodeView | None:
    """The first of the nodes that may take the request beside what is kept there.

    All have enough blocks, without those that it would find cached.
    """
    goal_s = costs.cluster_goals.of_request(request).itl_s
    excess_tokens = request.num_prompt_tokens - costs.mean_prompt_tokens
    others_costs: RequestCosts | None = None
    for node in nodes:
        if node.node_id in request.avoid or not node.can_ever_hold(request):
            continue
        held = kept.get(node.node_id, NOTHING)
        # Most often its steps stay within the goal. Then no more need be known of the request.
        if excess_s(node, excess_tokens, held, goal_s) <= 0.0:
            return node
        others_costs = others_costs or RequestCosts(
            request, costs.state, costs.cluster_goals, costs.now, hits=NO_HITS
        )
        if others_costs.may_slow(node, held):
            return node
    return None


# --- predicted waits -------------------------------------------------------------------------------


def foresee_idle_prefill(costs: RequestCosts, queue: WaitingQueue, place: Place, choice: Choice) -> Later:
    """It has a pair, but waits until the prefill nodes are idle, behind the late requests before it."""
    line = _idle_line(costs)
    ahead = queue.work_ahead(line, place)
    prefill = _prefill_nodes(costs) or [choice.prefill]
    wait_s = _prompts_in_s(costs, prefill, ahead)
    wait = Wait(
        retry_in_s=_retry_in(wait_s),
        reason="the prefill nodes are busy with requests that can meet the TTFT target",
        first_token_in_s=wait_s + choice.prefill_s,
    )
    num_tokens = costs.request.num_prompt_tokens - choice.num_cached_tokens
    return Later(wait, wait_s, line, Work(prefill_tokens=num_tokens, num_sequences=1))


def _idle_line(costs: RequestCosts) -> str:
    """Those that wait for idle prefill nodes stand together, at no node."""
    return f"late {costs.request.fingerprint}"


def foresee_room(costs: RequestCosts, queue: WaitingQueue, place: Place) -> Later | None:
    """Decode nodes are full, would exceed the ITL target, or have just enough room for requests before it.

    Looks at the node where it stands and at some others, spread over all of them. None if no node could ever
    take it now. Raises `BadRequest` if none ever will.
    """
    _check_fits(costs)
    if not costs.has_nodes():
        return None
    request, own = costs.request, queue.node_of(costs.request.request_id)
    nodes: list[NodeView] = []
    for group in costs.groups:
        seen = _spread(group.decode, request, NUM_FORESEEN_AGAIN if own else NUM_FORESEEN)
        if seen and (view := costs.state.view(own)) and view.group == seen[0].group and view not in seen:
            seen.append(view)
        nodes += filter(costs.takes_sequence, seen)
    if not nodes:
        everyone = itertools.chain.from_iterable(group.members.values() for group in costs.groups)
        able = list(filter(costs.takes_sequence, everyone))
        nodes = [node for node in able if node.may_decode] or able
    if not nodes:
        return None
    prefill = _prefill_nodes(costs) or nodes
    prompts_s = _prompts_in_s(costs, prefill, queue.work_ahead_of_model(request.fingerprint, place))
    room_s, _, node = min(
        (_room_in_s(node, costs, queue.work_ahead(node.node_id, place)), node.node_id, node) for node in nodes
    )
    wait_s = max(room_s, prompts_s)
    wait = Wait(
        retry_in_s=_retry_in(room_s),
        reason=f"all {sum(len(group.decode) for group in costs.groups)} decode nodes are full",
        first_token_in_s=wait_s
        + min(costs.prefill_work_s(node, costs.num_cached_tokens(node)) for node in prefill),
    )
    return Later(wait, wait_s, node.node_id, costs.need_on(node))


def _spread(nodes: SortedDict, request: ScheduleRequest, most: int) -> list[NodeView]:
    """Of many `most`, evenly from a place that the request and its age decide: each asks others each time."""
    num = len(nodes)
    if num <= NUM_FORESEEN:
        return list(nodes.values())
    start = zlib.crc32(f"{request.request_id} {request.age_s}".encode())
    return [nodes.peekitem((start + place * num // most) % num)[1] for place in range(most)]


def _prefill_nodes(costs: RequestCosts) -> list[NodeView]:
    """The soonest of those that prefill and take the prompt; if none prefills, some of all."""
    sides = [group.prefill or group.members for group in costs.groups]
    soonest = (first_of_each_class(side, costs.takes_prompt, lambda _: True, NUM_FORESEEN) for side in sides)
    return list(itertools.chain.from_iterable(soonest))


def _retry_in(wait_s: float) -> float:
    """Half of the wait: so it is there in time, though rarely asked for while it is far back."""
    return min(max(wait_s / 2, MIN_RETRY_S), MAX_RETRY_S)


def _room_in_s(node: NodeView, costs: RequestCosts, ahead: Work) -> float:
    """Seconds until the request fits there, behind `ahead`, which waits for room on the node too."""
    # Each sequence that ends frees an equal share of the blocks.
    num_missing_blocks = costs.num_missing_blocks(node, ahead)
    num_taken = max(1, node.descriptor.num_blocks - node.num_available_blocks)
    for_blocks = num_missing_blocks * max(1, node.num_sequences) / num_taken
    for_room_s = _ends_in_s(node, costs, ahead, max(for_blocks, node.num_missing_places(ahead)))
    return max(for_room_s, _itl_in_s(node, costs, ahead)) if costs.must_meet_itl else for_room_s


def _prompts_in_s(costs: RequestCosts, prefill: Sequence[NodeView], ahead: Work) -> float:
    """Seconds until the prefill side has computed what comes before the request there, and `ahead`."""
    soonest_s = min(map(costs.prefill_wait_s, prefill))
    tokens_per_s: float = sum(group.prompt_tokens_per_s for group in costs.groups)
    return soonest_s + (ahead.prefill_tokens / tokens_per_s if tokens_per_s > 0.0 else 0.0)


def _itl_in_s(node: NodeView, costs: RequestCosts, ahead: Work) -> float:
    """Seconds until the node meets the ITL target with the request, behind `ahead`."""
    excess_s = costs.itl_excess_s(node, ahead)
    if excess_s <= 0.0:
        return 0.0
    if 0.0 < costs.itl_excess_s(node) <= node.chunk_s and not node.helps_decode:
        return node.idle_wait_s  # it will when the prompts that wait there are computed
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
    whole = costs.need_on(node).output_tokens
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
