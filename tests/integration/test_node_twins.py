"""Two nodes of one id: the later one does not serve, and one that was replaced gives its work back."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from flowkv.roles import ROLES
from flowkv_common.bus.connection import Bus
from flowkv_common.bus.registry import NodeIdTaken, open_bucket
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import NodeRef, Refusal, StepTokens, decode, encode
from flowkv_common.wire.nodes import NodeDescriptor
from flowkv_engine.engine.model import LoadedModel
from flowkv_node.host import serve_node, served_model
from tests.live_nodes import Client, client, first, live_node, node_settings, reports
from tests.nats_server import NatsServer


async def test_the_second_of_an_id_says_why_it_does_not_serve_and_disturbs_nobody(
    nats_server: NatsServer, bus: Bus, model: LoadedModel
) -> None:
    async with live_node(nats_server, bus, model, "n0") as node, client(bus, model.card.fingerprint) as mine:
        expected = await mine.generate(node, node, [30] * 20, max_tokens=8)
        own = node_settings(nats_server, model, "n0")
        async with reports(bus, "n0") as heard, asyncio.timeout(10):
            with pytest.raises(NodeIdTaken, match="'n0' is running already on 127.0.0.1, process"):
                await serve_node(own, "mixed", served_model(model, own), ROLES, asyncio.Event())
            assert (await first(heard, lambda _: True)).node == node
        assert await mine.generate(node, node, [30] * 20, max_tokens=8) == expected


async def test_a_node_that_finds_another_incarnation_in_its_place_gives_its_work_back_and_ends(
    nats_server: NatsServer, bus: Bus, model: LoadedModel
) -> None:
    own = node_settings(nats_server, model, "n0")
    told: asyncio.Queue[Refusal | None] = asyncio.Queue()

    def hear(step: StepTokens) -> None:
        for chunk in step.chunks:
            told.put_nowait(chunk.error)

    async with await bus.subscribe(subjects.tokens("g"), StepTokens, hear), reports(bus, "n0") as heard:
        serving = asyncio.create_task(
            serve_node(own, "mixed", served_model(model, own), ROLES, asyncio.Event())
        )
        node = (await first(heard, lambda report: report.ready)).node
        await Client(bus, model.card.fingerprint).reserve(node, 9)
        async with asyncio.timeout(10):
            bucket = await open_bucket(bus, subjects.NODES_BUCKET, ttl_s=6.0)
            record = decode((await bucket.get("n0")).value or b"", NodeDescriptor)
            other = NodeRef(node_id="n0", incarnation="other")
            await bucket.put("n0", encode(msgspec.structs.replace(record, node=other)))
            with pytest.raises(NodeIdTaken):
                await serving
            error = await told.get()
        assert error is not None
        assert error.message.startswith("n0 leaves: a node 'n0' is running already")
