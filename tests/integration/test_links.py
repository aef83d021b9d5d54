"""A link uses the first connector that a probe shows to work, and tells when that is not the best."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest

from flowkv.local_cluster import free_port
from flowkv.status import links
from flowkv_common.aio import running
from flowkv_common.bus.connection import connect
from flowkv_common.bus.registry import keep_announced
from flowkv_common.cluster_view import viewing
from flowkv_common.errors import BadRequest
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import NodeRef
from flowkv_common.wire.nodes import PROTOCOL, LinkOffer, LinkRequest
from flowkv_engine.engine.model import LoadedModel
from tests.certificates import trial_tls
from tests.contract.kv_nodes import NIXL
from tests.live_nodes import Client, LiveNode, live_node
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
                    assert len({node.descriptor.boot_id for node in view.nodes()} - {""}) == 1
    assert shown == [told[0].removeprefix("KV goes ") if told else ""]
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert [message for message in warnings if message.startswith("KV goes to b")] == told


async def test_nodes_with_tls_link_to_each_other_and_tell_one_without_what_to_set(
    nats_server: NatsServer, model: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    files = trial_tls()
    first = free_port()
    common: dict[str, Any] = {
        "connectors": "tcp",
        "data_port": f"{first}-{first + 40}",
        "http_port": f"{first}-{first + 40}",
        "advertise_host": "127.0.0.1,127.0.0.2",
    }
    with_tls: dict[str, Any] = {
        "data_tls_cert": files.cert,
        "data_tls_key": files.key,
        "data_tls_ca": files.ca,
    }
    caplog.set_level(logging.INFO)
    async with connect(nats_server.url, name="test") as bus:
        async with live_node(nats_server, bus, model, "b", **common, **with_tls):
            async with live_node(nats_server, bus, model, "a", **common, **with_tls, peers=1):
                async with viewing(bus) as view:
                    await until(lambda: "KV by [bold]tcp with TLS[/]: a to b, b to a" in links(view.nodes()))
                async with live_node(nats_server, bus, model, "c", **common):
                    await until(lambda: sum("has no TLS" in line for line in caplog.messages) == 2)
                    await until(lambda: sum("wants TLS" in line for line in caplog.messages) == 2)
    assert {"linked to a by tcp", "linked to b by tcp"} <= set(caplog.messages)
    assert not any(line.startswith("linked to c") for line in caplog.messages)


@pytest.mark.parametrize("kind", [NIXL])
async def test_a_link_by_nixl_is_used_where_it_comes_first(
    nats_server: NatsServer, model: LoadedModel, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    caplog.set_level(logging.INFO)
    async with connect(nats_server.url, name="test") as bus:
        async with live_node(nats_server, bus, model, "b", connectors=f"{kind},shm"):
            async with live_node(nats_server, bus, model, "a", connectors=f"{kind},shm", peers=1):
                await until(lambda: "linked to b by nixl" in caplog.messages)
                await until(lambda: "linked to a by nixl" in caplog.messages)


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


async def test_nodes_of_another_protocol_are_not_linked(
    nats_server: NatsServer, model: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither side tries; and one that asks all the same is refused."""
    async with connect(nats_server.url, name="test") as bus:
        async with live_node(nats_server, bus, model, "b") as old:
            record = await LiveNode(bus, Client(bus, ""), old, asyncio.Queue()).descriptor()
            assert record.protocol == PROTOCOL
            node = NodeRef(node_id="newer", incarnation="1")
            newer = msgspec.structs.replace(record, node=node, protocol=PROTOCOL + 1)
            ask = LinkRequest(node=old, peer=node, layout=record.layout, fingerprint=record.model.fingerprint)
            subject = subjects.at(subjects.NODE_LINK, "b")
            async with running(keep_announced(bus, lambda: newer)), viewing(bus) as view:
                await until(lambda: len(view.nodes()) == 2)
                # By then node b has been told of it too, for it links to the next one.
                async with live_node(nats_server, bus, model, "a", peers=1):
                    assert await bus.request(subject, ask, LinkOffer, timeout_s=5)
                    ask = msgspec.structs.replace(ask, protocol=PROTOCOL + 1)
                    with pytest.raises(BadRequest, match=f"newer speaks protocol {PROTOCOL + 1}") as refused:
                        await bus.request(subject, ask, LinkOffer, timeout_s=5)
    assert refused.value.field == "protocol"
    assert not [record for record in caplog.records if "no link to newer" in record.getMessage()]
