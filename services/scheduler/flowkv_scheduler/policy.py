"""Chooses the pair of nodes with the least predicted time to a request's second token.

Pure: plain data in, a choice with its reasons out; no clock, no I/O. The paper publishes no formula for its
load-aware scheduler. This one is ours: in seconds, from what nodes measure of themselves, never from names.

    wait at P + prefill of what P has not cached + exposed transfer of what D has not cached
              + one decode step, while D has room and keeps the time between tokens
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from flowkv_common.wire.messages import ScheduleRequest
from flowkv_common.wire.parts import Candidate
from flowkv_scheduler.index import Group
from flowkv_scheduler.view import NodeView, Work
from flowkv_scheduler.weighing import NUM_TOLD, Cost, Weighing, need_at


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
