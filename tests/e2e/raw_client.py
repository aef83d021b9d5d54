"""Clients below HTTP libraries: bytes on a socket, right or wrong, read or not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

_SMALL_BUFFER_BYTES = 4096


@dataclass
class RawClient:
    """One connection to the gateway."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        """As much as the other side takes before it hangs up."""
        with contextlib.suppress(ConnectionError):
            self.writer.write(data)
            await self.writer.drain()

    async def response(self) -> tuple[int, dict[str, Any]]:
        """Status and JSON of a response with a declared length."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        status_line, *fields = head.splitlines()
        headers = dict(field.split(": ", 1) for field in fields if field)
        body = await self.reader.readexactly(int(headers["content-length"]))
        return int(status_line.split()[1]), json.loads(body)

    async def closed(self) -> None:
        """Returns once the other side has hung up; what it still sends is thrown away."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass


@contextlib.asynccontextmanager
async def connect(port: int, *, reads: bool = True) -> AsyncIterator[RawClient]:
    """A connection of its own; one that does not read has as little room for unread bytes as can be."""
    sock = socket.socket()
    if not reads:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER_BYTES)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=65536 if reads else 1)
    try:
        yield RawClient(reader, writer)
    finally:
        writer.transport.abort()


def post(path: str, body: dict[str, Any]) -> bytes:
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(payload)}\r\n\r\n"
    return head.encode() + payload
