"""Whether an attempt that still runs pays to move: from nodes that have become slow, or keep no promise.

Its prompt and output are computed again elsewhere, while its client waits, and its old work is lost. Pure.
"""

from __future__ import annotations

from flowkv_common.wire.messages import ScheduleRequest
from flowkv_common.wire.nodes import expected_tokens
from flowkv_scheduler.belief import SHORTEST_STALL_S, Doubt
from flowkv_scheduler.demand import OutputLengths
from flowkv_scheduler.node_view import NodeView
from flowkv_scheduler.policy import Choice

# A node that is slower than it says by less than this factor is left alone: a host that is busy for a second
# makes its steps twice as long.
SLOWNESS_TO_LEAVE = 2.0


def is_worth_asking(doubt: Doubt) -> bool:
    """Whether what runs on such a node should ask to move."""
    stalls = max(doubt.first_token_s, doubt.step_s) > SHORTEST_STALL_S
    return stalls or doubt.slowness >= SLOWNESS_TO_LEAVE


def why_stay(
    request: ScheduleRequest, choice: Choice, node: NodeView | None, lengths: OutputLengths
) -> str | None:
    """Why the attempt stays on its decode `node`; None if it ends sooner on the pair of `choice`.

    A wait that has lasted is taken to last as long again: so a move that turns out to be for nothing costs no
    more than what was waited for. A step there takes as long as is believed, but no longer than the request's
    own last gap: the node may have recovered.
    """
    prefill, decode = choice.prefill, choice.decode
    serves = decode.may_decode and (prefill.may_prefill or prefill is decode)
    if not serves or {prefill.node_id, decode.node_id} & set(request.avoid):
        return "there are no others of their sides"
    if node is None:
        return "nothing is known of its node"
    step_s = min(max(node.own_step_s, request.gap_s), node.step_s)
    num_left = expected_tokens(request.max_new_tokens, 1.0 / lengths.mean_of(request.num_prompt_tokens))
    stay_s = request.overdue_s + num_left * step_s
    go_s = choice.predicted_s + num_left * decode.step_s
    return None if go_s < stay_s else f"it would take {go_s:.1f} s elsewhere and {stay_s:.1f} s here"
