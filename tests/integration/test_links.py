"""A link uses the first connector that a probe shows to work, and tells when that is not the best."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from flowkv_common.bus.connection import connect
from flowkv_common.cluster_view import viewing
from flowkv_engine.engine.model import LoadedModel
from tests.live_nodes import live_node
from tests.nats_server import NatsServer
from tests.waiting import until


@pytest.mark.parametrize(
    ("theirs", "told"),
    [("shm,tcp", []), ("tcp", ["KV goes to b by tcp, not by shm: the peer does not offer it"])],
)
async def test_a_slower_link_is_warned_about(
    nats_server: NatsServer,
    model: LoadedModel,
    caplog: pytest.LogCaptureFixture,
    theirs: str,
    told: list[str],
) -> None:
    async with connect(nats_server.url, name="test") as bus:
        async with live_node(nats_server, bus, model, "b", connectors=theirs):
            async with live_node(nats_server, bus, model, "a", connectors="shm,tcp", peers=1):
                async with viewing(bus) as view:
                    await until(lambda: len(view.services("node")) == len(view.nodes()) == 2)
                    shown = [node.slower_links for node in view.nodes() if node.node_id == "a"]
    assert shown == [told[0].removeprefix("KV goes ") if told else ""]
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert [message for message in warnings if message.startswith("KV goes to b")] == told


has_ipv6 = Path("/proc/net/if_inet6").exists() and "lo" in Path("/proc/net/if_inet6").read_text().split()


@pytest.mark.skipif(not has_ipv6, reason="this host has no IPv6")
async def test_nodes_may_have_addresses_of_ipv6(nats_server: NatsServer, model: LoadedModel) -> None:
    there: dict[str, Any] = {"connectors": "tcp", "host": "::", "advertise_host": "::1"}
    async with connect(nats_server.url, name="test") as bus:
        async with live_node(nats_server, bus, model, "b", **there):
            async with live_node(nats_server, bus, model, "a", **there, peers=1):
                pass


async def test_a_node_bound_to_all_addresses_is_reached_by_its_hosts_name(
    nats_server: NatsServer, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")
    wildcard: dict[str, Any] = {"connectors": "tcp", "host": "0.0.0.0"}
    async with connect(nats_server.url, name="test") as bus:
        async with live_node(nats_server, bus, model, "b", **wildcard):
            async with live_node(nats_server, bus, model, "a", **wildcard, peers=1):
                pass
