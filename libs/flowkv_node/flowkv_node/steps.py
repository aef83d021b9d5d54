"""The step loop: plan a batch of both roles' work, run it, give its tokens to the roles."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable

from flowkv_common.errors import Internal
from flowkv_engine.engine.batch import Sequence, WorkItem, pack, tokens_that_count
from flowkv_engine.engine.runner import DeviceLost, Engine, Result
from flowkv_engine.engine.sampler import Sampled
from flowkv_node.measures import StepCounts
from flowkv_node.node import Node, Role

log = logging.getLogger(__name__)

Work = list[tuple[Role, WorkItem]]


async def run_steps(node: Node, engine: Engine) -> None:
    """Step after step, until cancelled; sleeps while neither role has work. Raises DeviceLost."""
    while True:
        node.wake.clear()
        work = plan_step(node)
        if work:
            await _run_step(node, engine, work)
        else:
            await node.outbox.flush()
            await node.wake.wait()


def plan_step(node: Node) -> Work:
    """One token and the guesses of each running sequence, then prompt chunks under the chunk budget.

    Those of preempted sequences first: their clients have seen output.
    """
    running = node.decode.sequences_to_decode()
    drafts = node.decode.drafts(running)
    work: Work = [
        (node.decode, WorkItem(sequence, 1, draft)) for sequence, draft in zip(running, drafts, strict=True)
    ]
    num_decoded = len(work) + sum(map(len, drafts))
    room = min(node.settings.token_budget - num_decoded, node.max_prefill_tokens_per_step)
    # At least one block: prompts always proceed, also those of preempted sequences.
    room = max(room, node.settings.block_size)
    for role in (node.decode, node.prefill):
        for chunk in plan_chunks(role.sequences_to_prefill(), room, node.settings.block_size):
            work.append((role, chunk))
            room -= chunk.num_tokens
    return work


def plan_chunks(queue: Iterable[Sequence], max_tokens: int, block_size: int) -> list[WorkItem]:
    """In the order of `queue`, at most `max_tokens` tokens in all.

    A chunk that does not end its prompt ends on a block border, so that only whole blocks are handed off
    while later chunks compute.
    """
    chunks: list[WorkItem] = []
    for sequence in queue:
        num_tokens = min(sequence.num_new_tokens, max_tokens)
        if num_tokens < sequence.num_new_tokens:
            num_tokens -= (sequence.num_computed_tokens + num_tokens) % block_size
        if num_tokens <= 0:
            break
        chunks.append(WorkItem(sequence, num_tokens))
        max_tokens -= num_tokens
    return chunks


async def _run_step(node: Node, engine: Engine, work: Work) -> None:
    items = [item for _, item in work]
    batch = pack(items, node.settings.block_size)
    counts = StepCounts.of(items)  # before the step: a cancel during it resets the sequence
    node.begin_step(items, node.instruments.expected_step_s(counts))
    began = time.monotonic()
    result: Result | Exception
    async with asyncio.TaskGroup() as tasks:
        # What the last step gave goes out while this one computes. It begins when the batch is handed over.
        tasks.create_task(node.outbox.flush())
        try:
            result = await engine.step(batch)
        except Exception as error:  # not through the group, which would cancel the flush
            result = error
    if isinstance(result, DeviceLost):
        raise result
    node.end_step()
    if isinstance(result, Exception):
        # A step that fails costs the requests in it their attempt, never the process.
        log.error("an engine step failed", exc_info=result)
        for role, item in work:
            role.fail(item.sequence, Internal(f"the engine step failed: {result}"))
        return
    node.instruments.observe_step(counts, time.monotonic() - began)
    for place, logprobs in result.prompt_logprobs.items():
        node.prefill.add_prompt_logprobs(items[place].sequence, logprobs)
    for (role, item), tokens in zip(work, tokens_that_count(items, result.sampled), strict=True):
        node.instruments.observe_draft(len(item.draft), len(tokens) - 1)
        _apply(node, role, item.sequence, item.num_tokens, tokens[0])
        for sampled in tokens[1:]:
            _apply(node, role, item.sequence, 1, sampled)


def _apply(node: Node, role: Role, sequence: Sequence, num_tokens: int, sampled: Sampled | None) -> None:
    """The step has computed so many more tokens of `sequence`."""
    if not sequence.block_table:  # it was cancelled during the step, or has ended with a token before
        return
    sequence.num_computed_tokens += num_tokens
    node.commit_computed(sequence)
    if sampled and sampled.error:
        role.fail(sequence, sampled.error)
    else:
        role.apply(sequence, sampled)
