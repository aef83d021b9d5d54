"""KV blocks over NIXL, NVIDIA's library: the receiver reads the sender's pool.

An end whose pool on a GPU can't be reached by NIXL stages it (`staging.py`). A sender tells of each piece
that lies in a buffer of host memory, where the receiver reads it. A receiver reads into buffers of its own.
The way without is tried first; what works shows while a link is made.

A read that has begun can't be taken back. So each is short, and none begins once its reservation is revoked.
One that does not end is ended with its agent, which is its connection's alone. The sender's blocks need no
lease: what was read out of blocks that it has lost is never committed (docs/architecture.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

import msgspec
import torch

from flowkv_engine.kv.reservations import Reservation
from flowkv_engine.kv.segments import Copy
from flowkv_engine.transport.nixl_memory import (
    Library,
    NixlFailed,
    PeerMemory,
    ShownAgent,
    ShownMemory,
    Source,
    find_library,
    show_nothing,
)
from flowkv_engine.transport.pull import pulling
from flowkv_engine.transport.staging import (
    BUFFER_BYTES,
    NUM_BUFFERS,
    StagingBuffers,
    StagingDevice,
    pieces,
    placed,
    start_of,
)
from flowkv_engine.transport.stream import (
    Channel,
    Frame,
    FrameError,
    Hello,
    Land,
    Push,
    Refused,
    Reply,
    StreamConnector,
    finish_thread,
    open_thread,
)

log = logging.getLogger(__name__)

# Of the direct way: so much may still be written after a reservation has ended, and is waited for.
_STEP_BYTES = 8 << 20
# A receiver that stages takes buffers as large as the sender's.
_MAX_BUFFER_BYTES = 64 << 20

T = TypeVar("T")


class ShownBuffers(Frame, frozen=True, kw_only=True):
    """Where the pieces of a sender that stages will be, in turn: buffers that lie one behind the other."""

    shown: ShownAgent
    num_buffers: Annotated[int, msgspec.Meta(ge=1)]
    buffer_bytes: Annotated[int, msgspec.Meta(ge=1, le=_MAX_BUFFER_BYTES)]


class Staged(Frame, frozen=True):
    """The next piece of the transfer is in its buffer. A `Reply` says that it has been read."""


@dataclass(eq=False)
class NixlConnector(StreamConnector):
    """`device`: where the pool lies, unless that is host memory, which is always reached directly."""

    name = "nixl"
    is_local = False

    library: Library = field(default_factory=find_library, kw_only=True)
    device: StagingDevice | None = field(default=None, kw_only=True)
    _own: ShownMemory | None = field(default=None, init=False)
    _opening: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)

    @property
    def connect_timeout_s(self) -> float:
        return super().connect_timeout_s + self.io_timeout_s  # a peer may be introduced twice

    async def __aexit__(self, *error: object) -> None:
        try:
            await super().__aexit__(*error)
        finally:
            if self._own is not None:
                await asyncio.to_thread(self._own.close)

    # --- sending -----------------------------------------------------------------------------------

    async def introduce(self, channel: Channel) -> Push | None:
        await channel.send_frame(await self._show_pool())
        try:
            await channel.expect_yes()
            return None
        except Refused as error:
            if self.device is None:
                raise
            refusal = error
        try:
            push = await self._offer_buffers(channel, self.device)
        except (OSError, Refused) as error:  # a receiver of the release before has hung up
            raise Refused(f"{refusal}; staged: {error}") from error
        log.info("nixl: KV to %s is staged here: %s", channel.way, refusal)
        return push

    async def _show_pool(self) -> ShownAgent:
        """Raises `NixlFailed` where it can't be registered, nor staged."""
        async with self._opening:
            try:
                if self._own is None:
                    self._own = await asyncio.to_thread(ShownMemory, self.library, self.pool.tensor)
            except NixlFailed:
                if self.device is None:
                    raise
                return show_nothing(self.library.version)
        return msgspec.structs.replace(self._own.shown, can_stage=self.device is not None)

    async def _offer_buffers(self, channel: Channel, device: StagingDevice) -> Push:
        """Raises `OSError`, `Refused`."""
        block_bytes = self.pool.layout.block_bytes
        thread = open_thread(channel, self.name)

        def open_buffers() -> tuple[StagingBuffers, ShownAgent]:
            with contextlib.ExitStack() as undo:
                buffers = undo.enter_context(StagingBuffers(device, self.pool.tensor))
                memory = ShownMemory(self.library, buffers.memory)
                undo.callback(memory.close)
                channel.lifetime.callback(thread.submit, undo.pop_all().close)
                return buffers, memory.shown

        def stage(number: int, piece: list[Copy]) -> None:
            try:
                buffers.gather(number, piece)
            finally:
                buffers.settle()

        async def push(copies: list[Copy]) -> int:
            await channel.expect_yes()  # asked first, so that a refusal costs no copies
            num_calls = num_unread = 0
            for number, piece in enumerate(pieces(copies, block_bytes, buffers.buffer_bytes)):
                if num_unread == NUM_BUFFERS:
                    await channel.expect_yes()
                    num_unread -= 1
                await _in_thread(thread, stage, number, piece)
                await channel.send_frame(Staged())
                num_unread += 1
                num_calls += len(piece)
            for _ in range(num_unread):
                await channel.expect_yes()
            return num_calls

        buffers, shown = await _in_thread(thread, open_buffers)
        await channel.send_frame(
            ShownBuffers(shown=shown, num_buffers=NUM_BUFFERS, buffer_bytes=buffers.buffer_bytes)
        )
        await channel.expect_yes()
        return push

    # --- receiving ---------------------------------------------------------------------------------

    async def welcome(self, channel: Channel, hello: Hello) -> Land:
        shown = await channel.receive_frame(ShownAgent)
        if shown.version != self.library.version:
            reason = f"NIXL versions differ: receiver {self.library.version}, sender {shown.version}"
            await channel.send_frame(Reply(error=reason))
            raise FrameError(reason)
        block_bytes = self.pool.layout.block_bytes
        thread = open_thread(channel, self.name)
        theirs = None
        try:
            # A pair has pools of one kind of memory.
            pool = Source(shown, hello.num_blocks * block_bytes, self.pool.tensor.is_cuda)
            peer, own = await self._open(channel, thread, pool, BUFFER_BYTES)
        except OSError:
            if not shown.can_stage:
                raise
            theirs = await channel.receive_frame(ShownBuffers)
            buffers = Source(theirs.shown, theirs.num_buffers * theirs.buffer_bytes, is_on_gpu=False)
            peer, own = await self._open(channel, thread, buffers, theirs.buffer_bytes)
        await channel.send_frame(Reply())
        if theirs is None and own is None:
            return pulling(channel, thread, peer, block_bytes, _STEP_BYTES)
        return _landing_pieces(channel, thread, peer, theirs, own, block_bytes)

    async def _open(
        self, channel: Channel, thread: ThreadPoolExecutor, source: Source, buffer_bytes: int
    ) -> tuple[PeerMemory, StagingBuffers | None]:
        """What the peer shows, to be read into the pool, or else into buffers of `buffer_bytes` each.

        Both end in the thread, with the channel. Raises `OSError`, of which the peer has been told.
        """
        ends_at = time.monotonic() + 0.8 * self.io_timeout_s  # the sender waits for both tries at once

        def open_into(target: torch.Tensor, lifetime: contextlib.ExitStack, share: float) -> PeerMemory:
            timeout_s = share * (ends_at - time.monotonic())
            memory = PeerMemory(self.library, source, target, self.io_timeout_s, timeout_s)
            lifetime.callback(memory.close)
            return memory

        def open_in_thread() -> tuple[PeerMemory, StagingBuffers | None]:
            if not source.shown.metadata:
                raise NixlFailed("NIXL can't register the sender's pool")
            try:
                return open_into(self.pool.tensor, lifetime, 1.0 if self.device is None else 0.5), None
            except NixlFailed as error:
                if self.device is None:
                    raise
                reason = str(error)
            with contextlib.ExitStack() as undo:
                buffers = undo.enter_context(StagingBuffers(self.device, self.pool.tensor, buffer_bytes))
                try:
                    memory = open_into(buffers.memory, undo, 1.0)
                except NixlFailed as error:
                    raise NixlFailed(f"{reason}; staged: {error}") from error
                lifetime.enter_context(undo.pop_all())
            log.info("nixl: KV of a peer is staged here: %s", reason)
            return memory, buffers

        lifetime = contextlib.ExitStack()
        channel.lifetime.callback(thread.submit, lifetime.close)
        try:
            return await _in_thread(thread, open_in_thread)
        except OSError as error:
            await channel.send_frame(Reply(error=str(error)))
            raise


