"""Sends arrivals when they are due, each by a task of its own, and waits for all of them to end."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable

from benchmarks.load.arrivals import Arrival
from benchmarks.load.client import Outcome, stream
from benchmarks.model import TOKEN_IDS


async def drive(
    url: str,
    arrivals: Iterable[Arrival],
    *,
    seed: int = 0,
    timeout_s: float = 600.0,
    on_sent: Callable[[Outcome], None] = lambda _: None,
) -> list[Outcome]:
    """The outcomes, in order of arrival. Prompts are random: no two have a prefix in common."""
    rng = random.Random(seed)
    outcomes: list[Outcome] = []
    began = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        for arrival in arrivals:
            prompt_ids = rng.choices(TOKEN_IDS, k=arrival.num_prompt_tokens)
            await asyncio.sleep(began + arrival.at_s - time.monotonic())
            outcome = Outcome(arrival, time.monotonic() - began)
            outcomes.append(outcome)
            tasks.create_task(stream(url, prompt_ids, outcome, timeout_s=timeout_s))
            on_sent(outcome)
    return outcomes
