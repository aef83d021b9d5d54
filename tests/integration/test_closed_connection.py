"""When NATS ends a node's connection for good, the node ends: a new process may have new credentials."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import patch

import pytest

from flowkv.roles import ROLES
from flowkv_common.bus.connection import Bus, connect
from flowkv_common.errors import Unavailable
from flowkv_engine.engine.model import LoadedModel
from flowkv_node.host import serve_node, served_model
from tests.live_nodes import node_settings, reports
from tests.nats_server import NatsServer


async def test_a_node_ends_when_nats_ends_its_connection(nats_server: NatsServer, model: LoadedModel) -> None:
    settings = node_settings(nats_server, model, "n", drain_timeout_s=30.0)
    opened: list[Bus] = []
    init = Bus.__init__

    def note(bus: Bus, *arguments: Any) -> None:
        opened.append(bus)
        init(bus, *arguments)

    async with connect(nats_server.url, name="test") as bus, reports(bus, "n") as heard:
        with patch.object(Bus, "__init__", note):
            node = asyncio.create_task(
                serve_node(settings, "mixed", served_model(model, settings), ROLES, asyncio.Event())
            )
            async with asyncio.timeout(20):
                await heard.get()
            await opened[0].nc._process_err("'Authorization Violation'")
            with pytest.raises(Unavailable, match="closed the connection for good.*Authorization"):
                await asyncio.wait_for(node, 10)
