"""Decides whether a request gets its pair now, asks again, or is refused with a retry time that is true.

Pure. The gateway does the waiting and comes back with its age, so no queue is kept here; only how many wait
is known (`waiting.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from flowkv_common import errors
from flowkv_common.wire.messages import ScheduleRequest, Wait
from flowkv_scheduler import policy
from flowkv_scheduler.policy import Choice, Chooser
from flowkv_scheduler.state import ClusterState
from flowkv_scheduler.view import NodeView
from flowkv_scheduler.weighing import ASSUMED_TOKENS_LEFT, Goals, Weighing

# A less urgent request is refused at this part of the longest wait: the rest is for others.
LESS_URGENT_SHARE = 0.5


class Limits(msgspec.Struct, frozen=True):
    """Seconds: how long a request may look for nodes, and how soon it is asked for again."""

    no_node_age_s: float = 10.0
    no_node_retry_s: float = 0.25
    min_retry_s: float = 0.05
    max_retry_s: float = 0.5


def decide(
    request: ScheduleRequest,
    state: ClusterState,
    goals: Goals,
    limits: Limits,
    now: float,
    choose: Chooser = policy.choose,
    num_ahead: int = 0,
) -> Choice | Wait:
    """The pair that `choose` takes, or when to ask again. `num_ahead` others wait for room before it.

    Raises `BadRequest` when no pool could ever hold the request, `Unavailable` when there has been no node
    for too long, `Full` when the wait would be too long or outlast the request's deadline; `retry_after_s` is
    the predicted end of that.
    """
    weighing = Weighing(request, state, goals, now)
    choice = choose(weighing)
    if choice is None:
        _check_fits(request, [node for node in state.views() if weighing.is_of_model(node)])
        if not any(weighing.stands(group) for group in weighing.groups):
            return _without_nodes(request, limits)
        return _without_room(request, weighing, limits, num_ahead)
    # The retry of a running request is never shed: its client has seen half of the answer.
    if not request.num_output_tokens:
        _check_wait(request, request.age_s + choice.wait_s, choice.predicted_s, goals)
    return choice


def longest_wait_s(request: ScheduleRequest, goals: Goals) -> float:
    """Never longer for a less urgent request than for a more urgent one."""
    return goals.max_wait_s * (LESS_URGENT_SHARE if request.priority > 0 else 1.0)


def _check_wait(request: ScheduleRequest, wait_s: float, predicted_s: float, goals: Goals) -> None:
    longest_s = longest_wait_s(request, goals)
    if wait_s > longest_s:
        raise errors.Full(
            f"the first token would wait for {wait_s:.1f} s, at most {longest_s:.1f} s are admitted",
            retry_after_s=wait_s - longest_s,
        )
    if predicted_s > request.deadline_in_s:
        raise errors.Full(
            f"{predicted_s:.1f} s to the second token, the request has {request.deadline_in_s:.1f} s left",
            retry_after_s=predicted_s - request.deadline_in_s,
        )


def _check_fits(request: ScheduleRequest, nodes: Sequence[NodeView]) -> None:
    """Nodes count that are not ready now, too: they may be when the request is asked for again."""
    num_tokens = request.num_prompt_tokens + request.max_new_tokens
    if not nodes or any(node.can_ever_hold(num_tokens) for node in nodes):
        return
    largest = max(node.descriptor.num_blocks * node.descriptor.layout.block_size for node in nodes)
    raise errors.BadRequest(
        f"{request.num_prompt_tokens} prompt tokens and {request.max_new_tokens} new ones are more than the "
        f"{largest} tokens that the largest KV cache holds",
        field="prompt" if request.num_prompt_tokens >= largest else "max_tokens",
    )


def _without_nodes(request: ScheduleRequest, limits: Limits) -> Wait:
    if request.age_s > limits.no_node_age_s:
        raise errors.Unavailable(
            f"no node of the model has been ready for {request.age_s:.0f} s",
            retry_after_s=limits.no_node_age_s,
        )
    return Wait(retry_in_s=limits.no_node_retry_s, reason="no node of the model is ready")


def _without_room(request: ScheduleRequest, weighing: Weighing, limits: Limits, num_ahead: int) -> Wait:
    """Decode nodes are full, or one sequence more would spoil their rhythm."""
    able = [
        node
        for node in weighing.state.usable(weighing.now)
        if weighing.is_of_model(node) and weighing.takes_sequence(node)
    ]
    nodes = [node for node in able if node.may_decode] or able
    room_in_s = min((room_in(node, weighing) for node in nodes), default=limits.max_retry_s)
    turn_in_s = room_in_s + (
        num_ahead / sum(places_per_s(node, weighing) for node in nodes) if nodes else 0.0
    )
    if not request.num_output_tokens:
        _check_wait(request, turn_in_s + request.age_s, turn_in_s, weighing.goals)
    retry_in_s = min(max(room_in_s, limits.min_retry_s), limits.max_retry_s)
    return Wait(retry_in_s=retry_in_s, reason=f"all {len(nodes)} decode nodes are full")


def places_per_s(node: NodeView, weighing: Weighing) -> float:
    """So many of those who wait find room on the node each second."""
    if weighing.is_held_up_by_prompts(node):  # of those before it, each brings a prompt of about its length
        return 1.0 / max(weighing.prefill_cost(node).work_s, node.step_s)
    return max(1, node.num_sequences) / (ASSUMED_TOKENS_LEFT * node.step_s)


def room_in(node: NodeView, weighing: Weighing) -> float:
    """Seconds until the node will have room and rhythm for the request.

    Sequences are taken to end evenly over `ASSUMED_TOKENS_LEFT` steps, each with an equal share of blocks.
    """
    lifetime_s = ASSUMED_TOKENS_LEFT * node.step_s
    num_held = max(1, node.descriptor.num_blocks - node.num_available_blocks)
    for_blocks_s = max(0, weighing.num_missing_blocks(node)) / num_held * lifetime_s
    if weighing.keeps_rhythm(node):
        return for_blocks_s
    if weighing.is_held_up_by_prompts(node):
        for_rhythm_s = node.prefill_wait_s
    else:
        over_s = weighing.step_s(node) - weighing.goals.itl_s
        loaded_s = max(over_s, weighing.step_s(node) - node.speed.decode_step_s(1, 0))
        for_rhythm_s = over_s / loaded_s * lifetime_s
    return max(for_blocks_s, min(for_rhythm_s, weighing.patience_s))
