"""Chooses the pair of nodes with the least predicted time to a request's second token.

Pure: plain data in, a choice with its reasons out; no clock, no I/O. The paper publishes no formula for its
load-aware scheduler. This one is ours: in seconds, from measured rates, never from node names.

    wait at P + prefill of the prompt + transfer of its KV + wait at D + one decode step
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from flowkv_common.wire.messages import Candidate, ScheduleRequest
from flowkv_scheduler.state import NodeView, Work

# Assumed until a node has measured its own: middling figures of a small model on CPU.
DEFAULT_PREFILL_TOKENS_PER_S = 1000.0
DEFAULT_DECODE_STEP_S = 0.03
# The part of a transfer that prefill doesn't hide, at a memory copy's or a fast network's rate.
TRANSFER_BYTES_PER_S = 1e9
# How long sequences run on is not known to anyone; a chat answer's usual length.
ASSUMED_TOKENS_LEFT = 128
MAX_CANDIDATES = 8


class Cost(NamedTuple):
    """Predicted seconds at one node: behind others, then for this request."""

    node: NodeView
    wait_s: float
    work_s: float
    reason: str

    @property
    def total_s(self) -> float:
        return self.wait_s + self.work_s


class Choice(NamedTuple):
    """The pair, what it is predicted to take, and the best candidates of each side."""

    prefill: NodeView
    decode: NodeView
    predicted_s: float
    wait_s: float
    reason: str
    prefill_candidates: list[Candidate]
    decode_candidates: list[Candidate]


class Sides(NamedTuple):
    """The nodes that may take a request, for each of its halves. A mixed node stands on both."""

    prefill: list[NodeView]
    decode: list[NodeView]


def choose(request: ScheduleRequest, nodes: Sequence[NodeView]) -> Choice | None:
    """The best pair; None when no pair has room for the prompt now.

    Ties go to the less loaded prefill node, then to the smaller node ids.
    """
    sides = split(request, nodes)
    prefill = sorted((prefill_cost(request, node) for node in sides.prefill), key=_rank)
    decode = sorted((decode_cost(node) for node in sides.decode if has_room(request, node)), key=_rank)
    pairs = [
        (p.total_s + transfer_s(request, p.node, d.node) + d.total_s, p, d)
        for p in prefill
        for d in decode
        if can_pair(p.node, d.node)
    ]
    if not pairs:
        return None
    predicted_s, p, d = min(pairs, key=lambda pair: pair[0])
    return Choice(
        prefill=p.node,
        decode=d.node,
        predicted_s=predicted_s,
        wait_s=p.wait_s + d.wait_s,
        reason=_pair_reason(request, p, d, predicted_s, len(pairs)),
        prefill_candidates=[_candidate(cost) for cost in prefill[:MAX_CANDIDATES]],
        decode_candidates=[_candidate(cost) for cost in decode[:MAX_CANDIDATES]],
    )


def split(request: ScheduleRequest, nodes: Sequence[NodeView]) -> Sides:
    """Who may take which half: usable nodes whose pool can ever hold it, by their prefill cap.

    Nodes that failed the request before are left out while there are others. A side on which nobody stands is
    taken by all: slow is better than not at all.
    """
    usable = [node for node in nodes if node.is_usable]
    usable = [node for node in usable if node.node_id not in request.avoid] or usable
    for_prompt = [node for node in usable if can_ever_hold(node, request.num_prompt_tokens)]
    for_all = [node for node in usable if can_ever_hold(node, _all_tokens(request))]
    return Sides(
        prefill=[node for node in for_prompt if _may_prefill(node)] or for_prompt,
        decode=[node for node in for_all if _may_decode(node)] or for_all,
    )


def prefill_cost(request: ScheduleRequest, node: NodeView) -> Cost:
    """Wait behind the queued tokens and those we have sent since, then the prompt, at the measured rate."""
    rate = node.report.prefill_tokens_per_s or DEFAULT_PREFILL_TOKENS_PER_S
    num_queued = node.report.queued_prefill_tokens + node.given.prefill_tokens
    wait_s, work_s = num_queued / rate, request.num_prompt_tokens / rate
    return Cost(node, wait_s, work_s, f"{num_queued} tokens ahead at {rate:.0f} tokens/s")


def decode_cost(node: NodeView) -> Cost:
    """Wait for a place among the sequences, then one step, the longer the fuller the batch is."""
    report = node.report
    step_s = report.decode_step_s or DEFAULT_DECODE_STEP_S
    num_sequences = report.num_running + report.num_waiting + node.given.num_sequences
    num_places = max(1, report.max_num_seqs)
    # A full batch gives a place back every `ASSUMED_TOKENS_LEFT / num_places` steps.
    num_ahead = max(0, num_sequences + 1 - num_places)
    wait_s = num_ahead * step_s * ASSUMED_TOKENS_LEFT / num_places
    work_s = step_s * (1 + num_sequences / num_places)
    reason = (
        f"{num_sequences} of {num_places} sequences, {num_available_blocks(node)} blocks available, "
        f"step {step_s * 1e3:.0f} ms"
    )
    return Cost(node, wait_s, work_s, reason)


def transfer_s(request: ScheduleRequest, prefill: NodeView, decode: NodeView) -> float:
    """Seconds to move the prompt's KV cache; none within one node."""
    if prefill.node_id == decode.node_id:
        return 0.0
    num_blocks = num_blocks_for(prefill, request.num_prompt_tokens)
    return num_blocks * prefill.descriptor.layout.block_bytes / TRANSFER_BYTES_PER_S


