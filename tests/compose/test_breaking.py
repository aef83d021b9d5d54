"""Scaling and breaking the composed system under load: what can be saved is, the rest ends with an error."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest

from flowkv_common.aio import running
from flowkv_common.bus.registry import watch_nodes
from flowkv_common.wire.nodes import NodeDescriptor
from tests.compose.composed import Composed, docker
from tests.e2e.load import Streamed, stream_completion
from tests.e2e.observer import Observer, observe
from tests.oracle import check_identity

pytestmark = pytest.mark.compose

TOKENS = 24
AT_ONCE = 3
# Takes all the memory that its container may have; the kernel ends who has offered itself before.
HOG = """
import os
for pid in filter(str.isdigit, os.listdir("/proc")):
    if pid not in ("1", str(os.getpid())):
        open(f"/proc/{pid}/oom_score_adj", "w").write("1000")
hog = b"x" * (3 << 30)
"""


@pytest.fixture
async def observer(composed: Composed) -> AsyncIterator[Observer]:
    async with observe(composed.nats_url) as observer:
        yield observer


class Load:
    """A few clients, each with one stream after the other, until told to end."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.done: list[Streamed] = []
        self.broken: list[httpx.HTTPError] = []
        self._http = http
        self._ending = False
        self._news = asyncio.Event()
        rng = random.Random(3)
        prompts = [[rng.randrange(20, 49_000) for _ in range(rng.randrange(20, 200))] for _ in range(8)]
        self._prompts = itertools.cycle(prompts)

    async def client(self) -> None:
        while not self._ending:
            work = stream_completion(self._http, next(self._prompts), max_tokens=TOKENS)
            try:
                self.done.append(await work)
            except httpx.HTTPError as error:  # the gateway itself is gone
                self.broken.append(error)
                await asyncio.sleep(0.2)
            self._news.set()

    def end(self) -> None:
        self._ending = True

    async def wait_for_more(self, count: int, timeout_s: float = 120.0) -> None:
        """Until so many more streams have ended than now."""
        wanted = len(self.done) + count
        async with asyncio.timeout(timeout_s):
            while len(self.done) < wanted:
                self._news.clear()
                await self._news.wait()

    @property
    def failed(self) -> list[Streamed]:
        return [stream for stream in self.done if stream.error is not None]


@contextlib.asynccontextmanager
async def load_on(composed: Composed) -> AsyncIterator[Load]:
    """The load runs while the context lasts, and its streams are brought to their end."""
    async with httpx.AsyncClient(base_url=composed.url, timeout=120) as http, asyncio.TaskGroup() as tasks:
        load = Load(http)
        for _ in range(AT_ONCE):
            tasks.create_task(load.client())
        try:
            await load.wait_for_more(AT_ONCE)
            yield load
            await load.wait_for_more(2 * AT_ONCE)
        finally:
            load.end()


def check_all(model: Path, load: Load) -> None:
    """No stream has failed, and each has the tokens of `transformers`: none of an older attempt."""
    assert not load.broken
    assert not load.failed, [stream.error for stream in load.failed]
    for stream in load.done:
        assert (len(stream.token_ids), stream.finish_reason, stream.saw_done) == (TOKENS, "length", True)
    for prompt_ids, token_ids in {(tuple(one.prompt_ids), tuple(one.token_ids)) for one in load.done}:
        check_identity(model, list(prompt_ids), list(token_ids))


def check_clean(model: Path, load: Load) -> None:
    """For a service of which there is one: a stream has ended with an error that says so, or is right."""
    assert all(stream.error["type"] for stream in load.failed if stream.error)
    load.done = [stream for stream in load.done if stream.error is None]
    check_all(model, load)


async def run(action: Callable[..., object], *arguments: object, **options: object) -> None:
    await asyncio.to_thread(action, *arguments, **options)


async def wait_nodes(observer: Observer, count: int, timeout_s: float = 60.0) -> None:
    """Until the registry has so many nodes. It forgets one that did not take its leave within 6 s."""
    is_met = asyncio.Event()

    def look(nodes: dict[str, NodeDescriptor]) -> None:
        if len(nodes) == count:
            is_met.set()

    async with asyncio.timeout(timeout_s), running(watch_nodes(observer.bus, look)):
        await is_met.wait()


async def test_a_killed_gateway_breaks_its_own_clients_alone(
    composed: Composed, model_path: Path, observer: Observer
) -> None:
    await run(composed.up)
    async with load_on(composed) as load:
        await run(docker, "kill", composed.containers("gateway")[0])
        await run(composed.up)
    assert len(load.broken) > 0
    load.broken.clear()
    check_all(model_path, load)
    await observer.wait_idle(timeout_s=30)


