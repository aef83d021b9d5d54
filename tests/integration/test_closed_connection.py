"""When NATS refuses a node for good, the node ends: a new process may have new credentials."""

from __future__ import annotations

import asyncio

import pytest

from flowkv.roles import ROLES
from flowkv_common.bus.connection import connect
from flowkv_common.errors import Unavailable
from flowkv_engine.engine.model import LoadedModel
from flowkv_node.host import serve_node, served_model
from tests.live_nodes import node_settings, reports
from tests.nats_users import server_with_users


async def test_a_node_ends_when_nats_refuses_it_for_good(model: LoadedModel) -> None:
    with server_with_users("test", "node") as users:
        settings = node_settings(
            users.server, model, "n", drain_timeout_s=30.0, nats_url=users.url("node"), nats_give_up_s=0.1
        )
        async with connect(users.url("test"), name="test") as bus, reports(bus, "n") as heard:
            node = asyncio.create_task(
                serve_node(settings, "mixed", served_model(model, settings), ROLES, asyncio.Event())
            )
            async with asyncio.timeout(20):
                await heard.get()
            users.refuse("node")
            with pytest.raises(Unavailable, match="closed the connection for good.*Authorization"):
                await asyncio.wait_for(node, 10)
