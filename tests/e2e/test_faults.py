"""Processes that really die, servers that really restart, during load."""

from __future__ import annotations

import asyncio
import random
import re
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from flowkv.local_cluster import Cluster, free_port
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Accepted
from flowkv_common.wire.nodes import LoadReport, Wedge
from tests.e2e.conftest import StartCluster
from tests.e2e.load import Streamed, stream_completion, wait_healthy
from tests.e2e.observer import observe
from tests.oracle import check_identity

NUM_STREAMS = 6
TOKENS = 32
NODES = ("prefill-0", "prefill-1", "decode-0", "decode-1")


@pytest.fixture(scope="module")
def cluster(start_cluster: StartCluster) -> Cluster:
    """Two nodes of each kind, so that one of each may die."""
    settings = {"FLOWKV_KV_CACHE_BYTES": str(256 << 20), "FLOWKV_WEDGE_TIMEOUT_S": "3"}
    return start_cluster(prefill=2, decode=2, settings=settings)


class Load:
    """Streams that run while something breaks. `under_way` is set when every one has given some tokens."""

    def __init__(
        self, http: httpx.AsyncClient, tasks: asyncio.TaskGroup, *, num: int = NUM_STREAMS, **extra: Any
    ) -> None:
        rng = random.Random(5)
        self.under_way = asyncio.Event()
        self._num_started = 0
        self._num = num
        prompts = [[rng.randrange(20, 49_000) for _ in range(rng.randrange(20, 120))] for _ in range(num)]
        self._tasks = [
            tasks.create_task(
                stream_completion(http, prompt, max_tokens=TOKENS, on_chunk=self._count, **extra)
            )
            for prompt in prompts
        ]

    def _count(self, stream: Streamed) -> None:
        if len(stream.token_ids) == 3:
            self._num_started += 1
            if self._num_started == self._num:
                self.under_way.set()

    async def wait_under_way(self) -> None:
        async with asyncio.timeout(60):
            await self.under_way.wait()

    async def results(self) -> list[Streamed]:
        async with asyncio.timeout(120):
            return await asyncio.gather(*self._tasks)


def check_finished(model: Path, streams: list[Streamed]) -> None:
    for stream in streams:
        assert stream.error is None, stream.error
        assert (len(stream.token_ids), stream.finish_reason) == (TOKENS, "length")
        assert stream.saw_done
        check_identity(model, stream.prompt_ids, stream.token_ids)


def client(cluster: Cluster) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=cluster.url, timeout=120)


@pytest.mark.parametrize("victim", ["decode-0", "prefill-0"])
async def test_killed_node_costs_no_stream(cluster: Cluster, model_path: Path, victim: str) -> None:
    survivors = [node for node in NODES if node != victim]
    async with client(cluster) as http, observe(cluster.nats_url) as observer:
        async with asyncio.TaskGroup() as tasks:
            load = Load(http, tasks)
            numbers = Load(http, tasks, num=2, structured_outputs={"regex": "([0-9]{1,3},){40}"})
            await load.wait_under_way()
            await numbers.wait_under_way()
            # More prompts, so that the victim dies in the middle of prefills and handoffs too.
            more = Load(http, tasks)
            cluster.processes[victim].kill()
            streams = await load.results() + await more.results()
        check_finished(model_path, streams)
        for stream in await numbers.results():
            assert (len(stream.token_ids), stream.error) == (TOKENS, None)
            assert re.fullmatch("([0-9]{1,3},)*[0-9]{0,3}", stream.text), "the retry goes on in the grammar"
        await observer.wait_idle(survivors, timeout_s=10)
        cluster.start_node(victim.split("-")[0], victim)
        await observer.wait_linked(victim, num_peers=3)


@pytest.mark.parametrize("down_s", [0.0, 8.0], ids=["shorter than the TTL", "longer than the TTL"])
async def test_nats_restart(cluster: Cluster, model_path: Path, down_s: float) -> None:
    async with client(cluster) as http:
        async with asyncio.TaskGroup() as tasks:
            load = Load(http, tasks)
            await load.wait_under_way()
            cluster.processes["nats"].kill()
            await asyncio.sleep(down_s)  # the outage itself, not a wait for something
            cluster.start_nats()
            streams = await load.results()
        # None hangs; each has finished or ended with a clean error.
        finished = [stream for stream in streams if stream.error is None]
        check_finished(model_path, finished)
        for stream in streams:
            assert stream.error is None or stream.error["type"], stream
        async with asyncio.timeout(10):
            again = await stream_completion(http, [100, 200, 300], max_tokens=TOKENS)
        check_finished(model_path, [again])
    assert all(process.is_running for process in cluster.processes.values())
    async with observe(cluster.nats_url) as observer:
        await observer.wait_idle(NODES, timeout_s=15)


