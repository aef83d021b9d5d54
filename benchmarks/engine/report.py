"""Rows, the table, the JSON. Pure but for the file that it writes."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.engine.floor import Machine, Work
from benchmarks.engine.jobs import Job
from benchmarks.result import write_result

# Parties whose weights are not those of the floor.
OTHER_WEIGHTS = {"llamacpp"}


@dataclass(frozen=True)
class Row:
    """Tokens per second over all repeats. `of_floor`: the share of what the machine could do at best."""

    job: str
    party: str
    tokens_per_s: float
    min: float
    max: float
    num_repeats: int
    of_floor: float | None
    versus: dict[str, float]  # FlowKV's tokens/s over this party's: median, min and max of the rounds' ratios


def row_of(
    job: Job, party: str, seconds: list[float], ours: list[float], work: Work, machine: Machine
) -> Row:
    """`seconds` and `ours`, FlowKV's, of the same rounds."""
    num_tokens = job.batch * job.num_steps if job.is_decode else job.context
    rates = [num_tokens / each for each in seconds]
    ratios = [theirs / mine for theirs, mine in zip(seconds, ours, strict=True)]
    floor_s = work.floor_s(job, machine) * (job.num_steps if job.is_decode else 1)
    of_floor = None if party in OTHER_WEIGHTS else round(floor_s / statistics.median(seconds), 3)
    return Row(
        job=job.title,
        party=party,
        tokens_per_s=round(statistics.median(rates), 1),
        min=round(min(rates), 1),
        max=round(max(rates), 1),
        num_repeats=len(rates),
        of_floor=of_floor,
        versus={
            name: round(number, 3)
            for name, number in (
                ("median", statistics.median(ratios)),
                ("min", min(ratios)),
                ("max", max(ratios)),
            )
        },
    )


def table(rows: list[Row], peaks: dict[str, int]) -> str:
    head = f"{'':<18}{'':<14}{'tokens/s (min-max)':>28}{'of floor':>10}{'FlowKV is':>22}"
    lines = [head]
    for row in rows:
        rate = f"{row.tokens_per_s:.1f} ({row.min:.1f}-{row.max:.1f})"
        of_floor = "" if row.of_floor is None else f"{row.of_floor:.0%}"
        ratio = "" if row.party == "flowkv" else "{median:.2f}x ({min:.2f}-{max:.2f})".format(**row.versus)
        lines.append(f"{row.job:<18}{row.party:<14}{rate:>28}{of_floor:>9} {ratio:>21}")
    lines.append("peak memory, MB: " + ", ".join(f"{name} {peak >> 20}" for name, peak in peaks.items()))
    return "\n".join(lines)


def write(
    path: Path, rows: list[Row], machine: Machine, peaks: dict[str, int], conditions: dict[str, object]
) -> None:
    found = {
        "conditions": conditions,
        "machine": {name: round(number / 1e9, 2) for name, number in asdict(machine).items()},
        "machine_unit": "GB/s read, GFLOP/s fp32",
        "peak_memory_mb": {name: peak >> 20 for name, peak in peaks.items()},
        "rows": [asdict(row) for row in rows],
    }
    write_result(path, "engine", found)