def can_pair(prefill: NodeView, decode: NodeView) -> bool:
    """Only equal layouts of the same weights can exchange blocks."""
    ours, theirs = prefill.descriptor, decode.descriptor
    return ours.layout == theirs.layout and ours.model.fingerprint == theirs.model.fingerprint


def can_ever_hold(node: NodeView, num_tokens: int) -> bool:
    return num_blocks_for(node, num_tokens) <= node.descriptor.num_blocks


def has_room(request: ScheduleRequest, node: NodeView) -> bool:
    """Can decode reserve room for the whole prompt, and a token, now?"""
    return num_blocks_for(node, request.num_prompt_tokens + 1) <= num_available_blocks(node)


def num_available_blocks(node: NodeView) -> int:
    """Free blocks and cached ones, which are evicted on demand, less what we have given away since."""
    return node.report.blocks.free + node.report.blocks.cached - node.given.num_blocks


def num_blocks_for(node: NodeView, num_tokens: int) -> int:
    return -(-num_tokens // node.descriptor.layout.block_size)


def room_in_s(request: ScheduleRequest, node: NodeView) -> float:
    """Seconds until running sequences will have given back the blocks that the prompt lacks.

    They are taken to end evenly over `ASSUMED_TOKENS_LEFT` steps and to free the same number of blocks each.
    """
    num_missing = num_blocks_for(node, request.num_prompt_tokens + 1) - num_available_blocks(node)
    num_held = max(1, node.descriptor.num_blocks - num_available_blocks(node))
    step_s = node.report.decode_step_s or DEFAULT_DECODE_STEP_S
    return max(0, num_missing) / num_held * ASSUMED_TOKENS_LEFT * step_s


def added_work(request: ScheduleRequest, choice: Choice) -> tuple[Work, Work]:
    """What the choice adds to its prefill node and to its decode node."""
    num_blocks = num_blocks_for(choice.decode, request.num_prompt_tokens + 1)
    return Work(prefill_tokens=request.num_prompt_tokens), Work(num_sequences=1, num_blocks=num_blocks)


def _may_prefill(node: NodeView) -> bool:
    """A decode node's cap is one block: that is for its own preempted sequences."""
    return node.report.max_prefill_tokens_per_step > node.descriptor.layout.block_size


def _may_decode(node: NodeView) -> bool:
    """A prefill node's cap is its whole token budget."""
    return node.report.max_prefill_tokens_per_step < node.descriptor.token_budget


def _all_tokens(request: ScheduleRequest) -> int:
    return request.num_prompt_tokens + request.max_new_tokens


def _rank(cost: Cost) -> tuple[float, str]:
    return cost.total_s, cost.node.node_id


def _candidate(cost: Cost) -> Candidate:
    return Candidate(node_id=cost.node.node_id, predicted_s=cost.total_s, reason=cost.reason)


def _pair_reason(request: ScheduleRequest, p: Cost, d: Cost, predicted_s: float, num_pairs: int) -> str:
    moved_s = transfer_s(request, p.node, d.node)
    return (
        f"best of {num_pairs} pairs, {predicted_s:.3f} s to the second token: wait at {p.node.node_id} "
        f"{p.wait_s:.3f} s, prefill {p.work_s:.3f} s, transfer {moved_s:.3f} s, "
        f"wait at {d.node.node_id} {d.wait_s:.3f} s, step {d.work_s:.3f} s"
    )
