"""Tokens to text while they arrive: linear in the output, and no character is ever cut in two."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from flowkv_common.wire.messages import TokenLogprob
from flowkv_gateway.dispatch import Generation, Piece
from flowkv_gateway.tokenizer import Vocabulary


class Detokenizer:
    """The text of one answer. `push` returns what the token completes; `finish` what can't be completed."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._vocabulary.token_bytes(token_id))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class PreparedStop(NamedTuple):
    """One stop string, prepared for being looked for. All choices of a request share it.

    `borders`: per prefix, how long its longest proper prefix is that is also its suffix (Knuth-Morris-Pratt).
    `sees_hidden`: it has a special token's text in it, so it is looked for in the text with special tokens.
    """

    text: str
    borders: Sequence[int]
    sees_hidden: bool


def prepare_stops(stops: Iterable[str], special_texts: Collection[str] = ()) -> tuple[PreparedStop, ...]:
    """Takes time linear in the length of each stop string, and per special token of the model."""
    return tuple(
        PreparedStop(stop, _borders(stop), any(special in stop for special in special_texts))
        for stop in stops
    )


class StopFinder:
    """Passes text on until a stop string ends in it; the stop string itself only if `keeps_stop`.

    Of two stop strings the one that ends first counts, and of two that end at the same place the longer.
    Text that may be the beginning of a stop string is held back. Takes time linear in the text.

    Special tokens are not shown, and most stop strings don't see them: text on both sides of one is as if it
    stood together. A stop string with a special token's text in it sees them.
    """

    def __init__(self, stops: Sequence[PreparedStop], *, keeps_stop: bool = False) -> None:
        self._stops = stops
        self._keeps_stop = keeps_stop
        self._matched = [0] * len(stops)  # per stop string: how much of it the text it sees ends with
        self._held = ""  # shown text only
        # How many shown characters there were after each of the latest ones, hidden ones among them: as far
        # back as a stop string can begin that sees these.
        self._longest_seeing = max((len(stop.text) for stop in stops if stop.sees_hidden), default=0)
        self._num_shown = deque([0], maxlen=self._longest_seeing + 1)
        self.is_stopped = False

    def push(self, text: str, *, is_shown: bool = True) -> str:
        """The text that is now safe to show. After a stop string was found there is none."""
        if self.is_stopped or not (is_shown or self._longest_seeing):
            return ""
        if not self._stops:
            return text
        for place, char in enumerate(text, start=1):
            self._num_shown.append(self._num_shown[-1] + is_shown)
            if ended := self._advance(char, is_shown):
                self.is_stopped = True
                self._held += text[:place] if is_shown else ""
                return self._take_before(ended)
        self._held += text if is_shown else ""
        return self._take_before(range(len(self._stops)))

    def finish(self) -> str:
        """The text held back, once nothing more can come."""
        return "" if self.is_stopped else self._take(len(self._held))

    def _take_before(self, stops: Iterable[int]) -> str:
        """What stands before the longest match of these stop strings; all of it if they may be shown."""
        reach = 0 if self._keeps_stop else max(map(self._reach, stops), default=0)
        return self._take(len(self._held) - reach)

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        return taken

    def _reach(self, which: int) -> int:
        """How many shown characters back the match of a stop string begins."""
        matched = self._matched[which]
        if self._stops[which].sees_hidden:
            return self._num_shown[-1] - self._num_shown[-1 - matched]
        return matched

    def _advance(self, char: str, is_shown: bool) -> list[int]:
        """Take one character in; the stop strings that end with it."""
        ended = []
        for which, (stop, borders, sees_hidden) in enumerate(self._stops):
            if not is_shown and not sees_hidden:
                continue
            matched = self._matched[which]
            while matched and stop[matched] != char:
                matched = borders[matched - 1]
            if stop[matched] == char:
                matched += 1
            self._matched[which] = matched
            if matched == len(stop):
                ended.append(which)
        return ended


def _borders(stop: str) -> list[int]:
    borders = [0] * len(stop)
    length = 0
    for place in range(1, len(stop)):
        while length and stop[place] != stop[length]:
            length = borders[length - 1]
        if stop[place] == stop[length]:
            length += 1
        borders[place] = length
    return borders


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
