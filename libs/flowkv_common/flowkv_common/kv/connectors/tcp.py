"""KV blocks over TCP, between any two hosts: out of one pool's memory, straight into the other's."""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import Callable, Iterator

from flowkv_common.kv.alignment import Copy
from flowkv_common.kv.connector import Landing, Landings
from flowkv_common.kv.connectors.frames import Channel, Hello, Reply
from flowkv_common.kv.connectors.stream import StreamConnector
from flowkv_common.kv.pool import KVPool
from flowkv_common.wire.messages import Run

# Larger system calls are slower: the bytes have left the CPU's cache before the receiver gets to them.
_STEP_BYTES = 1 << 20
# A host that died without a word is found out after about a minute.
_KEEPALIVE = {socket.TCP_KEEPIDLE: 30, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 3}


class TcpConnector(StreamConnector):
    """Listens on `host`, a name or an address under which the peers reach this node."""

    name = "tcp"

    def __init__(
        self,
        pool: KVPool,
        landings: Landings,
        admits: Callable[[str], bool],
        *,
        host: str = "127.0.0.1",
        io_timeout_s: float = 10.0,
    ) -> None:
        super().__init__(pool, landings, admits, io_timeout_s=io_timeout_s)
        self._host = host

    async def _bind(self) -> tuple[socket.socket, str]:
        family, address = await _resolve(self._host, 0)
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
        return listener, f"{self._host}:{listener.getsockname()[1]}"

    async def _open_socket(self, address: str) -> socket.socket:
        host, _, port = address.rpartition(":")
        if not port.isascii() or not port.isdigit():
            raise OSError(f"{address!r} is not host:port")
        family, resolved = await _resolve(host, int(port))
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, resolved)
            _tune(sock)
        except BaseException:
            sock.close()
            raise
        return sock

    async def _introduce(self, channel: Channel) -> None:
        """Nothing to say: the greeting was all."""

    async def _push(self, channel: Channel, copies: list[Copy]) -> int:
        await channel.expect_yes()  # asked first, so that a refusal costs no bytes
        num_calls = 0
        for copy in copies:
            for step in _steps(self._pool.bytes_of(Run(copy.src, copy.length))):
                await channel.write(step)
                num_calls += 1
        return num_calls

    async def _receive_from(self, channel: Channel, hello: Hello) -> None:
        _tune(channel.sock)
        await self._answer(channel, hello, functools.partial(self._pull, channel))

    async def _pull(self, channel: Channel, copies: list[Copy], landing: Landing) -> int:
        """Reads the bytes into the pool. A revoked landing ends the connection: its bytes are on the way."""

        def keep_going() -> None:
            if landing.revoked:
                raise ConnectionAbortedError("the reservation ended during the copy")

        await channel.send(Reply())
        for copy in copies:
            for step in _steps(self._pool.bytes_of(Run(copy.dst, copy.length))):
                await channel.fill(step, keep_going)
        return 0


def _steps(view: memoryview) -> Iterator[memoryview]:
    for begin in range(0, len(view), _STEP_BYTES):
        yield view[begin : begin + _STEP_BYTES]


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


async def _resolve(host: str, port: int) -> tuple[int, tuple[object, ...]]:
    """Address family and socket address of `host`. Raises `OSError`."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, _, _, _, address = found[0]
    return family, address
