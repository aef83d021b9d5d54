"""HTTP clients for the tests: streams that are read to the end, or abandoned on the way."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from flowkv.bench.load import completion


@dataclass
class Streamed:
    """One streamed completion: the token ids of prompt and output, and how it ended."""

    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    error: dict[str, Any] | None = None
    saw_done: bool = False


async def stream_completion(
    http: httpx.AsyncClient,
    prompt_ids: list[int],
    *,
    max_tokens: int,
    on_chunk: Callable[[Streamed], None] = lambda _: None,
    **extra: Any,
) -> Streamed:
    """Stream a greedy completion of token ids to its end, EOS ignored unless said otherwise."""
    body = completion(prompt_ids, max_tokens) | extra
    result = Streamed(prompt_ids)
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            result.error = response.json()["error"]
            return result
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                result.saw_done = True
                break
            take_event(result, json.loads(line.removeprefix("data: ")))
            on_chunk(result)
    return result


def take_event(result: Streamed, event: dict[str, Any]) -> None:
    if "error" in event:
        result.error = event["error"]
        return
    for choice in event["choices"]:
        result.text += choice["text"]
        result.token_ids += choice.get("token_ids") or []
        result.finish_reason = choice["finish_reason"] or result.finish_reason


async def run_all(
    http: httpx.AsyncClient, prompts: list[list[int]], max_tokens: int, **extra: Any
) -> list[Streamed]:
    """All prompts at once."""
    async with asyncio.TaskGroup() as tasks:
        streams = [
            tasks.create_task(stream_completion(http, ids, max_tokens=max_tokens, **extra)) for ids in prompts
        ]
    return [stream.result() for stream in streams]


async def wait_healthy(http: httpx.AsyncClient, timeout_s: float = 30.0) -> None:
    """Until a gateway that was just started can serve requests; raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await http.get("/health/ready")).status_code == 200:
                    return
            await asyncio.sleep(0.1)
