"""The KV port with TLS: who gets in, who is believed, and what somebody between two nodes sees."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from flowkv.authority import make_certificates
from flowkv_common.errors import CannotStart
from flowkv_engine.kv.segments import Copy
from flowkv_engine.transport import tls
from flowkv_engine.transport.base import ConnectorUnavailable
from flowkv_engine.transport.sockets import Place, dial_tcp, split_address
from flowkv_engine.transport.stream import Channel, Reply, StreamConnector, StreamLink
from flowkv_engine.transport.tls import Tls
from tests.certificates import tls_of, trial_certificates, trial_tls
from tests.contract.kv_nodes import LINK_TOKEN, SMALL, Node, network
from tests.contract.test_connectors import assert_hangs_up, assert_serves, hello


def show(node: Node, shown: Tls | None) -> None:
    """From now on the node has these certificates."""
    assert isinstance(node.connector, StreamConnector)
    node.connector.place = Place(tls=shown)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of an authority that nobody here knows."""
    folder = tmp_path_factory.mktemp("others")
    make_certificates(folder)
    return folder


def mixed(own: Path, trusted: Path, name: str = "node") -> Tls:
    """The certificate of one authority, and trust in another."""
    return tls_of(own, name)._replace(ca=f"{trusted}/ca.pem")


async def dial_without_certificate(receiver: Node) -> Channel:
    [way], _ = split_address(receiver.address)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(trial_tls().ca)

    class Nobody(Tls):
        def context(self, *, is_server: bool) -> ssl.SSLContext:
            return context

    sock = await tls.shake_hands(await dial_tcp(way), Nobody("", "", ""), is_server=False)
    return Channel(sock, 5.0)


async def test_a_sender_without_a_certificate_is_hung_up_on(caplog: pytest.LogCaptureFixture) -> None:
    async with network("tls") as net:
        receiver, sender = await net.node(), await net.node()
        with await dial_without_certificate(receiver) as channel:
            await channel.send_frame(hello())
            with pytest.raises(OSError, match=r"(?i)certificate.required"):
                await channel.receive_frame(Reply)
        await assert_serves(receiver, sender)
    assert "peer did not return a certificate" in caplog.text


async def test_a_sender_of_another_authority_is_hung_up_on(
    others: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with network("tls") as net:
        receiver, sender, intruder = await net.node(), await net.node(), await net.node()
        show(intruder, mixed(others, trial_certificates()))
        with pytest.raises(ConnectorUnavailable, match="(?i)unknown.ca"):
            await intruder.connector.connect(receiver.address, LINK_TOKEN, 24)
        await assert_serves(receiver, sender)
    assert "certificate verify failed" in caplog.text


async def test_a_sender_with_another_services_certificate_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with network("tls") as net:
        receiver, sender, intruder = await net.node(), await net.node(), await net.node()
        show(intruder, tls_of(trial_certificates(), "gateway"))
        with pytest.raises(ConnectorUnavailable, match="a certificate for gateway, .*not for 'node'"):
            await intruder.connector.connect(receiver.address, LINK_TOKEN, 24)
        await assert_serves(receiver, sender)
    assert [record.levelno for record in caplog.records if "gateway" in record.message] == [logging.WARNING]


@pytest.mark.parametrize("intruder", ["another authority's", "another service's"])
async def test_a_receiver_that_is_no_node_is_shown_no_secret(intruder: str, others: Path) -> None:
    shown = tls_of(others) if intruder == "another authority's" else tls_of(trial_certificates(), "gateway")
    heard: list[bytes] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read())
        writer.close()

    accepting = shown.context(is_server=True)
    accepting.verify_mode = ssl.CERT_NONE
    async with network("tls") as net:
        sender = await net.node()
        async with await asyncio.start_server(listen, "127.0.0.1", 0, ssl=accepting) as server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(ConnectorUnavailable, match="certificate verify failed"):
                await sender.connector.connect(f"tls://127.0.0.1:{port}", LINK_TOKEN, 24)
    assert heard == []


async def test_one_with_tls_and_one_without_say_what_to_set() -> None:
    async with network("tls") as net:
        receiver, plain = await net.node(), await net.node()
        show(plain, None)
        with pytest.raises(ConnectorUnavailable, match="the peer wants TLS: set FLOWKV_DATA_TLS_CERT here"):
            await plain.connector.connect(receiver.address, LINK_TOKEN, 24)
        without = receiver.address.removeprefix("tls://")
        with pytest.raises(ConnectorUnavailable, match="the peer has no TLS: set FLOWKV_DATA_TLS_CERT there"):
            await receiver.connector.connect(without, LINK_TOKEN, 24)


