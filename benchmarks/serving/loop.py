"""Closed and open loops over HTTP, and their figures, defined as vLLM's benchmark defines them.

TTFT: from sending to the first token. ITL: each gap between events that bring tokens. TPOT: the time after
the first token over the tokens after it. E2E: from sending to the end. Goodput: requests per second that met
their targets.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.load.arrivals import Arrival, Lengths, Phase, poisson
from benchmarks.load.client import Outcome, stream
from benchmarks.load.drive import drive
from benchmarks.load.summary import Quantiles, Targets, quantiles, tpot_s
from benchmarks.model import TOKEN_IDS

_TIMEOUT_S = 300.0


class RequestFailed(Exception):
    """A request of the load did not get all of its tokens: its figures would be worth nothing."""


@dataclass(frozen=True)
class Load:
    """`concurrency` clients with one request after the other; where `rate` is set, arrivals of Poisson."""

    concurrency: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_requests: int
    rate: float = 0.0

    @property
    def title(self) -> str:
        head = f"{self.rate:g}/s" if self.rate else f"{self.concurrency} clients"
        return f"{head} x {self.num_prompt_tokens}+{self.num_output_tokens}"


@dataclass(frozen=True)
class Figures:
    """Times in seconds."""

    output_tokens_per_s: float
    requests_per_s: float
    goodput_per_s: float
    ttft: Quantiles
    itl: Quantiles
    tpot: Quantiles
    e2e: Quantiles
    duration_s: float


async def run(url: str, load: Load, targets: Targets, seed: int) -> Figures:
    """Another `seed`, other prompts: no prefix is ever cached. Raises RequestFailed."""
    began = time.monotonic()
    outcomes = await (_open(url, load, seed) if load.rate else _closed(url, load, seed))
    duration_s = time.monotonic() - began
    for outcome in outcomes:
        if not outcome.is_complete or len(outcome.token_ids) != load.num_output_tokens:
            raise RequestFailed(
                f"{load.title}: {len(outcome.token_ids)} tokens, {outcome.error or outcome.status}"
            )
    return figures(outcomes, targets, duration_s)


def figures(outcomes: list[Outcome], targets: Targets, duration_s: float) -> Figures:
    """Of requests that are all complete. Pure."""
    num_tokens = sum(len(outcome.token_ids) for outcome in outcomes)
    return Figures(
        output_tokens_per_s=round(num_tokens / duration_s, 2),
        requests_per_s=round(len(outcomes) / duration_s, 3),
        goodput_per_s=round(sum(targets.are_met_by(outcome) for outcome in outcomes) / duration_s, 3),
        ttft=quantiles(outcome.ttft_s for outcome in outcomes if outcome.ttft_s is not None),
        itl=quantiles(gap for outcome in outcomes for gap in outcome.itls_s),
        tpot=quantiles(tpot_s(outcome) for outcome in outcomes),
        e2e=quantiles(outcome.ended_s for outcome in outcomes),
        duration_s=round(duration_s, 3),
    )


async def _closed(url: str, load: Load, seed: int) -> list[Outcome]:
    outcomes: list[Outcome] = []
    rng = random.Random(f"closed {seed} {load.title}")
    requests: Iterator[int] = iter(range(load.num_requests))

    async def client() -> None:
        for _ in requests:  # shared: who is done takes the next
            prompt_ids = rng.choices(TOKEN_IDS, k=load.num_prompt_tokens)
            arrival = Arrival(0.0, load.num_prompt_tokens, load.num_output_tokens)
            outcome = Outcome(arrival, 0.0)
            outcomes.append(outcome)
            await stream(url, prompt_ids, outcome, timeout_s=_TIMEOUT_S)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(load.concurrency):
            tasks.create_task(client())
    return outcomes


async def _open(url: str, load: Load, seed: int) -> list[Outcome]:
    lengths = Lengths(load.num_prompt_tokens, load.num_output_tokens)
    phase = Phase("open", load.rate, load.num_requests / load.rate, lengths)
    return await drive(url, list(poisson([phase], random.Random(seed))), seed=seed, timeout_s=_TIMEOUT_S)
