"""Clients that chat without a pause, and long prompts that come in at fixed times. Raises RequestFailed."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass

from benchmarks.load.arrivals import Arrival
from benchmarks.load.client import Outcome, stream
from benchmarks.load.summary import Quantiles, quantiles
from benchmarks.model import TOKEN_IDS
from benchmarks.serving.loop import RequestFailed

_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Load:
    """`num_chats` clients with one chat after the other; `num_long` prompts, one every `period_s`."""

    num_chats: int
    chat_prompt_tokens: int
    chat_output_tokens: int
    long_tokens: int
    long_output_tokens: int
    num_long: int
    period_s: float

    @property
    def duration_s(self) -> float:
        return self.num_long * self.period_s


@dataclass(frozen=True)
class Figures:
    """Times in seconds. ITL is over all gaps of all chats."""

    chat_itl: Quantiles
    chat_ttft: Quantiles
    long_ttft: Quantiles
    chat_tokens_per_s: float
    long_tokens_per_s: float


async def run(url: str, load: Load, seed: int) -> Figures:
    """The chats begin with the first long prompt and end when the last one has had its time."""
    rng = random.Random(seed)
    began = time.monotonic()
    chats: list[Outcome] = []
    longs: list[Outcome] = []

    async def ask(outcomes: list[Outcome], num_prompt_tokens: int, num_output_tokens: int) -> None:
        prompt_ids = rng.choices(TOKEN_IDS, k=num_prompt_tokens)
        arrival = Arrival(time.monotonic() - began, num_prompt_tokens, num_output_tokens)
        outcome = Outcome(arrival, arrival.at_s)
        outcomes.append(outcome)
        await stream(url, prompt_ids, outcome, timeout_s=_TIMEOUT_S)
        if not outcome.is_complete:
            raise RequestFailed(f"a prompt of {num_prompt_tokens}: {outcome.error or outcome.status}")

    async def chat() -> None:
        while time.monotonic() - began < load.duration_s:
            await ask(chats, load.chat_prompt_tokens, load.chat_output_tokens)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(load.num_chats):
            tasks.create_task(chat())
        for number in range(load.num_long):
            await asyncio.sleep(began + (number + 0.5) * load.period_s - time.monotonic())
            tasks.create_task(ask(longs, load.long_tokens, load.long_output_tokens))
    return _figures(chats, longs, load, time.monotonic() - began)


def _figures(chats: list[Outcome], longs: list[Outcome], load: Load, duration_s: float) -> Figures:
    return Figures(
        chat_itl=quantiles(gap for outcome in chats for gap in outcome.itls_s),
        chat_ttft=quantiles(outcome.ttft_s for outcome in chats if outcome.ttft_s is not None),
        long_ttft=quantiles(outcome.ttft_s for outcome in longs if outcome.ttft_s is not None),
        chat_tokens_per_s=round(sum(len(outcome.token_ids) for outcome in chats) / duration_s, 2),
        long_tokens_per_s=round(len(longs) * load.long_tokens / duration_s, 2),
    )
