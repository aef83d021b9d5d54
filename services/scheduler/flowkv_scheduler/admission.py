"""Decides whether a request gets its pair now, asks again, or is refused with a retry time that is true.

Pure. The gateway does the waiting and comes back with its age, so no queue is kept here.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from flowkv_common import errors
from flowkv_common.wire.messages import ScheduleRequest, Wait
from flowkv_scheduler import policy
from flowkv_scheduler.policy import Choice
from flowkv_scheduler.state import NodeView


class Limits(msgspec.Struct, frozen=True):
    """Seconds. How long a request may look for nodes, and the longest predicted wait that is admitted."""

    no_node_age_s: float = 10.0
    no_node_retry_s: float = 0.25
    max_wait_s: float = 60.0
    min_retry_s: float = 0.05
    max_retry_s: float = 2.0


def decide(request: ScheduleRequest, nodes: Sequence[NodeView], limits: Limits) -> Choice | Wait:
    """The pair, or when to ask again.

    Raises `BadRequest` when no pool could ever hold the request, `Unavailable` when there has been no node
    for too long, `Full` when the wait would be too long; `retry_after_s` is the predicted end of that.
    """
    _check_fits(request, nodes)
    sides = policy.split(request, nodes)
    if not any(policy.can_pair(p, d) for p in sides.prefill for d in sides.decode):
        return _without_nodes(request, limits)
    choice = policy.choose(request, nodes)
    if choice is None:
        return _without_room(request, sides.decode, limits)
    # The retry of a running request is never shed: its client has seen half of the answer.
    if choice.wait_s > limits.max_wait_s and request.attempt == 0:
        raise errors.Full(
            f"{choice.wait_s:.0f} s of work are queued, at most {limits.max_wait_s:.0f} s are admitted",
            retry_after_s=choice.wait_s - limits.max_wait_s,
        )
    return choice


def _check_fits(request: ScheduleRequest, nodes: Sequence[NodeView]) -> None:
    """Nodes count that are not ready now, too: they may be when the request is asked for again."""
    num_tokens = request.num_prompt_tokens + request.max_new_tokens
    if not nodes or any(policy.can_ever_hold(node, num_tokens) for node in nodes):
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
            f"no node has been ready for {request.age_s:.0f} s", retry_after_s=limits.no_node_age_s
        )
    return Wait(retry_in_s=limits.no_node_retry_s, reason="no node is ready")


def _without_room(request: ScheduleRequest, decode: Sequence[NodeView], limits: Limits) -> Wait:
    room_in_s = min(policy.room_in_s(request, node) for node in decode)
    if request.age_s > limits.max_wait_s and request.attempt == 0:
        raise errors.Full(
            f"no decode node has had room for {request.age_s:.0f} s",
            retry_after_s=max(room_in_s, limits.min_retry_s),
        )
    retry_in_s = min(max(room_in_s, limits.min_retry_s), limits.max_retry_s)
    return Wait(retry_in_s=retry_in_s, reason=f"all {len(decode)} decode nodes are full")
