"""Hundreds of clients leave together, or their gateway dies: nodes let go of it all and serve the next."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from flowkv.local_cluster import free_port
from flowkv.processes import Process
from flowkv_common.bus.connection import connect
from flowkv_common.wire import subjects
from flowkv_common.wire.nodes import LoadReport
from tests.e2e.load import stream_completion, wait_healthy
from tests.e2e.observer import observe
from tests.e2e.test_paced_nodes import Paced, fit, prompt_of
from tests.paced.cluster import READY_TIMEOUT_S, node_settings, services, variables, wait_linked
from tests.paced.nodes import pace_of, paced_nodes

NUM_PROMPT_TOKENS = 500
NUM_OUTPUTS = 4


async def leave_together(system: Paced, num_clients: int, after_s: float) -> None:
    """So many clients ask for an answer; after so long all connections close in one tick."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=system.cluster.url, timeout=60, limits=limits) as http:
        asking = [
            asyncio.create_task(
                stream_completion(http, prompt_of(NUM_PROMPT_TOKENS, seed), max_tokens=NUM_OUTPUTS)
            )
            for seed in range(num_clients)
        ]
        await asyncio.sleep(after_s)
        num_answered = sum(task.done() for task in asking)
        for task in asking:
            task.cancel()
        await asyncio.wait(asking)
    assert num_answered < num_clients / 2  # else it was no storm


async def wait_let_go(system: Paced) -> None:
    """Until no node holds requests, blocks, reservations or any of its budget. Raises AssertionError."""
    async with observe(system.cluster.nats_url) as observer:
        await observer.wait_idle(system.nodes, timeout_s=10)
    held: dict[str, tuple[int, int]] = {}
    all_free = asyncio.Event()

    def look(report: LoadReport) -> None:
        held[report.node.node_id] = (report.num_handoffs, report.handoff_bytes)
        if held == dict.fromkeys(system.nodes, (0, 0)):
            all_free.set()

    async with connect(system.cluster.nats_url, name="test") as bus:
        async with await bus.subscribe(subjects.LOAD_ALL, LoadReport, look):
            try:
                async with asyncio.timeout(5):
                    await all_free.wait()
            except TimeoutError:
                raise AssertionError(f"handoffs and bytes still in flight: {held}") from None


async def serve_the_next(system: Paced, seed: int) -> None:
    """One request, answered as if nothing had been."""
    prompt_ids = prompt_of(NUM_PROMPT_TOKENS, seed)
    async with asyncio.timeout(10):
        answer = await stream_completion(system.http, prompt_ids, max_tokens=NUM_OUTPUTS)
    assert answer.error is None
    assert answer.token_ids == system.expected(prompt_ids, NUM_OUTPUTS)


@asynccontextmanager
async def patient(folder: Path, model_path: Path, counts: Mapping[str, int]) -> AsyncIterator[Paced]:
    """A cluster that refuses nobody for having to wait: 120 prompts take a prefill node over half a minute.

    Nobody is lent: all prompts queue at the prefill nodes.
    """
    costs = pace_of(str(model_path), fit(base_s=0.01))
    with services(folder, model_path, variables(max_wait_s=600, lending=False)) as cluster:
        settings = node_settings(cluster, model_path, 4096, token_budget=256, connectors="shm,tcp")
        async with (
            paced_nodes(settings, costs, counts) as nodes,
            httpx.AsyncClient(base_url=cluster.url, timeout=60) as http,
        ):
            await wait_linked(cluster.nats_url, len(nodes))
            await asyncio.to_thread(cluster.wait_ready, READY_TIMEOUT_S)
            yield Paced(cluster, nodes, costs, http)


async def test_nodes_serve_on_after_clients_have_left_together(tmp_path: Path, model_path: Path) -> None:
    async with patient(tmp_path, model_path, {"prefill": 1, "decode": 1}) as system:
        for wave, after_s in enumerate((0.8, 1.6)):
            await leave_together(system, 120, after_s)
            await wait_let_go(system)
            await serve_the_next(system, seed=1000 + wave)


@pytest.mark.full
@pytest.mark.parametrize("num_each", [1, 2])
@pytest.mark.parametrize(("num_waves", "num_clients"), [(3, 120), (2, 300)])
async def test_nodes_serve_on_after_storms(
    tmp_path: Path, model_path: Path, num_each: int, num_waves: int, num_clients: int
) -> None:
    async with patient(tmp_path, model_path, {"prefill": num_each, "decode": num_each}) as system:
        for wave in range(num_waves):
            await leave_together(system, num_clients, 2.5)
            await wait_let_go(system)
            await serve_the_next(system, seed=1000 + wave)


@pytest.mark.full
@pytest.mark.parametrize("num_each", [1, 2])
async def test_nodes_serve_on_after_their_gateway_has_died(
    tmp_path: Path, model_path: Path, num_each: int
) -> None:
    async with patient(tmp_path, model_path, {"prefill": num_each, "decode": num_each}) as system:
        port = free_port()
        doomed: Process = system.cluster.start_gateway("doomed", port)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            await wait_healthy(http)
            asking = [
                asyncio.create_task(
                    stream_completion(http, prompt_of(NUM_PROMPT_TOKENS, seed), max_tokens=NUM_OUTPUTS)
                )
                for seed in range(100)
            ]
            await asyncio.sleep(2.5)
            doomed.kill()
            await asyncio.wait(asking)
        del system.cluster.processes["doomed"]
        assert all(task.exception() for task in asking[50:])
        await wait_let_go(system)
        await serve_the_next(system, seed=1000)


@pytest.mark.full
@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_nodes_serve_on_after_a_wedge(tmp_path: Path, model_path: Path, side: str) -> None:
    """All that a wedged node holds is given back in one tick; its requests are served elsewhere, or later."""
    async with patient(tmp_path, model_path, {"prefill": 2, "decode": 2}) as system:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=system.cluster.url, timeout=120, limits=limits) as http:
            prompts = [prompt_of(NUM_PROMPT_TOKENS, seed) for seed in range(60)]
            asking = [
                asyncio.create_task(stream_completion(http, prompt, max_tokens=NUM_OUTPUTS))
                for prompt in prompts
            ]
            await asyncio.sleep(1.0)
            engine = system.nodes[f"{side}-0"].engine
            assert engine is not None
            engine.wedge(10.0)  # longer than `wedge_timeout_s`
            answers = await asyncio.gather(*asking)
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.error is None
            assert answer.token_ids == system.expected(prompt, NUM_OUTPUTS)
        await wait_let_go(system)
        await serve_the_next(system, seed=1000)
