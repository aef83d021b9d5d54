"""The tokens that nodes send, sorted to the attempts that wait for them. Knows nothing of retries.

All tokens of this gateway come on one subject, one message per node and step; a keepalive once a second says
which attempts live where, and is answered with those that nobody here wants any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Iterator

from nats.aio.msg import Msg

from flowkv_common.bus.stream import Reorder
from flowkv_common.wire.messages import Keepalive, KeepaliveReply, StepTokens, TokenChunk

# Decode only keeps room for the attempt: it is prefill that must show signs of life.
RESERVED = "reserved"
# A node has the attempt, and does not work at it.
WAITING = ("queued", "preempted")


class AttemptStream:
    """The chunks of one attempt, in order. `heard_at` is the last sign of life, token or keepalive.

    `is_running` while a node works at it, as far as its keepalives tell: they come once a second.
    """

    def __init__(self, from_index: int) -> None:
        self.heard_at = time.monotonic()
        self.gap_since: float | None = None
        self.failed_at: str | None = None  # the node that sent an error
        self.is_running = False
        self._reorder = Reorder(from_index)
        self._due: deque[TokenChunk] = deque()
        self._news = asyncio.Event()

    @property
    def expected(self) -> int:
        """Index of the next token that is missing here."""
        return self._reorder.expected

    def push(self, chunk: TokenChunk, node_id: str) -> None:
        """Take a chunk that `node_id` has sent."""
        self.heard_at = time.monotonic()
        self.is_running = True
        if chunk.error is not None:
            self.failed_at = node_id
        self._due.extend(self._reorder.push(chunk))
        if not self._reorder.has_gap:
            self.gap_since = None
        elif self.gap_since is None:
            self.gap_since = self.heard_at
        self._news.set()

    async def next(self, timeout_s: float) -> TokenChunk | None:
        """The next chunk in order, or None after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self._due:
                    self._news.clear()
                    await self._news.wait()
        return self._due.popleft() if self._due else None


class Streams:
    """All attempts of this gateway that wait for tokens."""

    def __init__(self) -> None:
        self._streams: dict[str, AttemptStream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def num_running(self) -> int:
        return sum(stream.is_running for stream in self._streams.values())

    @contextlib.contextmanager
    def open(self, transfer_id: str, from_index: int) -> Iterator[AttemptStream]:
        """Collect the tokens of an attempt while the context lasts; later ones are dropped."""
        stream = self._streams[transfer_id] = AttemptStream(from_index)
        try:
            yield stream
        finally:
            del self._streams[transfer_id]

    def take(self, step: StepTokens, _: Msg) -> None:
        for chunk in step.chunks:
            if stream := self._streams.get(chunk.transfer_id):
                stream.push(chunk, step.node_id)

    async def keepalive(self, message: Keepalive) -> KeepaliveReply:
        now = time.monotonic()
        unknown = []
        for transfer_id, state in message.states.items():
            stream = self._streams.get(transfer_id)
            if stream is None:
                unknown.append(transfer_id)
            elif state != RESERVED:
                stream.heard_at = now
                stream.is_running = state not in WAITING
        return KeepaliveReply(unknown=unknown)
