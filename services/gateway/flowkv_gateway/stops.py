"""Stop strings in a growing text, wherever its pieces begin and end."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple


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
