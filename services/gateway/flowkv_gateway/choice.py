"""One answer in the making: tokens in, what the client sees of each of them out. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from flowkv_common.wire.parts import TokenLogprob
from flowkv_gateway.detokenizer import Detokenizer
from flowkv_gateway.generation import Generation, Piece
from flowkv_gateway.stops import PreparedStop, StopFinder
from flowkv_gateway.vocabulary import Vocabulary


class Delta(NamedTuple):
    """What one token adds to the choice with this number.

    `text` is empty for half a character, or while it may be the beginning of a stop string. `text_offset` is
    where the token's own text begins in the answer. `logprob` is None if not asked for, `token_id` only in a
    last delta without a token.
    """

    choice: int
    text: str
    is_first: bool
    finish_reason: str | None
    logprob: TokenLogprob | None
    text_offset: int
    token_id: int | None


@dataclass(frozen=True)
class Display:
    """What of an answer its client sees.

    `stop_ids` are the tokens at which nodes end it: the model's own and the request's. Neither they nor stop
    strings are shown, nor are special tokens, unless the request wants them.
    """

    stops: Sequence[PreparedStop] = ()
    stop_ids: frozenset[int] = frozenset()
    shows_stop: bool = False
    shows_special: bool = False


class Choice:
    """The state of one answer. Stop strings count only after `min_tokens` tokens."""

    def __init__(self, index: int, generation: Generation, vocabulary: Vocabulary, display: Display) -> None:
        self.index = index
        self.generation = generation
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finish_reason: str | None = None
        self._vocabulary = vocabulary
        self._display = display
        self._detokenizer = Detokenizer(vocabulary)
        self._stops = StopFinder(display.stops, keeps_stop=display.shows_stop)
        self._num_chars = 0  # decoded so far, held back text included

    def push(self, piece: Piece) -> Iterator[Delta]:
        """One delta per token, none after a stop string; a last piece without tokens gives one, too."""
        self.num_cached_tokens = max(self.num_cached_tokens, piece.num_cached_tokens)
        last = len(piece.token_ids) - 1
        for place, token_id in enumerate(piece.token_ids):
            logprob = piece.logprobs[place] if piece.logprobs else None
            yield self._take(token_id, logprob, piece.finish_reason if place == last else None)
            if self.finish_reason is not None:
                return
        if piece.finish_reason is not None:
            yield self._take(None, None, piece.finish_reason)

    def _take(self, token_id: int | None, logprob: TokenLogprob | None, reason: str | None) -> Delta:
        offset, is_first = self._num_chars, self.num_tokens == 0
        decoded = hidden = ""
        if token_id is not None:
            self.num_tokens += 1
            if self._is_hidden(token_id, reason):
                hidden = self._vocabulary.token_text(token_id)
            else:
                decoded = self._detokenizer.push(token_id)
        if reason is not None:
            decoded += self._detokenizer.finish()
        self._num_chars += len(decoded)
        shown = self._show(decoded, hidden)
        if self._stops.is_stopped:
            reason = "stop"
        elif reason is not None:
            shown += self._stops.finish()
        self.finish_reason = reason
        return Delta(self.index, shown, is_first, reason, logprob, offset, token_id)

    def _is_hidden(self, token_id: int, reason: str | None) -> bool:
        has_ended_it = reason == "stop" and token_id in self._display.stop_ids
        if has_ended_it and not self._display.shows_stop:
            return True
        return self._vocabulary.is_special(token_id) and not self._display.shows_special

    def _show(self, decoded: str, hidden: str) -> str:
        if self.num_tokens <= self.generation.sampling.min_tokens:
            return decoded
        return self._stops.push(hidden, is_shown=False) + self._stops.push(decoded)
