"""Stop strings in a growing text, wherever its pieces begin and end."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


class StopFinder:
    """Passes text on until a stop string ends in it; the stop string itself only if `keeps_stop`.

    Of two stop strings the one that ends first counts, and of two that end at the same place the longer.
    Text that may be the beginning of a stop string is held back. Takes time linear in the text.

    Special tokens are not shown, and most stop strings don't see them: text on both sides of one is as if it
    stood together. A stop string with a special token's text (one of `special_texts`) in it sees them.
    """

    def __init__(
        self, stops: Sequence[str], special_texts: Collection[str] = (), *, keeps_stop: bool = False
    ) -> None:
        self._stops = stops
        self._sees_hidden = [any(text in stop for text in special_texts) for stop in stops]
        self._keeps_stop = keeps_stop
        self._borders = [_borders(stop) for stop in stops]
        self._matched = [0] * len(stops)  # per stop string: how much of it the text ends with
        self._held: list[str] = []  # one entry per character, empty for a hidden one
        self.is_stopped = False

    def push(self, text: str, *, is_shown: bool = True) -> str:
        """The text that is now safe to show. After a stop string was found there is none."""
        if self.is_stopped:
            return ""
        if not self._stops:
            return text if is_shown else ""
        for char in text:
            self._held.append(char if is_shown else "")
            if ended := self._advance(char, is_shown):
                self.is_stopped = True
                return self._take_before(ended)
        return self._take_before(range(len(self._stops)))

    def finish(self) -> str:
        """The text held back, once nothing more can come."""
        return "" if self.is_stopped else self._take(len(self._held))

    def _take_before(self, stops: Iterable[int]) -> str:
        """What stands before the longest match of these stop strings; all of it if they may be shown."""
        return self._take(len(self._held) - (0 if self._keeps_stop else max(map(self._reach, stops))))

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        return "".join(taken)

    def _reach(self, which: int) -> int:
        """How far back the match of a stop string begins, hidden characters between counted."""
        matched = self._matched[which]
        if self._sees_hidden[which] or "" not in self._held:
            return matched
        shown = [place for place, char in enumerate(self._held) if char]
        return len(self._held) - shown[-matched] if matched else 0

    def _advance(self, char: str, is_shown: bool) -> list[int]:
        """Take one character in; the stop strings that end with it."""
        ended = []
        for which, stop in enumerate(self._stops):
            if not is_shown and not self._sees_hidden[which]:
                continue
            matched = self._matched[which]
            while matched and stop[matched] != char:
                matched = self._borders[which][matched - 1]
            if stop[matched] == char:
                matched += 1
            self._matched[which] = matched
            if matched == len(stop):
                ended.append(which)
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
