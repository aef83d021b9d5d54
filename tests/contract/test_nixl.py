"""What only the connector over NIXL has to keep."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from typing import Any

import msgspec
import pytest

from flowkv_common.errors import CannotStart
from flowkv_engine.kv.blocks import Blocks
from flowkv_engine.kv.pool import KVPool
from flowkv_engine.kv.reservations import Reservations
from flowkv_engine.transport import make_connectors
from flowkv_engine.transport.base import ConnectorUnavailable
from flowkv_engine.transport.nixl import NixlConnector
from flowkv_engine.transport.nixl_memory import ShownAgent, can_read
from flowkv_engine.transport.sockets import Place
from flowkv_engine.transport.stream import Refused
from tests.certificates import trial_tls
from tests.contract.kv_nodes import LINK_TOKEN, NIXL, SMALL, Node, network
from tests.contract.test_connectors import assert_hangs_up, assert_serves, dial, hello

with_nixl = pytest.mark.parametrize("kind", [NIXL])


def nixl(node: Node) -> NixlConnector:
    assert isinstance(node.connector, NixlConnector)
    return node.connector


async def own_pool(sender: Node, receiver: Node) -> ShownAgent:
    """What the sender shows to all."""
    await (await sender.connector.connect(receiver.address, LINK_TOKEN, 24)).close()
    own = nixl(sender)._own
    assert own is not None
    return own.shown


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("nixl_cu12", "nixl_cu13"):
        monkeypatch.setitem(sys.modules, f"{package}._bindings", None)
        monkeypatch.setitem(sys.modules, package, None)
    with KVPool(SMALL, 1) as pool, pytest.raises(CannotStart, match=r"pip install 'flowkv\[nixl\]'"):
        make_connectors(["nixl"], pool, Reservations(Blocks(1)), LINK_TOKEN.__eq__)


@with_nixl
async def test_versions_that_differ_get_no_link(kind: str) -> None:
    async with network(kind) as net:
        receiver, sender = await net.node(), await net.node()
        library = nixl(sender).library
        nixl(sender).library = library._replace(version="0.1")
        reason = f"NIXL versions differ: receiver {library.version}, sender 0.1"
        with pytest.raises(ConnectorUnavailable, match=reason):
            await sender.connector.connect(receiver.address, LINK_TOKEN, 24)
        await assert_serves(receiver, await net.node())


@with_nixl
@pytest.mark.parametrize(
    "lie", [{"metadata": b""}, {"metadata": b"noise"}, {"metadata": bytes(5000)}, {"address": 64}], ids=str
)
async def test_a_pool_that_is_not_what_its_sender_says_costs_only_its_connection(
    kind: str, lie: dict[str, Any]
) -> None:
    async with network(kind) as net:
        receiver, sender = await net.node(), await net.node()
        shown = msgspec.structs.replace(await own_pool(sender, receiver), **lie)
        with await dial(receiver) as channel:
            await channel.send_frame(hello())
            await channel.expect_yes()
            await channel.send_frame(shown)
            with pytest.raises(Refused, match="NIXL"):
                await channel.expect_yes()
            await assert_hangs_up(channel)
        await assert_serves(receiver, sender)


@with_nixl
async def test_without_rdma_a_process_that_can_not_be_read_gets_no_link(kind: str) -> None:
    """As one of another host: over TCP, UCX could end the sender's process."""
    async with network(kind) as net:
        receiver, sender = await net.node(), await net.node()
        await assert_serves(receiver, sender)
        own = nixl(sender)._own
        assert own is not None
        own.shown = msgspec.structs.replace(own.shown, nonce=bytes(16))
        with pytest.raises(ConnectorUnavailable, match="there is no RDMA, and the sender's memory can't be"):
            await sender.connector.connect(receiver.address, LINK_TOKEN, 24)


def test_only_memory_that_holds_what_is_expected_can_be_read() -> None:
    here = ctypes.create_string_buffer(b"sixteen bytes...", 16)
    address = ctypes.addressof(here)
    assert can_read(os.getpid(), address, here.raw)
    assert not can_read(os.getpid(), address, bytes(16))
    assert not can_read(os.getpid(), 64, here.raw)
    assert not can_read(1 << 30, address, here.raw)


@with_nixl
async def test_with_tls_the_log_says_that_kv_is_not_encrypted(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with KVPool(SMALL, 1) as pool:
        make_connectors(
            [kind, "tcp"], pool, Reservations(Blocks(1)), LINK_TOKEN.__eq__, place=Place(tls=trial_tls())
        )
    warned = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warned == ["nixl moves KV unencrypted: FLOWKV_DATA_TLS_CERT protects its secrets alone"]
