"""Long work in slices: who drives it may do other things after each, so that nothing waits for all of it."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeAlias, TypeVar

T = TypeVar("T")
# Ends with its result.
Sliced: TypeAlias = Generator[None, None, T]


def at_once(work: Sliced[T]) -> T:
    """All slices, one after the other."""
    while True:
        try:
            next(work)
        except StopIteration as ended:
            result: T = ended.value
            return result
