"""Three servers with the configuration of `flowkv.accounts`: one cluster, which no stranger can join."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import nats
import nats.errors
import pytest
from nats.js import JetStreamContext
from nats.js.api import StreamConfig

from flowkv.accounts import RIGHTS, write_accounts
from flowkv.local_cluster import free_port
from tests.nats_server import NatsServer

NAMES = ("nats", "nats-2", "nats-3")
ADDRESS = ",".join(f"{name}:4222" for name in NAMES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_accounts(tmp_path, ADDRESS)
    return tmp_path


def read_config(folder: Path) -> dict[str, dict[str, object]]:
    config: dict[str, dict[str, object]] = json.loads((folder / "nats" / "nats.conf").read_text())
    return config


@contextlib.contextmanager
def three_servers(folder: Path) -> Iterator[dict[int, NatsServer]]:
    """By the ports of their routes. What is changed is where they are: they have one host and no names."""
    ports = {f"{name}:6222": free_port() for name in NAMES}
    config = read_config(folder)
    routes = str(config["cluster"]["routes"])
    for address, port in ports.items():
        routes = routes.replace(address, f"127.0.0.1:{port}")
    config["cluster"]["routes"] = json.loads(routes.replace("'", '"'))
    with contextlib.ExitStack() as opened:
        servers = {}
        for name, port in zip(NAMES, ports.values(), strict=True):
            config["cluster"] |= {"host": "127.0.0.1", "port": port}
            file = folder / f"{name}.conf"
            file.write_text(json.dumps(config))
            server = NatsServer("-c", str(file), "--name", name, "-m", "-1")
            servers[port] = opened.enter_context(server)
        yield servers


def test_passwords_are_kept(folder: Path) -> None:
    before = (folder / "nats" / "nats.conf").read_text()
    write_accounts(folder, ADDRESS)
    assert (folder / "nats" / "nats.conf").read_text() == before
    for user in RIGHTS:
        urls = (folder / user / "nats_url").read_text().strip().split(",")
        assert [url.rpartition("@")[2] for url in urls] == ADDRESS.split(",")


def test_one_server_has_no_cluster(tmp_path: Path) -> None:
    write_accounts(tmp_path, "nats:4222")
    assert "cluster" not in read_config(tmp_path)


async def make_stream(jetstream: JetStreamContext) -> None:
    """A copy on each server; they answer when they have found a leader."""
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(nats.errors.Error):
                await jetstream.add_stream(StreamConfig(name="kept", subjects=["kept"], num_replicas=3))
                return
            await asyncio.sleep(0.05)


async def test_they_keep_what_each_is_told_and_let_no_stranger_in(folder: Path) -> None:
    password = (folder / "operator" / "nats_url").read_text().split("@")[0].rpartition(":")[2]
    with three_servers(folder) as servers:
        first, *others = servers.values()
        client = await nats.connect(
            first.url.replace("nats://", f"nats://operator:{password}@"), allow_reconnect=False
        )
        await make_stream(client.jetstream(timeout=1))
        await client.close()
        for other in others:
            url = other.url.replace("nats://", f"nats://operator:{password}@")
            seen = await nats.connect(url, allow_reconnect=False)
            assert (await seen.jetstream().stream_info("kept")).config.num_replicas == 3
            await seen.close()
        for port in servers:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b'CONNECT {"user":"server","pass":"guess","name":"stranger"}\r\nPING\r\n')
            said: list[bytes] = []
            async with asyncio.timeout(5):
                while line := await reader.readline():
                    said.append(line)
            assert any(b"Authorization Violation" in line for line in said), said
            writer.close()
