"""Of a node's addresses a peer takes the first that leads to it, or says what is wrong with each."""

from __future__ import annotations

import asyncio
import socket

import pytest

from flowkv_engine.transport import stream
from flowkv_engine.transport.base import ConnectorUnavailable
from flowkv_engine.transport.sockets import split_host_port
from tests.contract.kv_nodes import LINK_TOKEN, network
from tests.contract.test_connectors import assert_serves
from tests.unit.test_kv_sockets import deaf


async def test_a_dial_that_nobody_answers_says_so() -> None:
    async with network("tcp") as net:
        sender = await net.node(io_timeout_s=0.05)
        with deaf("127.0.0.2", port := 9201):
            with pytest.raises(ConnectorUnavailable, match=r"^tcp to 127.0.0.2:9201: .* for 0.05 s$"):
                await sender.connector.connect(f"127.0.0.2:{port}", LINK_TOKEN, 24)


async def test_the_first_way_that_leads_to_the_peer_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """One refuses, one never answers, one accepts and says nothing, one leads to another node."""
    monkeypatch.setattr(stream, "_NEXT_WAY_S", 0.1)
    async with network("tcp") as net:
        receiver, sender, another = await net.node(), await net.node(), await net.node()
        port = split_host_port(receiver.address)[1]
        another.connector.admits = lambda _: False  # type: ignore[attr-defined]
        with socket.socket() as silent, deaf("127.0.0.2", port):
            silent.bind(("127.0.0.3", port))
            silent.listen()
            dead_ends = [f"127.0.0.{host}:{port}" for host in (4, 2, 3)] + [another.address]
            receiver.address = ",".join([*dead_ends, receiver.address, "127.0.0.5:1"])
            await assert_serves(receiver, sender)
            with pytest.raises(ConnectorUnavailable) as refused:
                async with asyncio.timeout(5):
                    await sender.connector.connect(",".join(dead_ends), LINK_TOKEN, 24)
    reasons = str(refused.value).split("; ")
    words = ["Connect call failed", "for 0.1 s", "for 0.1 s", "wrong link token"]
    assert len(reasons) == 4
    for way, reason, said in zip(dead_ends, reasons, words, strict=True):
        assert reason.startswith(f"tcp to {way}: ")
        assert said in reason
