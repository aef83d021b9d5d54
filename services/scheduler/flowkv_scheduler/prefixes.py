"""Who has cached which prefix. A stub until the index lands."""

from __future__ import annotations

from collections.abc import Sequence


class PrefixIndex:
    def hits(self, hashes: Sequence[str], now: float) -> dict[str, int]:
        return {}

    def expect(self, node_id: str, hashes: Sequence[str], until: float) -> None:
        return None
