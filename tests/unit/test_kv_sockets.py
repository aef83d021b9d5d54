"""Where nodes listen is one thing, how peers reach them another."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path
from typing import Any

import pytest

from flowkv.local_cluster import free_port
from flowkv_engine.transport.sockets import (
    LOOPBACK,
    Place,
    dial_tcp,
    join_host_port,
    listen_tcp,
    listen_unix,
    split_address,
    split_host_port,
)


def resolve(monkeypatch: pytest.MonkeyPatch, name: str, *addresses: str) -> None:
    """Gives `name` these IPv4 addresses, in this order."""
    loop = asyncio.get_running_loop()
    real = loop.getaddrinfo

    async def getaddrinfo(host: str, port: int, **options: Any) -> list[Any]:
        if host != name:
            return await real(host, port, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)


@contextlib.contextmanager
def deaf(address: str, port: int) -> Any:
    """Nothing that connects there is ever answered: the queue of its connections is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind((address, port))
        listener.listen(0)
        for _ in range(8):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex((address, port))
        yield


async def test_a_name_is_dialled_at_each_of_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    listener, address = await listen_tcp(Place(host="127.0.0.1"))
    with listener:
        resolve(monkeypatch, "node-b", "127.0.0.2", "127.0.0.3", "127.0.0.1")
        with await dial_tcp(address.replace("127.0.0.1", "node-b")) as sock:
            assert sock.getpeername() == listener.getsockname()
            assert sock.getblocking() is False
            accepted, _ = listener.accept()
            with accepted:
                accepted.send(b"x")
                async with asyncio.timeout(5):
                    assert await asyncio.get_running_loop().sock_recv(sock, 9) == b"x"
        resolve(monkeypatch, "node-c", "127.0.0.2", "127.0.0.3")
        with pytest.raises(OSError, match="Connect call failed"):
            await dial_tcp(address.replace("127.0.0.1", "node-c"))


async def test_an_address_that_does_not_answer_does_not_hold_the_next_one_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listener, address = await listen_tcp(Place(host="127.0.0.1"))
    with listener, deaf("127.0.0.2", listener.getsockname()[1]):
        resolve(monkeypatch, "node-b", "127.0.0.2", "127.0.0.1")
        async with asyncio.timeout(5):
            (await dial_tcp(address.replace("127.0.0.1", "node-b"))).close()


async def test_a_dial_that_is_cancelled_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    with deaf("127.0.0.2", port):
        resolve(monkeypatch, "node-b", "127.0.0.2", "127.0.0.2")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.4):  # amid the second try
                await dial_tcp(f"node-b:{port}")


async def test_of_a_name_that_address_is_bound_which_this_host_has(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(monkeypatch, "node-b", "192.0.2.1", "127.0.0.1")
    listener, address = await listen_tcp(Place(host="node-b"))
    with listener:
        assert listener.getsockname()[0] == "127.0.0.1"
        assert address == f"node-b:{listener.getsockname()[1]}"
        resolve(monkeypatch, "node-c", "127.0.0.1", "127.0.0.2")
        with pytest.raises(OSError, match="in use"):  # and not somewhere else without a word
            await listen_tcp(Place(host="node-c", ports=[listener.getsockname()[1]]))


@pytest.mark.parametrize(
    ("host", "port", "address"),
    [("10.0.0.1", 1, "10.0.0.1:1"), ("::1", 65535, "[::1]:65535"), ("node-b", 9201, "node-b:9201")],
)
def test_an_ipv6_address_stands_in_brackets(host: str, port: int, address: str) -> None:
    assert join_host_port(host, port) == address
    assert split_host_port(address) == (host, port)


@pytest.mark.parametrize(
    "address", ["", "nowhere", "::1", "[::1]", "a:b", "a:", "a:70000", "a:\N{DIGIT ONE}x", "a:" + 5000 * "9"]
)
async def test_what_is_no_host_and_port_is_refused_in_words(address: str) -> None:
    with pytest.raises(OSError, match="is not host:port"):
        await dial_tcp(address)


@pytest.mark.parametrize("host", ["decode..internal", 64 * "a" + ".internal", "a\0b"])
async def test_a_name_that_no_host_can_have_is_refused_in_words(host: str) -> None:
    with pytest.raises(OSError, match="is no name of a host"):
        await dial_tcp(f"{host}:9201")


async def test_a_port_can_be_bound_again_right_after_its_connections_have_ended() -> None:
    """As of a node that was killed: its end closes first, and waits in the kernel for a minute."""
    listener, address = await listen_tcp(LOOPBACK)
    with listener:
        with await dial_tcp(address):
            listener.accept()[0].close()
    again, _ = await listen_tcp(Place(ports=[split_host_port(address)[1]]))
    again.close()


async def test_the_port_that_peers_dial_may_be_another_than_the_bound_one() -> None:
    listener, address = await listen_tcp(Place(host="127.0.0.1", reached_at=["gate"], reached_on=9201))
    with listener:
        assert address == "gate:9201"


async def test_of_a_range_each_listener_takes_the_first_free_port() -> None:
    async def listen(ports: range) -> int:
        listener, address = await listen_tcp(Place(ports=ports))
        listeners.enter_context(listener)
        return split_host_port(address)[1]

    with contextlib.ExitStack() as listeners:
        first = await listen(range(0, 1))
        ports = range(first, first + 40)  # some of them may be others'
        taken = [first] + [await listen(ports) for _ in range(3)]
        assert sorted(set(taken)) == taken
        assert taken[-1] in ports
        with pytest.raises(OSError, match=f"port {first} of 127.0.0.1 in use: .*name a range, as 9201-9299"):
            await listen(range(first, first + 1))


async def test_a_node_with_several_names_tells_all_of_them_in_order() -> None:
    place = Place(reached_at=["10.0.0.1", "fd00::1", "node-b"], reached_on=9201)
    listener, address = await listen_tcp(place)
    with listener:
        assert address == "10.0.0.1:9201,[fd00::1]:9201,node-b:9201"
        assert split_address(address) == (["10.0.0.1:9201", "[fd00::1]:9201", "node-b:9201"], False)


async def test_a_wildcard_is_bound_and_a_name_is_told() -> None:
    port = free_port()
    listener, address = await listen_tcp(Place(host="0.0.0.0", ports=[port], reached_at=["node-7"]))
    with listener:
        assert address == f"node-7:{port}"
        assert listener.getsockname() == ("0.0.0.0", port)


def test_unix_sockets_lie_in_the_shared_folder_and_only_their_user_may_enter(tmp_path: Path) -> None:
    with contextlib.ExitStack() as lifetime:
        listener, address = listen_unix(Place(socket_dir=str(tmp_path)), lifetime)
        with listener:
            folder = Path(address).parent
            assert folder.parent == tmp_path
            assert folder.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == []
