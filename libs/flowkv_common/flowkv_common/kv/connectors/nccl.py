"""KV blocks between GPUs of any hosts over NCCL, one communicator of two ranks per link.

A TCP connection carries the unique id, the transfers and the news that a peer has died. A communicator that
failed is aborted, and with its connection a new one is made, under a new id. The links of a device share its
multiprocessors with the engine: `NCCL_MAX_CTAS` bounds what each may take.
"""

from __future__ import annotations

import functools
import logging
import socket
from collections.abc import Callable
from types import TracebackType

from flowkv_common.errors import Stale
from flowkv_common.kv.alignment import Copy
from flowkv_common.kv.connector import Landing, Landings, Pool
from flowkv_common.kv.connectors import sockets
from flowkv_common.kv.connectors.communicator import (
    RECEIVER,
    SENDER,
    Communicator,
    NcclBackend,
    Span,
)
from flowkv_common.kv.connectors.frames import Channel, Frame, Hello, Reply
from flowkv_common.kv.connectors.sockets import LOOPBACK, Place
from flowkv_common.kv.connectors.stream import StreamConnector

logger = logging.getLogger(__name__)

# Making a communicator took 55 s on a host of eight B200, most of it to load kernels (NVIDIA/nccl#1646).
_JOIN_TIMEOUT_S = 120.0
# A link below a quarter of 1 Gbit/s counts as broken: so much longer than a step may a copy take.
_SLOWEST_BYTES_PER_S = 32 << 20


class Invitation(Frame, frozen=True, kw_only=True):
    """What the receiver is to join. Whoever knows the id could take its place: it is a secret of the link."""

    unique_id: bytes
    version: str


class NcclConnector(StreamConnector[Pool]):
    """`new_backend` makes one end of a communicator; the control connection listens at `place`."""

    name = "nccl"

    def __init__(
        self,
        pool: Pool,
        landings: Landings,
        admits: Callable[[str], bool],
        *,
        new_backend: Callable[[], NcclBackend],
        place: Place = LOOPBACK,
        io_timeout_s: float = 10.0,
        join_timeout_s: float = _JOIN_TIMEOUT_S,
    ) -> None:
        super().__init__(pool, landings, admits, place=place, io_timeout_s=io_timeout_s)
        self._new_backend = new_backend
        self._join_timeout_s = join_timeout_s
        self._sending: dict[Channel, Communicator] = {}
        self._communicators: set[Communicator] = set()

    @property
    def connect_timeout_s(self) -> float:
        return super().connect_timeout_s + self._join_timeout_s

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await super().__aexit__(kind, error, trace)
        finally:
            for communicator in self._communicators:
                communicator.abort()
                if not await communicator.ended(self._io_timeout_s):
                    logger.error("nccl: a communicator does not end; the pool's memory is not safe to free")

    async def _bind(self) -> tuple[socket.socket, str]:
        return await sockets.bind_tcp(self._place)

    async def _open_socket(self, address: str) -> socket.socket:
        return await sockets.dial_tcp(address)

    # --- sending -----------------------------------------------------------------------------------

    async def _introduce(self, channel: Channel) -> None:
        backend = self._new_backend()
        unique_id = backend.get_unique_id()
        await channel.send(Invitation(unique_id=unique_id, version=backend.version))
        await channel.expect_yes()
        communicator = self._started(backend, SENDER, channel)
        self._sending[channel] = communicator
        channel.lifetime.callback(self._sending.pop, channel)
        with channel.watching(functools.partial(_abort_if_gone, communicator, channel.sock)):
            await communicator.open(unique_id, self._join_timeout_s)
        await channel.expect_yes()

    async def _push(self, channel: Channel, copies: list[Copy]) -> int:
        await channel.expect_yes()  # asked first, so that a refusal costs no bytes
        communicator = self._sending[channel]
        with channel.watching(functools.partial(_abort_if_gone, communicator, channel.sock)):
            spans = self._spans([(copy.src, copy.length) for copy in copies])
            await communicator.exchange(spans, self._timeout_s(spans))
        return len(copies)

    # --- receiving ---------------------------------------------------------------------------------

    async def _receive_from(self, channel: Channel, hello: Hello) -> None:
        sockets.tune_tcp(channel.sock)
        invitation = await channel.receive(Invitation)
        backend = self._new_backend()
        if invitation.version != backend.version:
            reason = f"NCCL versions differ: receiver {backend.version}, sender {invitation.version}"
            await channel.send(Reply(error=reason))
            return
        await channel.send(Reply())
        communicator = self._started(backend, RECEIVER, channel)
        with channel.watching(communicator.abort):
            await communicator.open(invitation.unique_id, self._join_timeout_s)
        await channel.send(Reply())
        await self._answer(channel, hello, functools.partial(self._pull, channel, communicator))

    async def _pull(
        self, channel: Channel, communicator: Communicator, copies: list[Copy], landing: Landing
    ) -> int:
        """Posts the receives. They have ended, or the abort has returned, when this returns or raises."""
        if landing.revoked:
            raise Stale("the reservation has ended")
        await channel.send(Reply())
        spans = self._spans([(copy.dst, copy.length) for copy in copies])
        with channel.watching(communicator.abort):
            await communicator.exchange(spans, self._timeout_s(spans), lambda: landing.revoked)
        return 0

    # --- both --------------------------------------------------------------------------------------

    def _started(self, backend: NcclBackend, rank: int, channel: Channel) -> Communicator:
        communicator = Communicator(backend, rank)
        self._communicators = {other for other in self._communicators if other.is_alive}
        self._communicators.add(communicator)
        channel.lifetime.callback(communicator.abort)
        return communicator

    def _timeout_s(self, spans: list[Span]) -> float:
        return self._io_timeout_s + sum(span.num_bytes for span in spans) / _SLOWEST_BYTES_PER_S

    def _spans(self, runs: list[tuple[int, int]]) -> list[Span]:
        start, size = self._pool.tensor.data_ptr(), self._pool.layout.block_bytes
        return [Span(start + first * size, length * size) for first, length in runs]


def _abort_if_gone(communicator: Communicator, sock: socket.socket) -> None:
    """A reply that comes early is no reason to abort, the end of the connection is."""
    if sockets.peek(sock) == b"":
        communicator.abort()
