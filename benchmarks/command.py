"""What the commands that drive a cluster have in common: their arguments, and the JSON that they leave."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.model import default_model
from benchmarks.result import write_result


class Command:
    """`name` is that of the module below `benchmarks`. Add arguments to `parser`, then `parse`."""

    def __init__(self, name: str, text: str | None) -> None:
        self.parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=text)
        self.parser.add_argument("--json", type=Path, required=True, help="where the results go")
        self.parser.add_argument(
            "--model",
            default="",
            help="a prepared folder; the default model if empty",
        )

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Prepares the default model if none is named. Raises CalledProcessError."""
        options = self.parser.parse_args(argv)
        options.model = options.model or default_model()
        return options


class Report:
    """One run of a benchmark. `rows` are dataclasses. Knows when it began and how busy the host was."""

    def __init__(self, benchmark: str, conditions: dict[str, object]) -> None:
        self.rows: list[Any] = []
        self._benchmark = benchmark
        self._conditions = conditions
        self._began = datetime.now(UTC)
        self._load: dict[str, tuple[float, float, float]] = {}
        self.note_load("before")

    def note_load(self, when: str) -> None:
        """Of the last 1, 5 and 15 minutes, this benchmark's own included."""
        self._load[when] = os.getloadavg()

    def write(self, path: Path) -> None:
        """Again after each row: the last may be minutes away."""
        self.note_load("after")
        found = {
            "date": self._began.isoformat(timespec="seconds"),
            "load_average": self._load,
            "conditions": self._conditions,
            "rows": [asdict(row) for row in self.rows],
        }
        write_result(path, self._benchmark, found)

    def say(self, text: str) -> None:
        print(f"[{self._benchmark}] {text}", file=sys.stderr, flush=True)

    def end(self, path: Path, table: str) -> int:
        """Says what came of it, and gives the exit status."""
        print(table)
        print(f"wrote {path}")
        return 0
