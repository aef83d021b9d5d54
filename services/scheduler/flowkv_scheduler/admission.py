"""When a full node has room for one more: from what its sequences have still to produce. Pure arithmetic.

The one place where the door foresees a wait. Sequences end one by one; what the request and those before it
lack of blocks, places and rhythm is told as a number of ends, and ends as a number of steps.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from flowkv_common import errors
from flowkv_common.wire.messages import ScheduleRequest, Wait
from flowkv_scheduler import policy
from flowkv_scheduler.cluster import ClusterState
from flowkv_scheduler.policy import Choice, Chooser, Goals, Weighing, need_at, num_missing_places
from flowkv_scheduler.rebalance import FULL_PREFILL, SHARED, Thresholds
from flowkv_scheduler.views import NOTHING, NodeView, Work
from flowkv_scheduler.waiting import Waiting

AT = Thresholds()


def room_in_s(node: NodeView, weighing: Weighing, ahead: Work) -> float:
    """Seconds until the request fits there, behind `ahead`, which waits for room on the node too."""
    for_room = max(_ends_for_blocks(node, weighing, ahead), num_missing_places(node, ahead))
    for_room_s = _ends_in_s(node, weighing, ahead, for_room)
    if not weighing.respects_rhythm(node):
        return for_room_s
    for_rhythm_s = _rhythm_in_s(node, weighing, ahead)
    # For the sake of rhythm nobody waits for longer, unless prompts would be held up.
    if not node.helps_decode:
        for_rhythm_s = min(for_rhythm_s, weighing.patience_s)
    return max(for_room_s, for_rhythm_s)


def prompts_in_s(nodes: list[NodeView], ahead: Work) -> float:
    """Seconds until these nodes have computed what is queued there, and the prompts of those ahead."""
    soonest_s = min((node.prefill_wait_s for node in nodes), default=0.0)
    if not ahead.num_sequences:
        return soonest_s
    num_tokens, mean = ahead.prefill_tokens, ahead.prefill_tokens / ahead.num_sequences
    alone_s = (node.speed.queue_s(num_tokens, mean, node.chunk, node.chunk_beside_s) for node in nodes)
    return soonest_s + 1.0 / sum(1.0 / max(seconds, 1e-9) for seconds in alone_s)


def lent_soon(nodes: list[NodeView], weighing: Weighing) -> NodeView | None:
    """The prefill node that lending will let decode besides, as it will be then; None if it won't, or has.

    It will if prefill has little to do while those who wait get their room one by one. The last node of the
    side goes on with prompts.
    """
    decode = [node for node in nodes if node.may_decode]
    prefill = [node for node in nodes if node.may_prefill and node.descriptor.role == "prefill"]
    if not decode or not prefill or any(node.descriptor.role == "prefill" for node in decode):
        return None
    idlest, *others = sorted(prefill, key=lambda node: (node.prefill_wait_s, node.node_id))
    ends_per_s = sum(
        node.num_sequences / (node.step_s * need_at(node, weighing.request).output_tokens) for node in decode
    )
    staying = others or prefill
    capacity = sum(1.0 / node.speed.prefill_token_s for node in staying) * (1.0 if others else SHARED)
    if ends_per_s * weighing.request.num_prompt_tokens > AT.calm * FULL_PREFILL * capacity:
        return None
    return msgspec.structs.replace(
        idlest,
        may_decode=True,
        may_prefill=not others,
        chunk_s=0.0,
        step_s=idlest.step_s - idlest.chunk_s,
    )


def _ends_for_blocks(node: NodeView, weighing: Weighing, ahead: Work) -> float:
    """Each sequence gives an equal share of what is taken."""
    missing = weighing.num_missing_blocks(node) + ahead.num_blocks
    num_taken = max(1, node.descriptor.num_blocks - node.num_available_blocks)
    return max(0, missing) * max(1, node.num_sequences) / num_taken


def _rhythm_in_s(node: NodeView, weighing: Weighing, ahead: Work) -> float:
    if weighing.is_held_up_by_prompts(node):
        return node.prefill_wait_s
    over_s = weighing.over_s(node, ahead)
    if over_s <= 0.0:
        return 0.0
    num = max(1, node.num_sequences)
    each_s = node.speed.beside_s(1, 0) + node.num_context_tokens / num * node.speed.context_token_s
    num_all = node.num_sequences + ahead.num_sequences  # when all have left it is idle, and good enough
    return _ends_in_s(node, weighing, ahead, over_s / each_s if over_s < num_all * each_s else num_all)


def _ends_in_s(node: NodeView, weighing: Weighing, ahead: Work, num_ends: float) -> float:
    """Until so many sequences have ended, those ahead among them as soon as they have had their turn.

    Those that run are taken to end evenly, the first after `first_ends_in` steps, the last when a request
    like this one would, had it begun now; later ones live for as long as this one will.
    """
    if num_ends <= 0.0:
        return 0.0
    whole = need_at(node, weighing.request).output_tokens
    # So many run at once: those who do, and those ahead who still find room.
    num = max(1.0, node.num_sequences + ahead.num_sequences + 1 - num_ends)
    mean = (node.tokens_left + max(0.0, num - node.num_sequences) * whole) / num
    first = min(node.first_ends_in, mean)
    last = max(mean, min(2.0 * mean - first, whole))
    steps = first + (last - first) * min(1.0, num_ends / num)
    if num_ends > num:
        steps += (num_ends / num - 1.0) * whole
    joining = max(0.0, num - node.num_sequences - 1)
    context = joining * weighing.request.num_prompt_tokens
    step_s = weighing.step_s(node) + joining * node.speed.sequence_s + context * node.speed.context_token_s
    if node.helps_decode:  # its prompts fill up its steps
        step_s = max(step_s, AT.rhythm_share * weighing.goals.itl_s)
    return steps * step_s


# A wait may turn out so many times longer than was foreseen: who was let in stays for that.
ERROR = 1.5
# A less urgent request is refused at this part of the longest wait: the rest is for others.
LESS_URGENT_SHARE = 0.5


class Limits(msgspec.Struct, frozen=True):
    """Seconds: how long a request may look for nodes, and how soon it is asked for again.

    Where nodes are lent, that takes `lent_in_s` from when they are idle.
    """

    no_node_age_s: float = 10.0
    no_node_retry_s: float = 0.25
    min_retry_s: float = 0.05
    max_retry_s: float = 0.5
    lends: bool = False
    lent_in_s: float = 3.0


class Later(NamedTuple):
    """When to ask again. Until then `need` is saved for the request at the node; "" is none."""

    wait: Wait
    node_id: str = ""
    need: Work = NOTHING


def decide(
    request: ScheduleRequest,
    state: ClusterState,
    goals: Goals,
    limits: Limits,
    now: float,
    choose: Chooser = policy.choose,
    waiting: Waiting | None = None,
) -> Choice | Later:
    """The pair that `choose` takes, or when to ask again, behind those of `waiting` who come before it.

    Raises `BadRequest` when no pool could ever hold the request, `Unavailable` when there has been no node
    for too long, `Full` when the wait would be too long or outlast the request's deadline; `retry_after_s` is
    the predicted end of that.
    """
    weighing = Weighing(request, state, goals, now, waiting)
    choice = choose(weighing)
    if choice is None:
        _check_fits(request, [node for node in state.views() if weighing.is_of_model(node)])
        if not any(weighing.stands(group) for group in weighing.groups):
            return Later(_without_nodes(request, limits))
        return _without_room(request, weighing, limits)
    _check_wait(weighing, choice.wait_s, choice.predicted_s, has_pair=True)
    return choice


def longest_wait_s(request: ScheduleRequest, goals: Goals) -> float:
    """Never longer for a less urgent request than for a more urgent one."""
    return goals.max_wait_s * (LESS_URGENT_SHARE if request.priority > 0 else 1.0)


def _check_wait(weighing: Weighing, wait_s: float, predicted_s: float, *, has_pair: bool = False) -> None:
    """At the door. Who has been let in is not sent away for what is foreseen later, but when its age says so,
    and even then not if there is a pair for it.

    The retry of a running request is never shed: its client has seen half of the answer.
    """
    request = weighing.request
    if request.num_output_tokens:
        return
    longest_s = longest_wait_s(request, weighing.goals)
    is_in = request.request_id in weighing.waiting
    over_s = request.age_s + wait_s - longest_s
    if (request.age_s > ERROR * longest_s and not has_pair) if is_in else over_s > 0.0:
        raise errors.Full(
            f"the first token would wait for about {request.age_s + wait_s:.1f} s, "
            f"at most {longest_s:.1f} s are admitted",
            retry_after_s=over_s,
        )
    if predicted_s > request.deadline_in_s and (has_pair or not is_in):
        raise errors.Full(
            f"{predicted_s:.1f} s to the second token, the request has {request.deadline_in_s:.1f} s left",
            retry_after_s=predicted_s - request.deadline_in_s,
        )


def _check_fits(request: ScheduleRequest, nodes: Sequence[NodeView]) -> None:
    """Nodes count that are not ready now, too: they may be when the request is asked for again."""
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


def _without_nodes(request: ScheduleRequest, limits: Limits) -> Wait:
    if request.age_s > limits.no_node_age_s:
        raise errors.Unavailable(
            f"no node of the model has been ready for {request.age_s:.0f} s",
            retry_after_s=limits.no_node_age_s,
        )
    return Wait(retry_in_s=limits.no_node_retry_s, reason="no node of the model is ready")


def _without_room(request: ScheduleRequest, weighing: Weighing, limits: Limits) -> Later:
    """Decode nodes are full, would lose their rhythm, or have just enough room for those who came before.

    The request stands at the node that has room for it first. Its prompt comes after all of those before it.
    """
    usable = list(weighing.state.usable(weighing.now))
    able = [node for node in usable if weighing.takes_sequence(node)]
    nodes = [node for node in able if node.may_decode] or able
    if not nodes:
        return Later(Wait(retry_in_s=limits.max_retry_s, reason="no decode node can take it now"))
    waiting, turn = weighing.waiting, weighing.turn
    ahead = {node.node_id: waiting.ahead_at(node.node_id, turn) for node in nodes}
    prefill = [node for node in usable if node.may_prefill and weighing.takes_prompt(node)]
    prompts_s = prompts_in_s(prefill or able, functools.reduce(Work.plus, ahead.values()))
    room_s = [(room_in_s(node, weighing, ahead[node.node_id]), node.node_id, node) for node in nodes]
    if limits.lends and (helper := lent_soon(able, weighing)):
        free_s = helper.prefill_wait_s + limits.lent_in_s
        behind_s = room_in_s(helper, weighing, waiting.ahead_at(helper.node_id, turn))
        room_s.append((free_s + behind_s, helper.node_id, helper))
    first_s, _, first = min(room_s, key=lambda found: found[:2])
    wait_s = max(first_s, prompts_s)
    first_token_s = wait_s + min(weighing.prefill_cost(node).work_s for node in prefill or able)
    _check_wait(weighing, wait_s, first_token_s)
    # Half of the wait: so it is there in time, though rarely asked for while it is far back.
    retry_in_s = min(max(first_s / 2, limits.min_retry_s), limits.max_retry_s)
    wait = Wait(
        retry_in_s=retry_in_s,
        reason=f"all {len(nodes)} decode nodes are full",
        first_token_in_s=first_token_s,
    )
    return Later(wait, first.node_id, need_at(first, request))
