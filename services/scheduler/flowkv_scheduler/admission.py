"""Decides whether a request gets its pair now, asks again, or is refused with a retry time that is true.

Pure. The gateway does the waiting and comes back with its age, so no queue is kept here; only who waits is
known (`waiting.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from flowkv_common import errors
from flowkv_common.wire.messages import ScheduleRequest, Wait
from flowkv_scheduler import policy
from flowkv_scheduler.drain import lent_soon, prompts_in_s, room_in_s
from flowkv_scheduler.policy import Choice, Chooser
from flowkv_scheduler.state import ClusterState
from flowkv_scheduler.view import NOTHING, NodeView, Work
from flowkv_scheduler.waiting import Waiting
from flowkv_scheduler.weighing import Goals, Weighing, need_at

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
