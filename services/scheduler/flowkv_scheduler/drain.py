"""When a full node has room for one more: from what its sequences have still to produce. Pure arithmetic.

The one place where the door foresees a wait. Sequences end one by one; what the request and those before it
lack of blocks, places and rhythm is told as a number of ends, and ends as a number of steps.
"""

from __future__ import annotations

import msgspec

from flowkv_scheduler.lending import Thresholds
from flowkv_scheduler.scores import FULL_PREFILL, SHARED
from flowkv_scheduler.view import NodeView, Work
from flowkv_scheduler.weighing import Weighing, need_at, num_missing_places

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
