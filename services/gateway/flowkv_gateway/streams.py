"""The tokens that nodes send to this gateway, put in order for each attempt that waits for them."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import time
from collections.abc import Iterator

import msgspec
from nats.aio.msg import Msg

from flowkv_common.wire.messages import Keepalive, KeepaliveReply, StepTokens, TokenChunk

# States of an attempt in keepalives. A decode node that has only reserved blocks is no sign of life: prefill
# must show one. A node does not work at an attempt that it has queued or preempted.
RESERVED = "reserved"
WAITING = ("queued", "preempted")


class TokenStream:
    """The chunks of one attempt in order of their index, each token once, whatever arrives late or twice.

    `expected` is the index of the next missing token. While `gap_since` is set, a chunk is held back for
    tokens that have not come: ask for a resume from `expected`.
    """

    def __init__(self, expected: int = 0) -> None:
        self.expected = expected
        self.due: asyncio.Queue[TokenChunk] = asyncio.Queue()  # in order, for `next_chunk`
        self.heard_at = time.monotonic()  # the last sign of life, token or keepalive
        self.gap_since: float | None = None
        self.failed_at: str | None = None  # the node that sent an error
        self.is_running = False  # a node works at it, as far as its keepalives tell: they come once a second
        self._held: list[TokenChunk] = []  # by index, all beyond `expected`
        self._has_ended = False

    def add_chunk(self, chunk: TokenChunk, node_id: str) -> None:
        """Take a chunk that `node_id` has sent.

        One with a finish reason or an error comes last, and only when every token before it was given out.
        """
        self.heard_at = time.monotonic()
        self.is_running = True
        if chunk.error is not None:
            self.failed_at = node_id
        if not (self._has_ended or chunk in self._held):
            bisect.insort(self._held, chunk, key=lambda held: (held.index, _is_last(held)))
            self._release()
        if not self._held:
            self.gap_since = None
        elif self.gap_since is None:
            self.gap_since = self.heard_at

    def _release(self) -> None:
        """Moves to `due` what nothing is missing before, without tokens that were given out already."""
        while self._held and self._held[0].index <= self.expected:
            chunk = self._held.pop(0)
            if num_known := self.expected - chunk.index:
                chunk = msgspec.structs.replace(
                    chunk,
                    index=self.expected,
                    token_ids=chunk.token_ids[num_known:],
                    logprobs=chunk.logprobs[num_known:],
                )
            if not (chunk.token_ids or _is_last(chunk)):
                continue
            self.due.put_nowait(chunk)
            self.expected += len(chunk.token_ids)
            if _is_last(chunk):
                self._has_ended = True
                self._held.clear()

    async def next_chunk(self, timeout_s: float) -> TokenChunk | None:
        """The next chunk in order, or None after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                return await self.due.get()
        return None


def _is_last(chunk: TokenChunk) -> bool:
    return chunk.finish_reason is not None or chunk.error is not None


class Streams:
    """All attempts of this gateway that wait for tokens."""

    def __init__(self) -> None:
        self.by_transfer_id: dict[str, TokenStream] = {}

    def num_running(self) -> int:
        return sum(stream.is_running for stream in self.by_transfer_id.values())

    @contextlib.contextmanager
    def collect(self, transfer_id: str, expected: int) -> Iterator[TokenStream]:
        """The tokens of an attempt from index `expected` on, while the context lasts."""
        stream = self.by_transfer_id[transfer_id] = TokenStream(expected)
        try:
            yield stream
        finally:
            del self.by_transfer_id[transfer_id]

    def on_tokens(self, step: StepTokens, _: Msg) -> None:
        for chunk in step.chunks:
            if stream := self.by_transfer_id.get(chunk.transfer_id):
                stream.add_chunk(chunk, step.node_id)

    async def on_keepalive(self, message: Keepalive) -> KeepaliveReply:
        unknown = []
        for transfer_id, state in message.states.items():
            stream = self.by_transfer_id.get(transfer_id)
            if stream is None:
                unknown.append(transfer_id)
            elif state != RESERVED:
                stream.heard_at = time.monotonic()
                stream.is_running = state not in WAITING
        return KeepaliveReply(unknown=unknown)
