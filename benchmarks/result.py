"""The JSON that a benchmark leaves: where its figures come from, then what it found."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.host import commit, describe_host


def write_result(path: Path, benchmark: str, found: dict[str, object]) -> None:
    """Adds commit, time, host, load averages of 1, 5 and 15 minutes, where `found` does not have them."""
    document = {
        "benchmark": benchmark,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": describe_host(),
        "load_average": os.getloadavg(),
        **found,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
