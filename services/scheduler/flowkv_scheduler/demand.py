"""What clients want: the requests that came lately, admitted or not, and how long their outputs become.

Pure: `now` is seconds of any monotonic clock.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Iterator
from itertools import chain, pairwise
from typing import NamedTuple

import msgspec

from flowkv_common.wire.nodes import PRIOR_TOKENS, OutputForecast, length_class

# What came longer ago says nothing of what comes next.
REMEMBERED_S = 300.0
# So many of these are kept: where more come, every second, fourth, ... one. And so many of the newest, each.
MAX_KEPT = 1024
# A rate that was seen before, up to this factor, is no news: bursts come again.
NEWS_FACTOR = 1.2
# Losses are counted together that came within so much: far less than any window.
LOSSES_S = 0.5


# Garbage collections pass over these, as over all of which a look ahead makes thousands: asks would wait.
class Wanted(msgspec.Struct, frozen=True, gc=False):
    """A request when it first asked. `num_cached_tokens` of its prompt were in some node's prefix cache."""

    at: float
    number: int
    stands_for: int
    num_prompt_tokens: int
    num_cached_tokens: int
    max_new_tokens: int


class Window(NamedTuple):
    """The requests of the last `span_s`, oldest first, each for `stands_for`, and how often they come again.

    They come again every `period_s`. That is longer than the span where as many came at once before: then
    what follows is taken to be as much as usual.
    """

    wanted: list[Wanted]
    stands_for: int
    span_s: float
    period_s: float
    num_lost: int

    @property
    def num_distinct(self) -> int:
        """One that was kept for others stands there for each of them, and tells no more than once."""
        return len({one.number for one in self.wanted})


class Demand:
    """Of one model. Counts each request once, when it first asks."""

    def __init__(self) -> None:
        self._kept: deque[Wanted] = deque()
        self._newest: deque[Wanted] = deque(maxlen=MAX_KEPT)
        self._losses: deque[tuple[float, int]] = deque()  # when the first of them came, and how many
        self._num_seen = 0
        self._stands_for = 1
        self._began = math.inf

    def copy(self) -> Demand:
        """As it is now."""
        other = copy.copy(self)
        other._kept, other._newest = self._kept.copy(), self._newest.copy()
        other._losses = self._losses.copy()
        return other

    def add_request(self, num_prompt_tokens: int, num_cached: int, max_new_tokens: int, now: float) -> None:
        self._began = min(self._began, now)
        self._num_seen += 1
        while self._kept and self._kept[0].at < now - REMEMBERED_S:
            self._kept.popleft()
        one = Wanted(now, self._num_seen, self._stands_for, num_prompt_tokens, num_cached, max_new_tokens)
        self._newest.append(one)
        if self._num_seen % self._stands_for == 0:
            self._kept.append(one)
        if len(self._kept) > MAX_KEPT:
            self._stands_for *= 2
            self._kept = deque(
                msgspec.structs.replace(one, stands_for=max(one.stands_for, self._stands_for))
                for one in self._kept
                if one.number % self._stands_for == 0
            )
        elif len(self._kept) < MAX_KEPT // 4:
            self._stands_for = max(1, self._stands_for // 2)

    def add_loss(self, now: float) -> None:
        """A request was refused, or will have its first token too late."""
        while self._losses and self._losses[0][0] < now - REMEMBERED_S:
            self._losses.popleft()
        at, num = self._losses[-1] if self._losses else (-math.inf, 0)
        if now - at < LOSSES_S:
            self._losses[-1] = at, num + 1
        else:
            self._losses.append((now, 1))

    def window(self, since: float, now: float, stands_for: int, max_num: int) -> Window | None:
        """The last requests, at most `max_num`, none before `since`; None if demand is not known so long."""
        wanted: list[Wanted] = []
        for one, before in pairwise(chain(self._newest_first(), [None])):
            assert one is not None
            if one.at < since or len(wanted) >= max_num:
                since = max(since, one.at)
                break
            # Itself and those before it that were not kept: every `stands_for`th of them.
            first = before.number if before else one.number - one.stands_for
            wanted += [one] * (one.number // stands_for - first // stands_for)
        if not wanted:
            return None
        wanted.reverse()
        span_s = max(1.0, now - max(since, self._began))
        rate = len(wanted) * stands_for / span_s
        period_s = span_s
        if rate <= NEWS_FACTOR * self._peak_rate(span_s, now - span_s):
            period_s = max(span_s, span_s * rate / self._usual_rate(now))
        return Window(wanted, stands_for, span_s, period_s, self.num_lost(since))

    def _newest_first(self) -> Iterator[Wanted]:
        yield from reversed(self._newest)
        first = self._newest[0].number if self._newest else 0
        yield from (one for one in reversed(self._kept) if one.number < first)

    def num_lost(self, since: float) -> int:
        return sum(num for at, num in self._losses if at >= since)

    def known_for_s(self, now: float) -> float:
        """Since the first request."""
        return now - self._began

    def _usual_rate(self, now: float) -> float:
        return sum(one.stands_for for one in self._kept) / max(1.0, now - self._kept[0].at)

    def _peak_rate(self, span_s: float, before: float) -> float:
        """The most requests per second that came within any such span before then."""
        most = num = first = 0
        kept = [one for one in self._kept if one.at < before]
        for one in kept:
            num += one.stands_for
            while kept[first].at <= one.at - span_s:
                num -= kept[first].stands_for
                first += 1
            most = max(most, num)
        return most / span_s


class OutputLengths:
    """Mean lengths of outputs by class of prompt length: what all nodes of a model have seen together."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[float, float]] = {}  # class -> outputs, tokens
        self._all: tuple[float, float] = 1.0, PRIOR_TOKENS

    def copy(self) -> OutputLengths:
        """As they are now."""
        other = copy.copy(self)
        other._sums = self._sums.copy()
        return other

    def replace_forecast(self, before: OutputForecast | None, after: OutputForecast | None) -> None:
        """A node's forecast by its next one. None: it has told none, or has gone."""
        for forecast, sign in ((before, -1), (after, 1)):
            for key, (outputs, tokens) in (forecast.by_length if forecast else {}).items():
                old = self._sums.get(key, (0.0, 0.0))
                self._sums[key] = old[0] + sign * outputs, old[1] + sign * tokens
                self._all = self._all[0] + sign * outputs, self._all[1] + sign * tokens

    def mean_of(self, num_prompt_tokens: int) -> float:
        """In tokens; that of all classes where nothing is known of its own."""
        outputs, tokens = self._sums.get(length_class(num_prompt_tokens), (0.0, 0.0))
        if outputs < 0.5:
            outputs, tokens = self._all
        return max(1.0, tokens / outputs)
