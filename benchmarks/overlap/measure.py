"""One request at a time through a running cluster: when its first two tokens came, and what was sent."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import httpx

from benchmarks.model import TOKEN_IDS
from benchmarks.overlap.setups import Setup
from flowkv.local_cluster import Cluster
from flowkv_common.bus.connection import connect
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import KVTransferred

_REQUEST_TIMEOUT_S = 300.0
_EVENT_TIMEOUT_S = 10.0
_NUM_WARMUPS = 2
_WARMUP_TOKENS = 600  # more than one chunk

Progress = Callable[[str], None]


class RequestFailed(Exception):
    """A request brought no two tokens, or not the event that belongs to it."""


@dataclass(frozen=True)
class Sample:
    """One request. `transferred` is missing where prefill and decode are one node."""

    num_tokens: int
    first_s: float
    second_s: float
    transferred: KVTransferred | None


async def measure(
    cluster: Cluster, setup: Setup, lengths: Sequence[int], num_repeats: int, progress: Progress
) -> list[Sample]:
    """`num_repeats` samples of each length, in turn, after some that don't count.

    Prompts are random and never repeat, so no prefix is cached. Raises RequestFailed, FlowKVError.
    """
    rng = random.Random(setup.name)
    samples: list[Sample] = []
    events: asyncio.Queue[KVTransferred] = asyncio.Queue()
    async with (
        connect(cluster.nats_url, name="overlap") as bus,
        await bus.subscribe(
            subjects.event("kv_transferred", ">"), KVTransferred, lambda event, _: events.put_nowait(event)
        ),
        httpx.AsyncClient(base_url=cluster.url, timeout=_REQUEST_TIMEOUT_S) as http,
    ):
        for _ in range(_NUM_WARMUPS):
            await _sample(http, setup, events, rng.choices(TOKEN_IDS, k=_WARMUP_TOKENS))
        for number in range(num_repeats):
            for length in lengths:
                prompt = rng.choices(TOKEN_IDS, k=length)
                samples.append(await _sample(http, setup, events, prompt))
            progress(f"{setup.title}: {number + 1} of {num_repeats}")
    return samples


async def _sample(
    http: httpx.AsyncClient, setup: Setup, events: asyncio.Queue[KVTransferred], prompt: list[int]
) -> Sample:
    began = time.monotonic()
    came_at = [time.monotonic() async for _ in _tokens(http, prompt)]
    if len(came_at) != 2:
        raise RequestFailed(f"{setup.title}: {len(came_at)} tokens for a prompt of {len(prompt)}, not 2")
    first_s, second_s = (at - began for at in came_at)
    transferred = await _event(setup, events) if setup.hands_over else None
    return Sample(len(prompt), first_s, second_s, transferred)


async def _event(setup: Setup, events: asyncio.Queue[KVTransferred]) -> KVTransferred:
    try:
        async with asyncio.timeout(_EVENT_TIMEOUT_S):
            return await events.get()
    except TimeoutError:
        raise RequestFailed(f"{setup.title}: no event of a transfer came") from None


async def _tokens(http: httpx.AsyncClient, prompt: list[int]) -> AsyncIterator[int]:
    """The two output tokens, as they come."""
    body = {
        "prompt": prompt,
        "max_tokens": 2,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RequestFailed((await response.aread()).decode(errors="replace"))
        async for line in response.aiter_lines():
            for choice in _choices(line):
                for token_id in choice.get("token_ids") or []:
                    yield token_id


def _choices(line: str) -> list[dict[str, list[int]]]:
    if not line.startswith("data: ") or line == "data: [DONE]":
        return []
    event = json.loads(line.removeprefix("data: "))
    if "error" in event:
        raise RequestFailed(event["error"]["message"])
    choices: list[dict[str, list[int]]] = event["choices"]
    return choices
