"""The table on the terminal and the JSON beside it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.result import write_result
from benchmarks.transfer.measure import Row
from benchmarks.transfer.strategies import STRATEGIES

HEADER = (
    f"{'shape':8} {'tokens':>6} {'connector':9} {'strategy':38} {'copies':>7} {'calls':>7} {'MB':>7} "
    f"{'ms':>8} {'min':>8} {'max':>8} {'GB/s':>5} {'/memcpy':>7} {'CPU s':>6}"
)


def line(row: Row) -> str:
    """One row under `HEADER`."""
    return (
        f"{row.shape:8} {row.num_tokens:6} {row.connector:9} {STRATEGIES[row.strategy].title:38} "
        f"{row.num_copies:7} {row.num_calls:7} {row.num_bytes / 1e6:7.0f} "
        f"{row.median_ms:8.1f} {row.min_ms:8.1f} {row.max_ms:8.1f} {row.gb_per_s:5.1f} "
        f"{row.ratio_to_memcpy:7.2f} {row.cpu_s:6.3f}"
    )


class Report:
    """Collects rows and remarks; knows when the run began."""

    def __init__(self, conditions: dict[str, object]) -> None:
        self._began = datetime.now(UTC)
        self._load_before = os.getloadavg()
        self._conditions = conditions
        self.rows: list[Row] = []
        self.remarks: list[str] = []

    def remark(self, text: str) -> None:
        """Prints `text` the first time it is said."""
        if text not in self.remarks:
            self.remarks.append(text)
            print(text, flush=True)

    def add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self.rows.append(row)
            print(line(row), flush=True)

    def write(self, path: Path) -> None:
        found = {
            "date": self._began.isoformat(timespec="seconds"),
            "load_average": {"before": self._load_before, "after": os.getloadavg()},
            "conditions": self._conditions,
            "strategies": _titles(list(STRATEGIES)),
            "remarks": self.remarks,
            "rows": [row.as_dict() for row in self.rows],
        }
        write_result(path, "transfer", found)


def _titles(names: Sequence[str]) -> dict[str, str]:
    return {name: STRATEGIES[name].title for name in names}
