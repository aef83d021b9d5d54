"""Answers to JSON schemas on whole clusters: each that ends by itself is JSON of its schema."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from flowkv.local_cluster import Cluster
from tests.e2e.conftest import StartCluster
from tests.e2e.load import stream_completion
from tests.e2e.observer import observe
from tests.gateway_support import EOS, START, write_tokenizer
from tests.json_schemas import SCHEMAS, Schema, check
from tests.oracle import check_identity
from tests.tiny_models import make_tiny_model

AT_ONCE = 16
MAX_TOKENS = 160
# More of these, and answers drawn at this temperature come to an end.
CLOSERS = '"}],0'
# One after the other, from one request to the next.
WAYS: list[dict[str, Any]] = [{}, {"stream": True}, {"n": 4}, {"n": 2, "stream": True}]
FREE_PROMPT = [20, 30, 40, 50, 60]
FREE_TOKENS = 12


class Asking:
    """Asks one cluster for answers, and counts how they ended."""

    def __init__(self, http: httpx.AsyncClient, model: Path) -> None:
        self.ends = Counter[str]()
        self.has_ended = asyncio.Event()  # set with each request
        self._http = http
        self._model = model
        self._bias: dict[str, float] = {}

    async def ask_all(self, schemas: Sequence[Schema], seeds: range) -> None:
        """In all ways, and with free answers beside them, which must not notice."""
        for closer in CLOSERS:
            body = {"prompt": closer, "add_special_tokens": False}
            [token] = (await self._http.post("/tokenize", json=body)).json()["tokens"]
            self._bias[str(token)] = 4.0
        places = asyncio.Semaphore(AT_ONCE)

        async def ask(schema: Schema, seed: int, way: dict[str, Any]) -> None:
            async with places:
                await self._ask(schema, seed, way)

        async with asyncio.TaskGroup() as tasks:
            cases = itertools.product(seeds, schemas)
            for number, (seed, schema) in enumerate(cases):
                tasks.create_task(ask(schema, seed, WAYS[(number + seed) % len(WAYS)]))
                if number % AT_ONCE == 1:
                    tasks.create_task(self._ask_freely())

    async def _ask(self, schema: Schema, seed: int, way: dict[str, Any]) -> None:
        body = {
            "messages": [{"role": "user", "content": "Write some JSON."}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}},
            "temperature": 1.5,
            "seed": seed * 1000,
            "max_tokens": MAX_TOKENS,
            "logit_bias": self._bias,
            **way,
        }
        written, ends = dict[int, str](), dict[int, str]()
        async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise AssertionError((await response.aread()).decode())
            async for event in _events(response, is_stream="stream" in way):
                assert "error" not in event, event
                for choice in event["choices"]:
                    place, message = choice["index"], choice.get("delta") or choice.get("message") or {}
                    written[place] = written.get(place, "") + (message.get("content") or "")
                    if choice["finish_reason"]:
                        ends[place] = choice["finish_reason"]
        assert len(ends) == way.get("n", 1)
        for place, end in ends.items():
            self.ends[end] += 1
            if end == "stop":
                check(schema, written[place])
        self.has_ended.set()

    async def _ask_freely(self) -> None:
        stream = await stream_completion(self._http, FREE_PROMPT, max_tokens=FREE_TOKENS)
        assert len(stream.token_ids) == FREE_TOKENS, stream.error
        await asyncio.to_thread(check_identity, self._model, FREE_PROMPT, stream.token_ids)

    def check_ends(self, name: str) -> None:
        """Prints the counts. Few answers may be cut by `max_tokens`: those are not JSON."""
        print(f"{name}: {self.ends['stop']} answers are JSON of their schema, {self.ends['length']} were cut")
        assert self.ends.keys() <= {"stop", "length"}
        assert self.ends["stop"] > 0.8 * self.ends.total()


async def _events(response: httpx.Response, *, is_stream: bool) -> Any:
    if not is_stream:
        yield json.loads(await response.aread())
        return
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def client(cluster: Cluster) -> httpx.AsyncClient:
    """Its requests are never late, and so never refused, however slow the host is."""
    return httpx.AsyncClient(base_url=cluster.url, timeout=300, headers={"x-ttft-goal-ms": "3600000"})


def tiny_model(folder: Path) -> Path:
    return write_tokenizer(make_tiny_model(folder, seed=1, eos_token_id=EOS, bos_token_id=START))


async def test_answers_keep_to_their_schemas(cluster: Cluster, model_path: Path) -> None:
    async with client(cluster) as http:
        asking = Asking(http, model_path)
        await asking.ask_all(SCHEMAS[::70], range(1))
    asking.check_ends("some, SmolLM2")


@pytest.mark.full
async def test_all_schemas(cluster: Cluster, model_path: Path) -> None:
    async with client(cluster) as http:
        asking = Asking(http, model_path)
        await asking.ask_all(SCHEMAS, range(1))
    asking.check_ends("all, SmolLM2")


@pytest.mark.full
async def test_all_schemas_with_a_random_model(start_cluster: StartCluster, tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    cluster = start_cluster(prefill=1, decode=1, model=model)
    try:
        async with client(cluster) as http:
            asking = Asking(http, model)
            await asking.ask_all(SCHEMAS, range(3))
        asking.check_ends("all, random model")
    finally:
        cluster.stop()


@pytest.mark.full
@pytest.mark.parametrize("is_random", [False, True], ids=["SmolLM2", "random model"])
async def test_all_schemas_while_decode_nodes_die(
    start_cluster: StartCluster, tmp_path: Path, model_path: Path, is_random: bool
) -> None:
    model = tiny_model(tmp_path) if is_random else model_path
    cluster = start_cluster(prefill=1, decode=2, model=model)
    try:
        async with client(cluster) as http, observe(cluster.nats_url) as observer:
            finishes = await observer.events("flowkv.v1.event.request_finished.>")
            asking = Asking(http, model)
            load = asyncio.create_task(asking.ask_all(SCHEMAS, range(3 if is_random else 1)))
            num_killed = 0
            for victim in itertools.cycle(["decode-0", "decode-1"]):
                for _ in range(5):  # among its answers are some of all ages
                    asking.has_ended.clear()
                    waiting = asyncio.create_task(asking.has_ended.wait())
                    await asyncio.wait([load, waiting], return_when=asyncio.FIRST_COMPLETED, timeout=60)
                    waiting.cancel()
                if load.done():
                    break
                cluster.processes[victim].kill()
                num_killed += 1
                cluster.start_node("decode", victim)
                await observer.wait_linked(victim, num_peers=2)
            await load
            num_retried = sum(event["attempts"] > 1 for _, event in finishes.events)
    finally:
        cluster.stop()
    asking.check_ends(f"all, {num_killed} nodes killed, {num_retried} answers went on elsewhere")
    assert num_retried > 0
