"""Clients that leave at random moments: every block comes back on both sides, no task is left."""

from __future__ import annotations

import asyncio
import random
import time

import httpx

from flowkv.local_cluster import Cluster
from tests.e2e.load import Streamed, stream_completion
from tests.e2e.observer import observe

NUM_CLIENTS = 200
AT_ONCE = 12


class Left(Exception):
    """The client hangs up."""


async def leave_after(http: httpx.AsyncClient, rng: random.Random) -> None:
    """One client that hangs up before the answer, before the first token, amid the stream or at its end."""
    num_tokens = rng.choice([0, 0, 1, 2, 5, 9, 10])
    prompt = [rng.randrange(20, 49_000) for _ in range(rng.choice([5, 20, 60]))]

    def look(stream: Streamed) -> None:
        if len(stream.token_ids) >= num_tokens:
            raise Left

    give_up_s = rng.uniform(0.0, 0.8) if num_tokens == 0 else 60
    try:
        async with asyncio.timeout(give_up_s):
            streaming = rng.random() < 0.7
            if streaming or num_tokens:
                await stream_completion(http, prompt, max_tokens=10, on_chunk=look)
            else:
                body = {"prompt": prompt, "max_tokens": 10, "ignore_eos": True}
                await http.post("/v1/completions", json=body)
    except (Left, TimeoutError):
        pass


async def test_200_clients_leave(cluster: Cluster) -> None:
    rng = random.Random(3)
    slots = asyncio.Semaphore(AT_ONCE)

    async def client(http: httpx.AsyncClient) -> None:
        async with slots:
            await leave_after(http, rng)

    async with observe(cluster.nats_url) as observer:
        async with httpx.AsyncClient(base_url=cluster.url, timeout=60) as http, asyncio.TaskGroup() as tasks:
            for _ in range(NUM_CLIENTS):
                tasks.create_task(client(http))
        began = time.monotonic()
        await observer.wait_idle(["prefill-0", "decode-0"], timeout_s=10)
        print(f"idle {time.monotonic() - began:.3f} s after the last client left")
        # And the next one is served as if nothing had been.
        async with httpx.AsyncClient(base_url=cluster.url, timeout=60) as http:
            stream = await stream_completion(http, [100, 200, 300], max_tokens=5)
        assert len(stream.token_ids) == 5