async def test_the_only_decode_node_dies(composed: Composed, model_path: Path, observer: Observer) -> None:
    """Who could only be served there gets a clean error, or waits for its successor."""
    await run(composed.up)
    async with load_on(composed) as load:
        await run(docker, "kill", composed.containers("decode")[0])
        await run(composed.up)
    check_clean(model_path, load)
    await wait_nodes(observer, 2)
    await observer.wait_idle(timeout_s=30)


@pytest.mark.parametrize("how", ["restart", "kill"])
async def test_nats_goes_and_comes_back(composed: Composed, model_path: Path, how: str) -> None:
    await run(composed.up)
    async with load_on(composed) as load:
        if how == "restart":
            await run(composed.compose, "restart", "nats")
        else:
            await run(docker, "kill", composed.containers("nats")[0])
            await run(composed.up)
    check_clean(model_path, load)
    async with observe(composed.nats_url) as observer:
        await wait_nodes(observer, 2)
        await observer.wait_idle(timeout_s=30)


@pytest.mark.parametrize("service", ["prefill", "decode", "scheduler"])
async def test_a_kill_costs_no_request(
    composed: Composed, model_path: Path, observer: Observer, service: str
) -> None:
    await run(composed.up, prefill=2, decode=2, scheduler=2)
    async with load_on(composed) as load:
        await run(docker, "kill", composed.containers(service)[0])
        await load.wait_for_more(2 * AT_ONCE)
    check_all(model_path, load)
    await run(composed.up, prefill=2, decode=2, scheduler=2)
    await wait_nodes(observer, 4)
    await observer.wait_idle()


async def test_a_partitioned_decode_node(composed: Composed, model_path: Path, observer: Observer) -> None:
    await run(composed.up, prefill=1, decode=2)
    [victim, _] = composed.containers("decode")
    network = f"{composed.project}_default"
    async with load_on(composed) as load:
        await run(docker, "network", "disconnect", network, victim)
        await wait_nodes(observer, 2)
        await load.wait_for_more(2 * AT_ONCE)
        await run(docker, "network", "connect", "--alias", "decode", network, victim)
        await wait_nodes(observer, 3)
        await load.wait_for_more(2 * AT_ONCE)
    check_all(model_path, load)
    await observer.wait_idle(timeout_s=30)


async def test_a_container_over_its_memory_is_replaced(
    composed: Composed, model_path: Path, observer: Observer
) -> None:
    await run(composed.up, prefill=1, decode=2)
    [victim, _] = composed.containers("decode")
    docker("update", "--memory", "2500m", "--memory-swap", "2500m", victim)
    async with load_on(composed) as load:
        with pytest.raises(AssertionError, match="failed"):  # the hog dies with its container
            await run(docker, "exec", "--interactive", victim, "python", "-", stdin=HOG)
        await run(composed.up, prefill=1, decode=2)
    state = docker("inspect", "--format", "{{.State.OOMKilled}} {{.RestartCount}}", victim)
    assert state.split() == ["true", "1"]
    check_all(model_path, load)
    await wait_nodes(observer, 3)
    await observer.wait_idle(timeout_s=30)


async def test_scaling_under_load(composed: Composed, model_path: Path, observer: Observer) -> None:
    await run(composed.up)
    async with load_on(composed) as load:
        for service, count in itertools.product(("prefill", "decode"), (3, 1)):
            await run(composed.up, **{service: count})
            await load.wait_for_more(AT_ONCE)
    check_all(model_path, load)
    await wait_nodes(observer, 2)
    await observer.wait_idle()


async def test_a_rolling_upgrade(composed: Composed, model_path: Path, observer: Observer) -> None:
    """The commands of docs/compose.md, for one service; the new image is the old one here."""
    await run(composed.up)
    [old] = composed.containers("decode")
    up = ["up", "--detach", "--wait", "--no-recreate"]
    async with load_on(composed) as load:
        await run(composed.compose, *up, "--scale", "decode=2")
        await run(docker, "stop", "--time", "40", old)
        await run(docker, "rm", old)
        await run(composed.compose, *up)
        await load.wait_for_more(AT_ONCE)
    check_all(model_path, load)
    [new] = composed.containers("decode")
    assert new != old
    await wait_nodes(observer, 2)
    await observer.wait_idle()
