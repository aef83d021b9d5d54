"""Stop strings in a growing text, wherever its pieces begin and end."""

from __future__ import annotations

from collections.abc import Sequence


class StopFinder:
    """Passes text on until a stop string ends in it; the stop string itself is never passed on.

    Of two stop strings the one that ends first counts, and of two that end at the same place the longer.
    Text that may be the beginning of a stop string is held back. Takes time linear in the text.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._borders = [_borders(stop) for stop in stops]
        self._matched = [0] * len(stops)  # per stop string: how much of it the text ends with
        self._held = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        """The text that is now safe to show. After a stop string was found there is none."""
        if self.is_stopped:
            return ""
        if not self._stops:
            return text
        self._held += text
        for place in range(len(self._held) - len(text), len(self._held)):
            if length := self._advance(self._held[place]):
                self.is_stopped = True
                return self._take(place + 1 - length)
        return self._take(len(self._held) - max(self._matched))

    def finish(self) -> str:
        """The text held back, once nothing more can come."""
        return "" if self.is_stopped else self._take(len(self._held))

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        return taken

    def _advance(self, char: str) -> int:
        """Take one character in; the length of the longest stop string that it ends, or 0."""
        ended = 0
        for which, stop in enumerate(self._stops):
            matched = self._matched[which]
            while matched and stop[matched] != char:
                matched = self._borders[which][matched - 1]
            if stop[matched] == char:
                matched += 1
            self._matched[which] = matched
            if matched == len(stop):
                ended = max(ended, matched)
        return ended


def _borders(stop: str) -> list[int]:
    """Per prefix, how long its longest proper prefix is that is also its suffix (Knuth-Morris-Pratt)."""
    borders = [0] * len(stop)
    length = 0
    for place in range(1, len(stop)):
        while length and stop[place] != stop[length]:
            length = borders[length - 1]
        if stop[place] == stop[length]:
            length += 1
        borders[place] = length
    return borders
