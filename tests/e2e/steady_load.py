"""Streams that come at a steady rate while something breaks, and what their clients saw of it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import httpx

from tests.e2e.load import Streamed, stream_completion

NUM_PROMPT_TOKENS = 64


@dataclass
class Answer:
    """What one client saw: its stream, and how long it waited for the first token, and at most for others."""

    stream: Streamed
    first_s: float
    gap_s: float


@dataclass
class SteadyLoad:
    """What came of the requests so far, each of which wants `num_tokens`."""

    num_tokens: int
    answers: list[Answer] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # of streams that broke

    @property
    def num_requests(self) -> int:
        return len(self.answers) + len(self.errors)

    @property
    def longest_s(self) -> tuple[float, float]:
        """What anyone waited for a first token, and for a further one."""
        return max(each.first_s for each in self.answers), max(each.gap_s for each in self.answers)

    def failures(self, expected: Callable[[list[int], int], list[int]]) -> list[str]:
        """Of each answer that is an error, or not what the nodes should say."""
        wrong = [
            f"{stream.error or 'other tokens'} after {len(stream.token_ids)} tokens"
            for stream in (answer.stream for answer in self.answers)
            if stream.error or stream.token_ids != expected(stream.prompt_ids, self.num_tokens)
        ]
        return self.errors + wrong


@contextlib.asynccontextmanager
async def steady_load(
    http: httpx.AsyncClient, rate_per_s: float, num_tokens: int
) -> AsyncIterator[SteadyLoad]:
    """Requests come while the context lasts. Then the last ones end, at the latest by `http`'s timeout."""
    load = SteadyLoad(num_tokens)
    rng = random.Random(7)

    async def ask() -> None:
        times_s = [time.monotonic()]
        prompt_ids = rng.choices(range(1000, 30_000), k=NUM_PROMPT_TOKENS)
        try:
            stream = await stream_completion(
                http, prompt_ids, max_tokens=num_tokens, on_chunk=lambda _: times_s.append(time.monotonic())
            )
        except httpx.HTTPError as error:
            load.errors.append(repr(error))
            return
        first_s, *gaps_s = [later - earlier for earlier, later in itertools.pairwise(times_s)] or [0.0]
        load.answers.append(Answer(stream, first_s, max(gaps_s, default=0.0)))

    async def keep_asking(tasks: asyncio.TaskGroup) -> None:
        while True:
            tasks.create_task(ask())
            await asyncio.sleep(1 / rate_per_s)

    async with asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(keep_asking(tasks))
        try:
            yield load
        finally:
            asking.cancel()
