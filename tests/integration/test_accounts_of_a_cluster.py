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
from tests.nats_server import NatsServer, log_in

NAMES = ("nats", "nats-2", "nats-3")
ADDRESS = ",".join(f"{name}:4222" for name in NAMES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_accounts(tmp_path, ADDRESS)
    return tmp_path


def read_config(folder: Path) -> dict[str, dict[str, object]]:
    config: dict[str, dict[str, object]] = json.loads((folder / "nats" / "nats.conf").read_text())
    return config


class ThreeServers:
    """What is changed of their configuration is where they are: they have one host."""

    def __init__(self, folder: Path, opened: contextlib.ExitStack) -> None:
        self._folder = folder
        self._ports = {name: free_port() for name in NAMES}
        self._write_configs()
        self.by_port = {  # of their routes
            port: opened.enter_context(NatsServer("-c", str(self._file_of(name)), "-m", "-1"))
            for name, port in self._ports.items()
        }

    def reload(self) -> None:
        self._write_configs()
        for server in self.by_port.values():
            server.reload()

    def url(self, server: NatsServer) -> str:
        """The operator's."""
        password = (self._folder / "operator" / "nats_url").read_text().split("@")[0]
        return server.url.replace("nats://", f"{password}@")

    def _file_of(self, name: str) -> Path:
        return self._folder / name / f"server-{name}.conf"

    def _write_configs(self) -> None:
        config = read_config(self._folder)
        routes = str(config["cluster"]["routes"])
        for name, port in self._ports.items():
            routes = routes.replace(f"{name}:6222", f"127.0.0.1:{port}")
        config["cluster"]["routes"] = json.loads(routes.replace("'", '"'))
        for name, port in self._ports.items():
            file = self._file_of(name)
            file.parent.mkdir(exist_ok=True)
            config["cluster"] |= {"host": "127.0.0.1", "port": port}
            file.with_name("nats.conf").write_text(json.dumps(config))
            file.write_text((self._folder / "nats" / file.name).read_text())


@pytest.fixture
def servers(folder: Path) -> Iterator[ThreeServers]:
    with contextlib.ExitStack() as opened:
        yield ThreeServers(folder, opened)


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


async def test_they_keep_what_each_is_told_and_let_no_stranger_in(servers: ThreeServers) -> None:
    first, *others = servers.by_port.values()
    client = await nats.connect(servers.url(first), allow_reconnect=False)
    await make_stream(client.jetstream(timeout=1))
    await client.close()
    for other in others:
        seen = await nats.connect(servers.url(other), allow_reconnect=False)
        assert (await seen.jetstream().stream_info("kept")).config.num_replicas == 3
        await seen.close()
    for port in servers.by_port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b'CONNECT {"user":"server","pass":"guess","name":"stranger"}\r\nPING\r\n')
        said: list[bytes] = []
        async with asyncio.timeout(5):
            while line := await reader.readline():
                said.append(line)
        assert any(b"Authorization Violation" in line for line in said), said
        writer.close()


async def test_each_of_them_takes_new_passwords_while_it_runs(folder: Path, servers: ThreeServers) -> None:
    """A name of the command line is forgotten then, and without one a server refuses its configuration."""
    former = [servers.url(server) for server in servers.by_port.values()]
    write_accounts(folder, ADDRESS, is_rotation=True)
    servers.reload()
    newest = [servers.url(server) for server in servers.by_port.values()]
    for url in former + newest:
        await log_in(url)
    write_accounts(folder, ADDRESS)
    servers.reload()
    for url in newest:
        await log_in(url)
    for url in former:
        with pytest.raises(nats.errors.Error, match="Authorization"):
            await log_in(url)
