"""The tokens of one attempt, put in order as its nodes' messages come."""

from __future__ import annotations

import asyncio
import bisect
import time

import msgspec

from flowkv_common.wire.messages import TokenChunk
from flowkv_gateway.attempt_clock import AttemptClock


class TokenStream:
    """The chunks of one attempt in order of their index, each token once, whatever arrives late or twice.

    `expected` is the index of the next missing token. While `gap_since` is set, a chunk is held back for
    tokens that have not come: ask for a resume from `expected`.
    """

    def __init__(self, expected: int = 0, due_in_s: float = 0.0, clock: AttemptClock | None = None) -> None:
        """`due_in_s`: when its first token is expected. `clock` is told of what is given out."""
        self.expected = expected
        self._clock = clock
        self.due_at = time.monotonic() + due_in_s  # the first token; then when the last one came
        self.may_move_at = 0.0  # not asked for sooner
        self.due: asyncio.Queue[TokenChunk] = asyncio.Queue()  # in order
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
        if chunk.token_ids:
            self.due_at = self.heard_at
        if not (self._has_ended or chunk in self._held):
            bisect.insort(self._held, chunk, key=lambda held: (held.index, _is_last(held)))
        # Give out what nothing is missing before, without tokens that were given out already.
        while self._held and self._held[0].index <= self.expected:
            chunk = self._held.pop(0)
            if num_known := self.expected - chunk.index:
                chunk = msgspec.structs.replace(
                    chunk,
                    index=self.expected,
                    token_ids=chunk.token_ids[num_known:],
                    logprobs=chunk.logprobs[num_known:],
                )
            if not (chunk.token_ids or chunk.prompt_logprobs or _is_last(chunk)):
                continue
            self.due.put_nowait(chunk)
            if self._clock is not None:
                self._clock.add_chunk(chunk, self.heard_at)
            self.expected += len(chunk.token_ids)
            if _is_last(chunk):
                self._has_ended = True
                self._held.clear()
        if not self._held:
            self.gap_since = None
        elif self.gap_since is None:
            self.gap_since = self.heard_at


def _is_last(chunk: TokenChunk) -> bool:
    return chunk.finish_reason is not None or chunk.error is not None
