"""A node that is drained or cordoned over NATS takes nothing new, stays, and comes back when told to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from flowkv.roles import ROLES
from flowkv_common.bus.connection import connect
from flowkv_common.errors import Unavailable
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Cancel, Reserved
from flowkv_engine.engine.model import LoadedModel
from flowkv_node.host import serve_node, served_model
from tests.live_nodes import TOKEN_BUDGET, LiveNode, client, first, node_settings, one_node, reports
from tests.nats_server import NatsServer

PROMPT = [30] * 20
NUM_TOKENS = 12


@pytest.fixture
def drain_timeout_s() -> float:
    return 10.0


@pytest.fixture
async def node(
    nats_server: NatsServer, model: LoadedModel, drain_timeout_s: float
) -> AsyncIterator[LiveNode]:
    async with one_node(nats_server, model, test_hooks=True, drain_timeout_s=drain_timeout_s) as node:
        yield node


async def generate(node: LiveNode) -> list[int]:
    return await node.generate(PROMPT, max_tokens=NUM_TOKENS)


async def reserve(node: LiveNode, transfer_id: str, token: str = "") -> Reserved:
    return await node.client.reserve(node.ref, len(PROMPT), transfer_id, token)


async def states(node: LiveNode) -> set[str]:
    """As `nats micro info` shows it, of the node's three services."""
    answers = [
        json.loads((await node.bus.nc.request(f"$SRV.INFO.{name}.{node.ref.node_id}", b"", timeout=5)).data)
        for name in ("prefill", "decode", "node")
    ]
    return {answer["metadata"]["state"] for answer in answers}


async def health(node: LiveNode) -> tuple[int, str]:
    answer = await node.get("/health/ready")
    return answer.status_code, answer.text.strip()


async def test_a_drained_node_finishes_takes_nothing_new_and_comes_back(node: LiveNode) -> None:
    expected = await generate(node)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(generate(node))
        await first(node.heard, lambda report: report.num_prompts_accepted == 2)
        await node.drain()
        report = await first(node.heard, lambda report: report.draining)
        assert not report.ready
        with pytest.raises(Unavailable, match="n0: draining"):
            await generate(node)
        with pytest.raises(Unavailable, match="n0: draining"):
            await reserve(node, "new.0")
    assert running.result() == expected
    assert await health(node) == (503, "draining")
    assert await states(node) == {"draining"}
    await node.drain()  # again: nothing changes
    assert (await first(node.heard, lambda report: not report.num_running)).draining
    await node.resume()
    report = await first(node.heard, lambda report: report.ready)
    assert not report.draining
    assert await health(node) == (200, "ready")
    assert await states(node) == {"ready"}
    assert await generate(node) == expected


@pytest.mark.parametrize("drain_timeout_s", [0.2])
async def test_what_a_drain_has_not_finished_in_time_goes_back_to_its_gateway(node: LiveNode) -> None:
    async def is_given_back() -> None:
        with pytest.raises(Unavailable, match="n0 is draining"):
            await generate(node)

    await node.wedge(for_s=3.0)  # longer than the drain may take, shorter than what counts as wedged
    reserved = await reserve(node, "early.0")
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(is_given_back())
        await first(node.heard, lambda report: report.num_prompts == 1)
        await node.drain()
        await reserve(node, "early.0", reserved.token)  # what is promised is kept
    report = await first(node.heard, lambda report: report.blocks.leased == 0)
    assert (report.draining, report.num_running) == (True, 0)
    await node.resume()
    assert len(await generate(node)) == NUM_TOKENS


@pytest.mark.parametrize("drain_timeout_s", [0.2])
async def test_a_cordoned_node_keeps_what_it_has_for_longer_than_a_drain(node: LiveNode) -> None:
    await node.wedge(for_s=1.5)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(generate(node))
        await first(node.heard, lambda report: report.num_prompts == 1)
        await node.cordon()
        report = await first(node.heard, lambda report: report.is_cordoned)
        assert (report.ready, report.draining) == (False, False)
        with pytest.raises(Unavailable, match="n0: cordoned"):
            await generate(node)
        with pytest.raises(Unavailable, match="n0: cordoned"):
            await reserve(node, "new.0")
        await node.set_cap(TOKEN_BUDGET, epoch=7)  # the word of another leader
        report = await first(node.heard, lambda report: report.epoch == 7)
        assert report.is_cordoned
        assert not running.done()
    assert len(running.result()) == NUM_TOKENS
    assert await health(node) == (503, "cordoned")
    assert await states(node) == {"cordoned"}
    await node.drain()  # the stronger word counts, and one word ends both
    assert await health(node) == (503, "draining")
    await node.resume()
    report = await first(node.heard, lambda report: report.ready)
    assert not report.is_cordoned
    assert await generate(node) == running.result()


async def test_a_node_that_leaves_does_not_come_back(nats_server: NatsServer, model: LoadedModel) -> None:
    settings = node_settings(nats_server, model, "n1", drain_timeout_s=10.0)
    stop = asyncio.Event()
    async with connect(nats_server.url, name="test") as bus, reports(bus, "n1") as heard:
        async with asyncio.TaskGroup() as tasks, client(bus, model.card.fingerprint) as asker:
            tasks.create_task(serve_node(settings, "mixed", served_model(model, settings), ROLES, stop))
            ref = (await first(heard, lambda report: report.ready)).node
            node = LiveNode(bus, asker, ref, heard)
            reserved = await reserve(node, "early.0")  # else it would be gone at once
            stop.set()
            await first(heard, lambda report: report.draining)
            with pytest.raises(Unavailable, match="n1 leaves"):
                await node.resume()
            assert reserved.transfer_id == "early.0"
            await bus.publish(subjects.cancel("early.0"), Cancel(transfer_id="early.0", reason="test"))