@pytest.mark.full
@pytest.mark.parametrize("frozen_s", [8.0, 20.0], ids=["connections are lost", "longer than new ones wait"])
async def test_nats_that_stands_still_costs_no_stream(
    cluster: Cluster, model_path: Path, frozen_s: float
) -> None:
    async with client(cluster) as http:
        async with asyncio.TaskGroup() as tasks:
            load = Load(http, tasks)
            await load.wait_under_way()
            more = Load(http, tasks)  # some are amid prefill or handoff, and some have no nodes yet
            await asyncio.sleep(0.2)
            cluster.processes["nats"].send_signal(signal.SIGSTOP)
            await asyncio.sleep(frozen_s)  # the outage itself, not a wait for something
            cluster.processes["nats"].send_signal(signal.SIGCONT)
            async with asyncio.timeout(10):
                again = await stream_completion(http, [100, 200, 300], max_tokens=TOKENS)
            streams = await load.results()
            begun = [stream for stream in await more.results() if stream.token_ids or frozen_s < 10]
        check_finished(model_path, [*streams, *begun, again])
    async with observe(cluster.nats_url) as observer:
        await observer.wait_idle(NODES, timeout_s=15)


async def test_killed_gateway_leaves_nothing_behind(cluster: Cluster) -> None:
    port = free_port()
    gateway = cluster.start_gateway("gateway-doomed", port)
    url = f"http://127.0.0.1:{port}"
    async with observe(cluster.nats_url) as observer, httpx.AsyncClient(base_url=url, timeout=60) as http:
        await wait_healthy(http)

        async def doomed() -> None:
            load_tasks: list[asyncio.Task[Streamed]] = []
            async with asyncio.TaskGroup() as tasks:
                load = Load(http, tasks)
                load_tasks += load._tasks
                await load.wait_under_way()
                gateway.kill()

        with pytest.raises(BaseExceptionGroup):
            await doomed()
        await observer.wait_idle(NODES, timeout_s=5)
    del cluster.processes["gateway-doomed"]


@pytest.mark.parametrize("victim", ["decode-0", "prefill-0"])
async def test_wedged_engine_goes_red_and_its_requests_move(
    cluster: Cluster, model_path: Path, victim: str
) -> None:
    red = asyncio.Event()

    def look(report: LoadReport) -> None:
        if report.node.node_id == victim and not report.ready:
            red.set()

    async with client(cluster) as http, observe(cluster.nats_url) as observer:
        async with (
            await observer.bus.subscribe(subjects.LOAD_ALL, LoadReport, look),
            asyncio.TaskGroup() as tasks,
        ):
            load = Load(http, tasks)
            await load.wait_under_way()
            wedge = subjects.at(subjects.NODE_WEDGE, victim)
            await observer.bus.request(wedge, Wedge(for_s=8), Accepted, timeout_s=5)
            more = Load(http, tasks)
            async with asyncio.timeout(10):
                await red.wait()
            streams = await load.results() + await more.results()
        check_finished(model_path, streams)
        # The stuck step ends at last; the node is as good as new.
        await observer.wait_linked(victim, num_peers=3)
        await observer.wait_idle(NODES, timeout_s=15)


async def test_stopped_node_drains(cluster: Cluster, model_path: Path) -> None:
    """SIGTERM is not a crash: what runs there may finish, nothing new arrives. The last test: it is gone."""
    async with client(cluster) as http, observe(cluster.nats_url) as observer:
        async with asyncio.TaskGroup() as tasks:
            load = Load(http, tasks)
            await load.wait_under_way()
            cluster.processes["decode-1"].send_signal(signal.SIGTERM)
            streams = await load.results()
        check_finished(model_path, streams)
        assert await asyncio.to_thread(cluster.processes["decode-1"].wait, 30) == 0
        # Its record is gone at once, not when it would have expired.
        assert "decode-1" not in {node.node.node_id for node in await observer.descriptors()}