def _landing_pieces(
    channel: Channel,
    thread: ThreadPoolExecutor,
    peer: PeerMemory,
    theirs: ShownBuffers | None,
    own: StagingBuffers | None,
    block_bytes: int,
) -> Land:
    """What lands pieces out of the buffers of a sender that stages, or by way of our own, or both."""
    buffer_bytes = theirs.buffer_bytes if theirs is not None else BUFFER_BYTES

    def land_piece(number: int, piece: list[Copy], reservation: Reservation) -> int:
        """In the thread: reads a piece and returns the calls made. Out of `own` it may be on its way yet."""

        def check() -> None:
            if reservation.revoked:
                raise ConnectionAbortedError("the reservation ended during the copy")

        sources, targets = [copy.src for copy in piece], [copy.dst for copy in piece]
        if theirs is not None:
            start = start_of(number, theirs.num_buffers, buffer_bytes)
            sources = [at for _, at in placed(piece, start)]
        if own is None:
            check()
        else:
            targets = [at for _, at in placed(piece, own.start_of(number))]
        try:
            for source, target, copy in zip(sources, targets, piece, strict=True):
                peer.copy(source, target, copy.length)
        finally:
            peer.settle()
        if own is None:
            return len(piece)
        own.settle()  # the piece before was on its way into the pool meanwhile
        check()
        own.scatter(number, piece)
        return 2 * len(piece)

    async def land(copies: list[Copy], reservation: Reservation) -> int:
        """Nothing touches the pool any more when this returns or raises. A revocation ends the connection."""
        if theirs is not None:
            await channel.send_frame(Reply())
        num_calls = 0
        try:
            for number, piece in enumerate(pieces(copies, block_bytes, buffer_bytes)):
                if theirs is not None:
                    await channel.receive_frame(Staged)
                elif channel.has_ended():
                    raise ConnectionAbortedError("the sender hung up during the copy")
                num_calls += await _in_thread(thread, land_piece, number, piece, reservation)
                if theirs is not None:
                    await channel.send_frame(Reply())
        finally:
            if own is not None:
                await _in_thread(thread, own.settle)
        return num_calls

    return land


async def _in_thread(thread: ThreadPoolExecutor, work: Callable[..., T], *args: object) -> T:
    """A cancel waits until the thread has left `work`: it never takes long."""
    working = asyncio.get_running_loop().run_in_executor(thread, work, *args)
    return await finish_thread(working, lambda: None)
