"""Blocks that nodes will soon have, since their prompts are on the way. Pure: no clock, no I/O.

Most come and are told of by the node itself within a second. So nothing is done to forget the others one by
one: what ends in the same second lies together, and is dropped as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


class Expected:
    """Masks of nodes by key, one dict for each second in which expectations end."""

    def __init__(self) -> None:
        self._masks_until: dict[int, dict[int, int]] = {}
        self._ended: list[dict[int, int]] = []  # emptied bit by bit: all at once would hold up a request

    def add(self, keys: Sequence[int], bits: int, until: float) -> int:
        """The nodes of these bits will have the keys; forgotten within a second after `until`.

        Returns the second in which the bits are free again.
        """
        second = math.ceil(until)
        if not keys:
            return second
        set_bits(self._masks_until.setdefault(second, {}), keys, bits)
        self._empty(2 * len(keys))
        return second

    def masks(self, now: float) -> list[dict[int, int]]:
        """Those that still count."""
        while self._masks_until and (first := min(self._masks_until)) <= now:
            self._ended.append(self._masks_until.pop(first))
        return list(self._masks_until.values())

    def _empty(self, num_keys: int) -> None:
        while self._ended and num_keys > 0:
            masks = self._ended[-1]
            num_now = min(num_keys, len(masks))
            for _ in range(num_now):
                masks.popitem()
            num_keys -= num_now
            if not masks:
                self._ended.pop()


def set_bits(masks: dict[int, int], keys: Sequence[int], bits: int) -> None:
    for key in keys:
        mask = masks.get(key)
        masks[key] = bits if mask is None else mask | bits  # most are of the same nodes: they share an int
