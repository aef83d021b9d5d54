"""How long outputs become: from what they may be at most, and how often they end of themselves. Pure.

An output is taken to end of itself at any token alike. So those that reach their `max_tokens`, or still run,
count for what they are: so many tokens without an end.
"""

from __future__ import annotations

from collections.abc import Iterable

from flowkv_common.wire.nodes import OutputForecast, expected_tokens

# Of ended outputs about so many tokens count, the latest ones.
MEMORY_TOKENS = 20_000
# Before anything was seen: one end of itself in so many tokens, a chat answer's usual length.
PRIOR_TOKENS = 256


class OutputLengths:
    """Learns from outputs that have ended; tells of those that run."""

    def __init__(self) -> None:
        self._num_tokens = 0.0
        self._num_stops = 0.0

    def see(self, num_tokens: int, *, stopped: bool) -> None:
        """An output has ended: `stopped` if not by its `max_tokens`. One that was cut off has not ended."""
        keep = max(0.0, 1.0 - num_tokens / MEMORY_TOKENS)
        self._num_tokens = keep * self._num_tokens + num_tokens
        self._num_stops = keep * self._num_stops + stopped

    def forecast(self, running: Iterable[tuple[int, int]]) -> OutputForecast:
        """Of sequences that have produced so many tokens and may produce so many more."""
        sequences = list(running)
        num_tokens = PRIOR_TOKENS + self._num_tokens + sum(produced for produced, _ in sequences)
        stop_rate = (1.0 + self._num_stops) / num_tokens
        first = min((left for _, left in sequences), default=0)
        return OutputForecast(
            tokens_left=round(sum(expected_tokens(left, stop_rate) for _, left in sequences), 1),
            # All of them together stop so many times as often.
            first_ends_in=round(expected_tokens(first, stop_rate * len(sequences)), 1),
            stop_rate=round(stop_rate, 8),
        )
