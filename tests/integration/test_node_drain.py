"""A node that is drained over NATS takes nothing new, stays, and comes back when it is told to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import NamedTuple

import httpx
import pytest
from live_nodes import Client, Heard, client, first, live_node, node_settings, reports
from nats_server import NatsServer

from flowkv.local_cluster import free_port
from flowkv.roles import ROLES
from flowkv_common.bus.connection import Bus, connect
from flowkv_common.errors import Unavailable
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Accepted, Cancel, NodeRef, Reserved
from flowkv_common.wire.nodes import Drain, ResumeNode, Wedge
from flowkv_engine.engine.model import LoadedModel
from flowkv_node.host import serve_node, served_model

PROMPT = [30] * 20
NUM_TOKENS = 12


class Setup(NamedTuple):
    bus: Bus
    client: Client
    node: NodeRef
    heard: Heard
    http: httpx.AsyncClient

    async def drain(self) -> None:
        subject = subjects.at(subjects.NODE_DRAIN, self.node.node_id)
        await self.bus.request(subject, Drain(reason="new fan"), Accepted, timeout_s=5)

    async def resume(self) -> None:
        subject = subjects.at(subjects.NODE_RESUME, self.node.node_id)
        await self.bus.request(subject, ResumeNode(), Accepted, timeout_s=5)

    async def wedge(self, for_s: float) -> None:
        subject = subjects.at(subjects.NODE_WEDGE, self.node.node_id)
        await self.bus.request(subject, Wedge(for_s=for_s), Accepted, timeout_s=5)

    async def generate(self, max_tokens: int = NUM_TOKENS) -> list[int]:
        return await self.client.generate(self.node, self.node, PROMPT, max_tokens=max_tokens)

    async def reserve(self, transfer_id: str, token: str = "") -> Reserved:
        return await self.client.reserve(self.node, len(PROMPT), transfer_id, token)

    async def states(self) -> set[str]:
        """As `nats micro info` shows it, of the node's three services."""
        answers = [
            json.loads(
                (await self.bus.nc.request(f"$SRV.INFO.{name}.{self.node.node_id}", b"", timeout=5)).data
            )
            for name in ("prefill", "decode", "node")
        ]
        return {answer["metadata"]["state"] for answer in answers}

    async def health(self) -> tuple[int, str]:
        answer = await self.http.get("/health/ready")
        return answer.status_code, answer.text.strip()


@pytest.fixture
def drain_timeout_s() -> float:
    return 10.0


@pytest.fixture
async def setup(nats_server: NatsServer, model: LoadedModel, drain_timeout_s: float) -> AsyncIterator[Setup]:
    port = free_port()
    async with AsyncExitStack() as opened:
        bus = await opened.enter_async_context(connect(nats_server.url, name="test"))
        node = await opened.enter_async_context(
            live_node(
                nats_server,
                bus,
                model,
                "n0",
                http_port=port,
                test_hooks=True,
                drain_timeout_s=drain_timeout_s,
            )
        )
        heard = await opened.enter_async_context(reports(bus, "n0"))
        http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False)
        yield Setup(
            bus,
            await opened.enter_async_context(client(bus, model.card.fingerprint)),
            node,
            heard,
            await opened.enter_async_context(http),
        )


async def test_a_drained_node_finishes_takes_nothing_new_and_comes_back(setup: Setup) -> None:
    expected = await setup.generate()
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(setup.generate())
        await first(setup.heard, lambda report: report.num_prompts_accepted == 2)
        await setup.drain()
        report = await first(setup.heard, lambda report: report.draining)
        assert not report.ready
        with pytest.raises(Unavailable, match="n0: draining"):
            await setup.generate()
        with pytest.raises(Unavailable, match="n0: draining"):
            await setup.reserve("new.0")
    assert running.result() == expected
    assert await setup.health() == (503, "draining")
    assert await setup.states() == {"draining"}
    await setup.drain()  # again: nothing changes
    assert (await first(setup.heard, lambda report: not report.num_running)).draining
    await setup.resume()
    report = await first(setup.heard, lambda report: report.ready)
    assert not report.draining
    assert await setup.health() == (200, "ready")
    assert await setup.states() == {"ready"}
    assert await setup.generate() == expected


@pytest.mark.parametrize("drain_timeout_s", [0.2])
async def test_what_a_drain_has_not_finished_in_time_goes_back_to_its_gateway(setup: Setup) -> None:
    async def is_given_back() -> None:
        with pytest.raises(Unavailable, match="n0 is draining"):
            await setup.generate()

    await setup.wedge(for_s=3.0)  # longer than the drain may take, shorter than what counts as wedged
    reserved = await setup.reserve("early.0")
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(is_given_back())
        await first(setup.heard, lambda report: report.num_prompts == 1)
        await setup.drain()
        await setup.reserve("early.0", reserved.token)  # what is promised is kept
    report = await first(setup.heard, lambda report: report.blocks.leased == 0)
    assert (report.draining, report.num_running) == (True, 0)
    await setup.resume()
    assert len(await setup.generate()) == NUM_TOKENS


async def test_a_node_that_leaves_does_not_come_back(nats_server: NatsServer, model: LoadedModel) -> None:
    settings = node_settings(nats_server, model, "n1", drain_timeout_s=10.0)
    stop = asyncio.Event()
    async with connect(nats_server.url, name="test") as bus, reports(bus, "n1") as heard:
        async with asyncio.TaskGroup() as tasks, client(bus, model.card.fingerprint) as asker:
            tasks.create_task(serve_node(settings, "mixed", served_model(model, settings), ROLES, stop))
            node = (await first(heard, lambda report: report.ready)).node
            mine = Setup(bus, asker, node, heard, httpx.AsyncClient())
            reserved = await mine.reserve("early.0")  # else it would be gone at once
            stop.set()
            await first(heard, lambda report: report.draining)
            with pytest.raises(Unavailable, match="n1 leaves"):
                await mine.resume()
            assert reserved.transfer_id == "early.0"
            await bus.publish(subjects.cancel("early.0"), Cancel(transfer_id="early.0", reason="test"))