async def test_plain_words_to_a_port_with_tls_cost_only_their_connection() -> None:
    async with network("tls") as net:
        receiver, sender = await net.node(), await net.node()
        [way], _ = split_address(receiver.address)
        with Channel(await dial_tcp(way), 5.0) as channel:
            await channel.send_frame(hello())
            with pytest.raises(ConnectionError):
                await channel.receive_frame(Reply)
        await assert_serves(receiver, sender)


@contextlib.asynccontextmanager
async def wiretap(way: str, seen: bytearray) -> AsyncIterator[str]:
    """A place that hands on what comes to `way` and back, and writes all of it down."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            seen.extend(data)
            writer.write(data)
            await writer.drain()
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = way.rpartition(":")
        there_reader, there_writer = await asyncio.open_connection(host, int(port))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(copy(reader, there_writer))
            tasks.create_task(copy(there_reader, writer))

    async with await asyncio.start_server(relay, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize("kind", ["tcp", "tls"])
async def test_with_tls_somebody_in_between_sees_neither_secrets_nor_kv(kind: str) -> None:
    seen = bytearray()
    async with network(kind) as net:
        receiver, sender = await net.node(), await net.node()
        [way], has_tls = split_address(receiver.address)
        async with wiretap(way, seen) as tapped:
            address = f"tls://{tapped}" if has_tls else tapped
            link = await sender.connector.connect(address, LINK_TOKEN, 24)
            reserved = receiver.reserve(1)
            await link.send_blocks("r.1", reserved.token, [Copy(3, reserved.block_ids[0], 1)])
            await link.close()
        secrets = [LINK_TOKEN.encode(), reserved.token.encode(), sender.block(3)]
    assert len(seen) > SMALL.block_bytes
    assert [secret in seen for secret in secrets] == [kind == "tcp"] * 3


async def test_renewed_certificates_count_for_new_connections(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    async with network("tls") as net:
        receiver, sender = await net.node(), await net.node()
        for node in (receiver, sender):
            show(node, tls_of(tmp_path))
        await assert_serves(receiver, sender, "check.1")
        before = (tmp_path / "node.pem").read_bytes()
        make_certificates(tmp_path)
        assert (tmp_path / "node.pem").read_bytes() != before
        await assert_serves(receiver, sender, "check.2")
        (tmp_path / "node.pem").write_text("half a file")
        with pytest.raises(ConnectorUnavailable):
            await sender.connector.connect(receiver.address, LINK_TOKEN, 24)
        make_certificates(tmp_path)
        await assert_serves(receiver, sender, "check.3")


async def test_an_expired_certificate_costs_the_next_connection_and_not_the_one_that_stands(
    tmp_path: Path,
) -> None:
    make_certificates(tmp_path)
    async with network("tls") as net:
        receiver, sender = await net.node(), await net.node()
        for node in (receiver, sender):
            show(node, tls_of(tmp_path))
        link = await sender.connector.connect(receiver.address, LINK_TOKEN, 24)
        make_certificates(tmp_path, days=0)
        reserved = receiver.reserve(1)
        await link.send_blocks("r.1", reserved.token, [Copy(3, reserved.block_ids[0], 1)])
        with pytest.raises(ConnectorUnavailable, match="certificate has expired"):
            await sender.connector.connect(receiver.address, LINK_TOKEN, 24)


async def test_a_connection_whose_keys_have_encrypted_enough_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tls, "MAX_BYTES_PER_CONNECTION", 2 * SMALL.block_bytes)
    async with network("tls") as net:
        receiver, sender = await net.node(), await net.node()
        link = await sender.connector.connect(receiver.address, LINK_TOKEN, 24)
        assert isinstance(link, StreamLink)
        connections = []
        for number in range(4):
            reserved = receiver.reserve(1, f"r{number}.1")
            await link.send_blocks(f"r{number}.1", reserved.token, [Copy(0, reserved.block_ids[0], 1)])
            connections.append(link._channel)
        assert connections[0] is connections[1] is not connections[2] is connections[3]


async def test_a_silent_stranger_is_hung_up_on_before_any_handshake() -> None:
    async with network("tls") as net:
        receiver, sender = await net.node(io_timeout_s=0.2), await net.node()
        [way], _ = split_address(receiver.address)
        with Channel(await dial_tcp(way), 5.0) as channel:
            await assert_hangs_up(channel)
        await assert_serves(receiver, sender)


@pytest.mark.parametrize("harm", ["no such file", "another's key", "no authority"])
def test_files_that_can_not_be_used_are_named_at_the_start(harm: str) -> None:
    folder = trial_certificates()
    good = trial_tls()
    good.check()
    bad = {
        "no such file": good._replace(cert=f"{folder}/nobody.pem"),
        "another's key": good._replace(key=f"{folder}/gateway.key"),
        "no authority": good._replace(ca=good.key),
    }[harm]
    with pytest.raises(CannotStart, match="FLOWKV_DATA_TLS_CERT"):
        bad.check()
