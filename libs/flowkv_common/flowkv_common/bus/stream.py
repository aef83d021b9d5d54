"""Puts the token chunks of one attempt in order. Pure: knows neither NATS nor time."""

from __future__ import annotations

import bisect

import msgspec

from flowkv_common.wire.messages import TokenChunk


class Reorder:
    """Gives chunks out in order of their index, each token once, whatever arrives late or twice.

    `has_gap` says that something is held back for tokens that have not come: ask for a resume from
    `expected`.
    """

    def __init__(self, expected: int = 0) -> None:
        self.expected = expected  # index of the next token
        self._held: list[TokenChunk] = []  # by index, all beyond `expected`
        self._has_ended = False

    @property
    def has_gap(self) -> bool:
        return bool(self._held)

    def push(self, chunk: TokenChunk) -> list[TokenChunk]:
        """Take a chunk; returns those that are due, without tokens that were given out before.

        One with a finish reason or an error comes last, and only when every token before it was given out.
        """
        if self._has_ended or chunk in self._held:
            return []
        bisect.insort(self._held, chunk, key=_place)
        due = []
        while self._held and self._held[0].index <= self.expected:
            rest = _without_first(self._held.pop(0), self.expected)
            if not (rest.token_ids or _is_last(rest)):
                continue
            due.append(rest)
            self.expected += len(rest.token_ids)
            if _is_last(rest):
                self._has_ended = True
                self._held.clear()
        return due


def _place(chunk: TokenChunk) -> tuple[int, bool]:
    return chunk.index, _is_last(chunk)


def _is_last(chunk: TokenChunk) -> bool:
    return chunk.finish_reason is not None or chunk.error is not None


def _without_first(chunk: TokenChunk, expected: int) -> TokenChunk:
    """`chunk` from token `expected` on."""
    num_known = expected - chunk.index
    if num_known == 0:
        return chunk
    return msgspec.structs.replace(
        chunk, index=expected, token_ids=chunk.token_ids[num_known:], logprobs=chunk.logprobs[num_known:]
    )
