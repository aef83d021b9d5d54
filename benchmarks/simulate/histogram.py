"""Weighted counts in logarithmic buckets, for the times between tokens: millions of them in a few numbers."""

from __future__ import annotations

import math
from collections import defaultdict

# Relative width of a bucket, and so the error of a quantile.
WIDTH = 0.02
_LOG = math.log1p(WIDTH)


class Histogram:
    """Positive seconds. A quantile is exact to `WIDTH`."""

    def __init__(self) -> None:
        self._weights: defaultdict[int, int] = defaultdict(int)

    def add(self, value_s: float, weight: int = 1) -> None:
        if weight:
            self._weights[_bucket(value_s)] += weight

    def add_ramp(self, first_s: float, growth_s: float, num_values: int, weight: int) -> None:
        """`num_values` values that grow by `growth_s`, each `weight` times."""
        if not weight:
            return
        done = 0
        while done < num_values:
            bucket, upto = _bucket(first_s + done * growth_s), num_values
            border_s = math.exp((bucket + 1) * _LOG)
            if first_s + (num_values - 1) * growth_s >= border_s:
                upto = min(num_values, max(done + 1, math.ceil((border_s - first_s) / growth_s)))
            self._weights[bucket] += weight * (upto - done)
            done = upto

    def total(self) -> int:
        return sum(self._weights.values())

    def quantile(self, part: float) -> float:
        """The middle of the bucket in which the `part` lies; 0 when nothing was added."""
        wanted, seen = part * self.total(), 0
        for bucket in sorted(self._weights):
            seen += self._weights[bucket]
            if seen >= wanted:
                return math.exp((bucket + 0.5) * _LOG)
        return 0.0


def _bucket(value_s: float) -> int:
    return math.floor(math.log(value_s) / _LOG)
