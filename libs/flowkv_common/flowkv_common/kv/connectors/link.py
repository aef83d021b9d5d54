"""The sending end over a stream socket: keeps a connection while it is good, dials anew when it is not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

from flowkv_common.errors import TransferFailed
from flowkv_common.kv.alignment import Copy
from flowkv_common.kv.connector import ConnectorUnavailable, Pool, TransferStats, find_stray
from flowkv_common.kv.connectors.frames import Channel, Refused, Transfer

# What one frame asks for: little enough that its confirmation comes well within the deadline of a step,
# much enough that most requests need one.
_MAX_FRAME_PAYLOAD_BYTES = 1 << 30
_MAX_FRAME_BLOCKS = 8192


class StreamLink:
    """A `KVLink`. `dial` gives a greeted connection, `push` moves the copies of one frame."""

    def __init__(
        self,
        name: str,
        pool: Pool,
        num_peer_blocks: int,
        dial: Callable[[], Awaitable[Channel]],
        push: Callable[[Channel, list[Copy]], Awaitable[int]],
    ) -> None:
        self.name = name
        self._pool = pool
        self._num_peer_blocks = num_peer_blocks
        self._dial = dial
        self._push = push
        self._turn = asyncio.Lock()
        self._channel: Channel | None = None
        self._is_closed = False
        self._is_lost = False

    @property
    def closed(self) -> bool:
        return self._is_closed

    @property
    def is_lost(self) -> bool:
        return self._is_lost

    async def open(self) -> None:
        """Dials now, as a probe. Raises `ConnectorUnavailable`."""
        self._channel = await self._dial()

    async def send(self, transfer_id: str, token: str, copies: Sequence[Copy]) -> TransferStats:
        """See `KVLink.send`."""
        stray = find_stray(copies, self._pool.num_blocks, self._num_peer_blocks)
        if stray is not None:
            raise TransferFailed(f"{stray} is outside the pools")
        started = time.perf_counter()
        num_calls = 0
        async with self._turn:
            for part in _frames(copies, self._blocks_per_frame()):
                num_calls += await self._exchange(Transfer(transfer_id=transfer_id, token=token, copies=part))
        return TransferStats(
            num_bytes=sum(copy.length for copy in copies) * self._pool.layout.block_bytes,
            num_copies=len(copies),
            num_calls=num_calls,
            duration_s=time.perf_counter() - started,
        )

    async def close(self) -> None:
        """See `KVLink.close`."""
        self._is_closed = True
        async with self._turn:
            self._hang_up()

    async def _exchange(self, transfer: Transfer) -> int:
        """Sends one frame and waits for its confirmation; returns calls made on both sides."""
        try:
            channel = await self._connected()
            await channel.send(transfer)
            num_pushed = await self._push(channel, transfer.copies)
            return num_pushed + (await channel.expect_yes()).num_calls
        except Refused as refusal:
            raise TransferFailed(f"{self.name}: refused: {refusal}") from refusal
        except (OSError, ConnectorUnavailable) as error:
            self._hang_up()
            raise TransferFailed(f"{self.name}: {error}") from error
        except BaseException:  # cancelled, maybe with half a frame on the wire
            self._hang_up()
            raise

    async def _connected(self) -> Channel:
        if self._is_closed:
            raise TransferFailed(f"{self.name}: the link is closed")
        if self._channel is not None and not self._channel.is_quiet():
            self._hang_up()
        if self._channel is None:
            try:
                self._channel = await self._dial()
            except ConnectorUnavailable:
                self._is_lost = True
                raise
            self._is_lost = False
        return self._channel

    def _hang_up(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _blocks_per_frame(self) -> int:
        by_bytes = _MAX_FRAME_PAYLOAD_BYTES // self._pool.layout.block_bytes
        return min(_MAX_FRAME_BLOCKS, max(1, by_bytes))


def _frames(copies: Sequence[Copy], num_blocks: int) -> Iterator[list[Copy]]:
    """Cuts `copies` into lists of at most `num_blocks` blocks each."""
    frame: list[Copy] = []
    space = num_blocks
    for src, dst, length in copies:
        done = 0
        while done < length:
            step = min(space, length - done)
            frame.append(Copy(src + done, dst + done, step))
            done += step
            space -= step
            if not space:
                yield frame
                frame, space = [], num_blocks
    if frame:
        yield frame
