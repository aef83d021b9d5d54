"""Listening and dialling on the two kinds of sockets that nodes talk over: TCP, and Unix within a host."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import select
import socket
import tempfile
from pathlib import Path
from typing import NamedTuple

# A host that died without a word is noticed after about a minute.
_KEEPALIVE = {socket.TCP_KEEPIDLE: 30, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 3}
# If an address of a name has not answered for so long, the next one is tried beside it (RFC 8305).
_NEXT_ADDRESS_S = 0.25
# A Unix socket with a full queue refuses at once instead of letting wait.
_FULL_QUEUE_S = 0.01


class Place(NamedTuple):
    """Where a node's sockets are, and how its peers reach them."""

    host: str = "127.0.0.1"  # what TCP binds to, a name or an address
    port: int = 0  # 0: any free one
    reached_at: str = ""  # the name or address that peers dial; `host` if empty
    reached_on: int = 0  # the port that peers dial; the bound one if 0
    socket_dir: str | None = None  # holds the folders of Unix sockets; the system's temporary one if None


LOOPBACK = Place()


def bind_unix(
    place: Place, lifetime: contextlib.ExitStack | contextlib.AsyncExitStack
) -> tuple[socket.socket, str]:
    """A socket bound in a folder that only this user can enter, which `lifetime` removes; and its path."""
    folder = lifetime.enter_context(tempfile.TemporaryDirectory(prefix="flowkv-", dir=place.socket_dir))
    address = str(Path(folder, "pool.sock"))
    return _bind(socket.AF_UNIX, address), address


async def dial_unix(address: str) -> socket.socket:
    """A non-blocking socket connected to a path. Raises `OSError`."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        while True:
            try:
                sock.connect(address)
            except BlockingIOError:  # asyncio would take the socket for connected
                await asyncio.sleep(_FULL_QUEUE_S)
            else:
                return sock
    except BaseException:
        sock.close()
        raise


async def bind_tcp(place: Place) -> tuple[socket.socket, str]:
    """A bound socket, and the `host:port` that leads to it. Raises `OSError`.

    Of a name's addresses it is the first that this host has: a name may have one of IPv6 where there is none.
    """
    found = await asyncio.get_running_loop().getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
    failed = OSError(f"{place.host} has no address")
    for family, _, _, _, address in found:
        try:
            listener = _bind(family, address)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
            failed = error
            continue
        port = place.reached_on or listener.getsockname()[1]
        return listener, join_host_port(place.reached_at or place.host, port)
    raise failed


async def dial_tcp(address: str) -> socket.socket:
    """A non-blocking socket connected to `host:port`, by whichever of the host's addresses answers first.

    Raises `OSError`.
    """
    host, port = split_host_port(address)
    try:
        transport, _ = await asyncio.get_running_loop().create_connection(
            _Unread, host, port, happy_eyeballs_delay=_NEXT_ADDRESS_S
        )
    except ValueError as error:  # of a name with an empty label, one over 63 characters, or a NUL
        raise OSError(f"{host!r} is no name of a host: {error}") from error
    try:
        sock: socket.socket = transport.get_extra_info("socket").dup()
    finally:
        transport.abort()  # closes its own descriptor alone
    try:
        sock.setblocking(False)
        tune_tcp(sock)
    except BaseException:
        sock.close()
        raise
    return sock


class _Unread(asyncio.Protocol):
    """Leaves what the peer says to whatever takes the socket over."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.ReadTransport)
        transport.pause_reading()


def join_host_port(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_host_port(address: str) -> tuple[str, int]:
    """What `join_host_port` has joined. Raises `OSError` for anything else."""
    host, _, port = address.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    is_number = port.isascii() and port.isdigit() and len(port) <= 5
    if not is_number or int(port) > 65535 or (":" in host and not is_bracketed):
        raise OSError(f"{address[:300]!r} is not host:port")
    return host[1:-1] if is_bracketed else host, int(port)


def tune_tcp(sock: socket.socket) -> None:
    """Frames leave at once, and a peer that vanished is noticed."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def is_readable(sock: socket.socket) -> bool:
    """Whether something waits to be read or, at a listener, to be accepted."""
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(0))


def _bind(family: int, address: str | tuple[object, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family != socket.AF_UNIX:
            # The kernel keeps a port for a minute after its connections have ended, also from a restart.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except BaseException:
        listener.close()
        raise
    return listener
