"""Listening and dialling on the two kinds of sockets that nodes talk over. Knows no frames."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
from pathlib import Path
from typing import NamedTuple

# A host that died without a word is found out after about a minute.
_KEEPALIVE = {socket.TCP_KEEPIDLE: 30, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 3}


class Place(NamedTuple):
    """Where a node's sockets are, and how its peers reach them."""

    host: str = "127.0.0.1"  # what TCP binds to, a name or an address
    port: int = 0  # 0: any free one
    reached_at: str = ""  # the name or address that peers dial; `host` if empty
    socket_dir: str | None = None  # holds the folders of Unix sockets; the system's temporary one if None


LOOPBACK = Place()


def bind_unix(place: Place, lifetime: contextlib.ExitStack) -> tuple[socket.socket, str]:
    """A socket bound in a folder that only this user can enter, which `lifetime` removes; and its path."""
    folder = lifetime.enter_context(tempfile.TemporaryDirectory(prefix="flowkv-", dir=place.socket_dir))
    address = str(Path(folder, "pool.sock"))
    return _bound(socket.AF_UNIX, address), address


async def dial_unix(address: str) -> socket.socket:
    """A non-blocking socket connected to a path. Raises `OSError`."""
    return await _connected(socket.AF_UNIX, address)


async def bind_tcp(place: Place) -> tuple[socket.socket, str]:
    """A bound socket, and the `host:port` that leads to it. Raises `OSError`."""
    family, address = await _resolve(place.host, place.port)
    listener = _bound(family, address)
    return listener, f"{place.reached_at or place.host}:{listener.getsockname()[1]}"


async def dial_tcp(address: str) -> socket.socket:
    """A non-blocking socket connected to `host:port`. Raises `OSError`."""
    host, _, port = address.rpartition(":")
    if not port.isascii() or not port.isdigit():
        raise OSError(f"{address!r} is not host:port")
    family, resolved = await _resolve(host, int(port))
    sock = await _connected(family, resolved)
    tune_tcp(sock)
    return sock


def tune_tcp(sock: socket.socket) -> None:
    """Frames leave at once, and a peer that vanished is noticed."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def has_hung_up(sock: socket.socket) -> bool:
    """Whether nothing but the end is left to read on a non-blocking socket."""
    try:
        return not sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _bound(family: int, address: str | tuple[object, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.bind(address)
    except BaseException:
        listener.close()
        raise
    return listener


async def _connected(family: int, address: str | tuple[object, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


async def _resolve(host: str, port: int) -> tuple[int, tuple[object, ...]]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, _, _, _, address = found[0]
    return family, address
