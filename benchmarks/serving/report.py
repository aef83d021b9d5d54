"""The table on the terminal and the JSON. Pure but for the file that it writes."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.load.summary import Quantiles
from benchmarks.result import write_result
from benchmarks.serving.bare import Floors
from benchmarks.serving.loop import Figures, Load


@dataclass(frozen=True)
class Run:
    """One load on one server. `cpu_ms_per_token`: of the services, by process."""

    server: str
    load: Load
    round: int
    figures: Figures
    cpu_ms_per_token: dict[str, float]


_COLUMNS: dict[str, Callable[[Figures], float]] = {
    "tok/s": lambda figures: figures.output_tokens_per_s,
    "TTFT p50": lambda figures: 1e3 * figures.ttft.p50,
    "TTFT p99": lambda figures: 1e3 * figures.ttft.p99,
    "ITL p50": lambda figures: 1e3 * figures.itl.p50,
    "ITL p99": lambda figures: 1e3 * figures.itl.p99,
    "TPOT p50": lambda figures: 1e3 * figures.tpot.p50,
    "E2E p50": lambda figures: 1e3 * figures.e2e.p50,
    "good/s": lambda figures: figures.goodput_per_s,
}


def table(runs: list[Run], floors: Floors | None) -> str:
    """Medians over the rounds, times in ms."""
    head = "".join(f"{name:>10}" for name in _COLUMNS)
    lines = [f"{'':<22}{'':<8}{head}  services, CPU ms per token"]
    for load in dict.fromkeys(run.load for run in runs):
        for server in dict.fromkeys(run.server for run in runs):
            mine = [run for run in runs if (run.load, run.server) == (load, server)]
            if mine:
                cells = (statistics.median(of(run.figures) for run in mine) for of in _COLUMNS.values())
                row = "".join(f"{cell:>10.1f}" for cell in cells)
                lines.append(f"{load.title:<22}{server:<8}{row}  {_services(mine)}")
    if floors:
        lines.append(f"bare engine: a prompt of 10 tokens takes {floors.short_prefill_ms:.1f} ms")
        lines += [
            f"{each.load:<22}{'bare':<8}{each.output_tokens_per_s:>10.1f}   step {each.decode_step_ms:.1f} ms"
            for each in floors.loads
        ]
    return "\n".join(lines)


def _services(runs: list[Run]) -> str:
    medians = {
        name: statistics.median(run.cpu_ms_per_token[name] for run in runs)
        for name in runs[0].cpu_ms_per_token
    }
    return ", ".join(f"{name.partition('-')[0]} {median:.2f}" for name, median in medians.items())


def write(
    path: Path, runs: list[Run], floors: Floors | None, added_s: Quantiles, conditions: dict[str, object]
) -> None:
    """`added_s`: what the services add to the TTFT of a short prompt."""
    found = {
        "conditions": conditions,
        "runs": [asdict(run) for run in runs],
        "bare": asdict(floors) if floors else None,
        "short_prompt_added_s": asdict(added_s),
    }
    write_result(path, "serving", found)
