"""What became of each fault, as a table for the docs: goes to the file that `FAULT_TABLE` names, if any."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    """`send_s`: what `send()` took; `free_s`: from the fault until all blocks of the survivor were free."""

    phase: str
    fault: str
    connector: str
    outcome: str
    send_s: float | None
    free_s: float


def write_table(rows: list[Row]) -> None:
    path = os.environ.get("FAULT_TABLE")
    if path:
        Path(path).write_text("\n".join(_lines(rows)) + "\n")


def _lines(rows: list[Row]) -> list[str]:
    titles = ["phase", "fault", "connector", "outcome", "`send()` took", "all free after"]
    lines = [titles, ["---"] * len(titles)]
    for row in rows:
        texts = [row.phase, row.fault, row.connector, row.outcome]
        lines.append([*texts, _seconds(row.send_s), _seconds(row.free_s)])
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} s"
