"""Runs all choices of a request and hands their deltas on, in order per choice. Knows no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import count

from flowkv_common.errors import Internal
from flowkv_gateway.choice import Choice, Delta, Display
from flowkv_gateway.generation import Generation, Generator
from flowkv_gateway.metrics import GatewayMetrics
from flowkv_gateway.openai import PromptTokensDetails, Usage
from flowkv_gateway.vocabulary import Vocabulary

Emit = Callable[[Delta], Awaitable[None]]


@dataclass(frozen=True)
class Answer:
    """The choices of a request, one group per prompt."""

    groups: Sequence[Sequence[Choice]]

    @classmethod
    def of(cls, groups: Sequence[Sequence[Generation]], vocabulary: Vocabulary, display: Display) -> Answer:
        """Choices numbered through all groups."""
        numbers = count()
        return cls([[Choice(next(numbers), one, vocabulary, display) for one in group] for group in groups])

    def usage(self) -> Usage:
        """Tokens so far. A prompt counts once, however many choices it has."""
        firsts = [group[0] for group in self.groups]
        num_prompt_tokens = sum(len(first.generation.prompt_ids) for first in firsts)
        num_tokens = sum(choice.num_tokens for group in self.groups for choice in group)
        num_cached = sum(first.num_cached_tokens for first in firsts)
        return Usage(
            prompt_tokens=num_prompt_tokens,
            completion_tokens=num_tokens,
            total_tokens=num_prompt_tokens + num_tokens,
            prompt_tokens_details=PromptTokensDetails(num_cached),
        )

    async def run(self, generator: Generator, metrics: GatewayMetrics, emit: Emit) -> None:
        """Runs until every choice has ended; a slow `emit` slows the request, nothing piles up here.

        Raises the error of the choice that failed first; the others are cancelled then.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                for group in self.groups:
                    tasks.create_task(_run_group(group, tasks, generator, metrics, emit))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None


async def _run_group(
    group: Sequence[Choice],
    tasks: asyncio.TaskGroup,
    generator: Generator,
    metrics: GatewayMetrics,
    emit: Emit,
) -> None:
    """The first choice goes ahead, so that the others find its prompt in the prefix cache."""
    metrics.num_choices.observe(len(group))
    first, *others = group
    is_computed = asyncio.Event()
    tasks.create_task(_run_choice(first, is_computed, generator, metrics, emit))
    if others:
        await is_computed.wait()
    for choice in others:
        tasks.create_task(_run_choice(choice, is_computed, generator, metrics, emit))


async def _run_choice(
    choice: Choice, is_computed: asyncio.Event, generator: Generator, metrics: GatewayMetrics, emit: Emit
) -> None:
    with metrics.observe(choice) as times:
        async with aclosing(generator.generate(choice.generation)) as pieces:
            async for piece in pieces:
                is_computed.set()
                times.tokens(len(piece.token_ids), piece.num_cached_tokens)
                for delta in choice.push(piece):
                    await emit(delta)
                if choice.finish_reason is not None:
                    return
        raise Internal("The answer broke off.")
