"""Where the time of a request went. Each phase is measured inside one process, by its monotonic clock."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping


class Phases:
    """Seconds per phase; a phase that comes again adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the seconds spent in the block."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.add({name: time.monotonic() - began})

    def add(self, seconds: Mapping[str, float]) -> None:
        for name, spent in seconds.items():
            self.seconds[name] = round(self.seconds.get(name, 0.0) + spent, 6)
