"""The JSON that each of these benchmarks writes, and how well the nodes kept their pace while it ran."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.host import commit, describe_host
from tests.paced.engine import Kept

# Beyond this the nodes were not what they are said to be: the host was too slow for so many.
MAX_SLIP = 0.05


@dataclass(frozen=True)
class Pace:
    """Over all nodes of a run. `slip`: by which share of the stated time steps were longer."""

    num_steps: int
    slip: float
    worst_node_slip: float

    @property
    def is_kept(self) -> bool:
        return self.slip <= MAX_SLIP

    def __str__(self) -> str:
        return f"{self.slip:+.1%}" + ("" if self.is_kept else " NOT KEPT")


def pace_of(kept: Mapping[str, Kept]) -> Pace:
    """Of the nodes that have run steps."""
    each = [node for node in kept.values() if node.num_steps]
    total = Kept(
        *(sum(getattr(node, name) for node in each) for name in ("num_steps", "stated_s", "taken_s"))
    )
    worst = max((node.slip for node in each), default=0.0)
    return Pace(total.num_steps, round(total.slip, 4), round(worst, 4))


class Report:
    """One run of a benchmark. `rows` are dataclasses."""

    def __init__(self, benchmark: str, conditions: dict[str, object]) -> None:
        self._benchmark = benchmark
        self._conditions = conditions
        self._began = datetime.now(UTC)
        self._load_before = os.getloadavg()

    def write(self, path: Path, rows: Sequence[Any]) -> None:
        """Again after each row: the last may be minutes away."""
        document = {
            "benchmark": self._benchmark,
            "commit": commit(),
            "date": self._began.isoformat(timespec="seconds"),
            "host": describe_host(),
            "load_average": {"before": self._load_before, "after": os.getloadavg()},
            "conditions": self._conditions,
            "rows": [asdict(row) for row in rows],
        }
        path.write_text(json.dumps(document, indent=1) + "\n")
