"""TLS 1.3 between nodes: both ends show a certificate for the name `node`, of the authority they trust.

A node is known by that name and not by its address: nodes come and go, and share one certificate or have one
each. OpenSSL encrypts in this process; Python hands no pool to the kernel's own TLS.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from flowkv_common.errors import CannotStart

if TYPE_CHECKING:
    import socket

NODE_NAME = "node"
# One key of AES-GCM may encrypt a little more: 2**24.5 records of 16 KiB (RFC 8446, 5.5). OpenSSL changes no
# key unasked, and Python can't ask; a new connection has new ones.
MAX_BYTES_PER_CONNECTION = 256 << 30

T = TypeVar("T")


class Tls(NamedTuple):
    """The PEM files of a node. They are read for each connection, so a renewal needs no restart."""

    cert: str
    key: str
    ca: str

    def context(self, *, is_server: bool) -> ssl.SSLContext:
        """Raises OSError or ValueError if the files can't be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(self.ca)
        context.load_cert_chain(self.cert, self.key, password="")  # or it would ask for one at the terminal
        if is_server:
            context.num_tickets = 0  # a sender takes unasked bytes for a broken connection
        return context

    def check(self) -> None:
        """Raises CannotStart if the files can't be used."""
        try:
            self.context(is_server=True)
        except (OSError, ValueError) as error:
            files = f"FLOWKV_DATA_TLS_CERT {self.cert}, _KEY {self.key}, _CA {self.ca}"
            raise CannotStart(f"{files}: {error}") from None


async def shake_hands(sock: socket.socket, tls: Tls, *, is_server: bool) -> ssl.SSLSocket:
    """TLS on a connected non-blocking socket, which it takes over.

    A dialling end has checked the other's certificate then; a listening end asks `why_not_a_node`. Raises
    OSError, `ssl.SSLError` included.
    """
    context = tls.context(is_server=is_server)
    encrypted = context.wrap_socket(
        sock,
        server_side=is_server,
        server_hostname=None if is_server else NODE_NAME,
        do_handshake_on_connect=False,
    )
    try:
        await _when_ready(encrypted, encrypted.do_handshake)
    except BaseException:
        encrypted.close()
        raise
    return encrypted


def why_not_a_node(sock: ssl.SSLSocket) -> str | None:
    """What is wrong with the certificate of a dialling end that the authority has signed."""
    shown: dict[str, Any] = sock.getpeercert() or {}
    names = [name for kind, name in shown.get("subjectAltName", ()) if kind == "DNS"]
    if NODE_NAME in names:
        return None
    return f"a certificate for {', '.join(names) or 'nobody'}, not for {NODE_NAME!r}"


async def send_all(sock: ssl.SSLSocket, view: memoryview) -> None:
    while view:
        view = view[await _when_ready(sock, partial(sock.send, view)) :]


async def receive(sock: ssl.SSLSocket, num_bytes: int) -> bytes:
    """At most so many; none at the end."""
    return await _when_ready(sock, partial(sock.recv, num_bytes))


async def _when_ready(sock: ssl.SSLSocket, operation: Callable[[], T]) -> T:
    """The result of a non-blocking operation, tried again whenever the network is ready for more of it."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            return operation()
        except ssl.SSLWantReadError:
            add, remove = loop.add_reader, loop.remove_reader
        except ssl.SSLWantWriteError:
            add, remove = loop.add_writer, loop.remove_writer
        is_ready = asyncio.Event()
        add(sock, is_ready.set)
        try:
            await is_ready.wait()
        finally:
            remove(sock)
