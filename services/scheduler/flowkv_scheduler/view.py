"""A node as the policy sees it.

What follows from its report is computed when that changes, not for each of the requests that look at it.
"""

from __future__ import annotations

import math

import msgspec

from flowkv_common.wire.nodes import LoadReport, NodeDescriptor
from flowkv_scheduler.speed import Speed

# A node is silent after this many of its own report periods: no new work.
SILENT_AFTER_PERIODS = 3.0


class Work(msgspec.Struct, frozen=True, gc=False):
    """What a request adds to a node."""

    prefill_tokens: int = 0
    num_sequences: int = 0
    num_blocks: int = 0
    context_tokens: int = 0

    def plus(self, other: Work, sign: int = 1) -> Work:
        return Work(
            self.prefill_tokens + sign * other.prefill_tokens,
            self.num_sequences + sign * other.num_sequences,
            self.num_blocks + sign * other.num_blocks,
            self.context_tokens + sign * other.context_tokens,
        )


class NodeView(msgspec.Struct, frozen=True, gc=False):
    """What a node is, its last report, what we gave it since, and what follows from these. Made by `view_of`.

    Tokens, sequences and blocks include what we gave it and its report does not show yet.
    """

    node_id: str
    descriptor: NodeDescriptor
    report: LoadReport
    usable_until: float  # by then it is silent, unless it reports again; -inf if it takes nothing new
    given: Work
    leaves: str | None  # the side that it gets nothing new on: it is being moved to the other
    speed: Speed
    cap: int
    chunk: int  # tokens of a prompt in one step
    may_prefill: bool
    may_decode: bool
    num_tokens_held: int  # at most, by the whole pool
    num_sequences: int
    num_context_tokens: int
    num_queued_tokens: int
    num_available_blocks: int  # free ones and cached ones, which are evicted on demand
    chunk_beside_s: float  # what a prompt's steps compute besides
    prefill_wait_s: float  # until a prompt that comes now is begun
    chunk_s: float  # what prompts that wait here add to a step
    step_s: float  # of a decode step, were one more sequence of mean length there; with `chunk_s`

    def is_usable(self, now: float) -> bool:
        """May it get new work?"""
        return now <= self.usable_until

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.descriptor.layout.block_size)

    def can_ever_hold(self, num_tokens: int) -> bool:
        return num_tokens <= self.num_tokens_held


def view_of(
    descriptor: NodeDescriptor,
    report: LoadReport,
    speed: Speed,
    heard_at: float,
    given: Work,
    *,
    mean_prompt_tokens: float,
    leaves: str | None,
) -> NodeView:
    """`speed` is the report's; `mean_prompt_tokens` how long prompts are: a queue is one of such prompts."""
    block_size = descriptor.layout.block_size
    silent_at = heard_at + SILENT_AFTER_PERIODS * report.period_s
    cap, blocks = report.max_prefill_tokens_per_step, report.blocks
    chunk = max(cap, block_size)
    # A decode node's cap is one block: that is for its own preempted sequences.
    may_prefill = cap > block_size and leaves != "prefill"
    num_sequences = report.num_running + report.num_waiting + given.num_sequences
    num_context_tokens = report.num_context_tokens + given.context_tokens
    num_queued = report.queued_prefill_tokens + given.prefill_tokens
    beside_s = speed.chunk_beside_s(report.num_running, report.num_context_tokens, is_decode=not may_prefill)
    wait_s = speed.prefill_s(num_queued, 0, chunk, beside_s)
    # The queue is of prompts of mean length, not one prompt.
    wait_s += num_queued * (mean_prompt_tokens - num_queued) / 2 * speed.attended_token_s
    step_s = speed.decode_step_s(num_sequences + 1, num_context_tokens + int(mean_prompt_tokens))
    chunk_s = min(num_queued, chunk) * speed.prefill_token_s
    return NodeView(
        node_id=descriptor.node.node_id,
        descriptor=descriptor,
        report=report,
        usable_until=silent_at if report.ready and not report.draining else -math.inf,
        given=given,
        leaves=leaves,
        speed=speed,
        cap=cap,
        chunk=chunk,
        may_prefill=may_prefill,
        # A prefill node's cap is its whole token budget.
        may_decode=cap < descriptor.token_budget and leaves != "decode",
        num_tokens_held=descriptor.num_blocks * block_size,
        num_sequences=num_sequences,
        num_context_tokens=num_context_tokens,
        num_queued_tokens=num_queued,
        num_available_blocks=blocks.free + blocks.cached - given.num_blocks,
        chunk_beside_s=beside_s,
        prefill_wait_s=max(0.0, wait_s),
        chunk_s=chunk_s,
        step_s=step_s + chunk_s,
    )
