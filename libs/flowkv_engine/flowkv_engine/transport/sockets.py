"""Listening and dialling on the two kinds of sockets that nodes talk over: TCP, and Unix within a host."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import select
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from flowkv_engine.transport.tls import Tls

# A host that died without a word is noticed after about a minute.
_KEEPALIVE = {socket.TCP_KEEPIDLE: 30, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 3}
_BACKLOG = 128
_TLS_SCHEME = "tls://"
# If an address of a name has not answered for so long, the next one is tried beside it (RFC 8305).
_NEXT_ADDRESS_S = 0.25
# A Unix socket with a full queue refuses at once instead of letting wait.
_FULL_QUEUE_S = 0.01


class Place(NamedTuple):
    """Where a node's sockets are, and how its peers reach them."""

    host: str = "127.0.0.1"  # what TCP binds to, a name or an address
    ports: Sequence[int] = (0,)  # the first of them that is free; 0: any free one
    reached_at: Sequence[str] = ()  # names or addresses that peers dial, in this order; `host` if none
    reached_on: int = 0  # the port that peers dial; the bound one if 0
    socket_dir: str | None = None  # holds the folders of Unix sockets; the system's temporary one if None
    tls: Tls | None = None  # for TCP


LOOPBACK = Place()


def listen_unix(
    place: Place, lifetime: contextlib.ExitStack | contextlib.AsyncExitStack
) -> tuple[socket.socket, str]:
    """A socket that listens in a folder that only this user can enter, which `lifetime` removes; its path."""
    folder = lifetime.enter_context(tempfile.TemporaryDirectory(prefix="flowkv-", dir=place.socket_dir))
    address = str(Path(folder, "pool.sock"))
    return _listen(socket.AF_UNIX, address), address


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


async def listen_tcp(place: Place) -> tuple[socket.socket, str]:
    """A socket that listens, and the address that leads to it. Raises `OSError`.

    Of a name's addresses it is the first that this host has: a name may have one of IPv6 where there is none.
    """
    in_use = None
    for port in place.ports:
        try:
            listener = await _listen_on(place.host, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            in_use = error
        else:
            return listener, join_address(place, listener.getsockname()[1])
    names = f"port {place.ports[0]}" if len(place.ports) == 1 else f"ports {place.ports[0]}-{place.ports[-1]}"
    advice = "each node of a host needs one for each connector over TCP: name a range, as 9201-9299"
    raise OSError(errno.EADDRINUSE, f"{names} of {place.host} in use: {advice}") from in_use


async def _listen_on(host: str, port: int) -> socket.socket:
    failed = OSError(f"{host} has no address")
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for family, _, _, _, address in found:
        try:
            return _listen(family, address)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
            failed = error
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


def join_address(place: Place, port: int) -> str:
    """What a peer is told: `host:port` of each way here, with commas between, after `tls://` if it is TLS."""
    hosts = place.reached_at or [place.host]
    ways = ",".join(join_host_port(host, place.reached_on or port) for host in hosts)
    return f"{_TLS_SCHEME}{ways}" if place.tls else ways


def split_address(address: str) -> tuple[list[str], bool]:
    """`host:port` of each way to a peer, and whether it wants TLS: what `join_address` has joined."""
    return address.removeprefix(_TLS_SCHEME).split(","), address.startswith(_TLS_SCHEME)


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


def _listen(family: int, address: str | tuple[object, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family != socket.AF_UNIX:
            # The kernel keeps a port for a minute after its connections have ended, also from a restart.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)  # the kernel lets two bind one port, but not listen on it
    except BaseException:
        listener.close()
        raise
    return listener
