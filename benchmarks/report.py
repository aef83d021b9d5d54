"""What all benchmarks share: the argument parser, the table, the JSON that says what it ran on."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
FALLBACK_CACHE_BYTES = 64 << 20
PREPARE_TIMEOUT_S = 1800


def make_parser(
    name: str, text: str | None, *, model: bool = False, devices: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """`python -m benchmarks NAME`, with `--json`, and `--model` and `--device` where there is a choice.

    The first of `devices` is the default.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=text,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--json", type=Path, default=Path(f".run/{name}.json"), help="where the results go")
    if model:
        parser.add_argument("--model", default="", help="a prepared folder; if empty the default model")
    if devices:
        parser.add_argument("--device", choices=devices, default=devices[0], help="what computes")
    return parser


def default_model() -> str:
    """The default model's folder, prepared as `make up` does it. Raises CalledProcessError."""
    command = [sys.executable, "-m", "flowkv_engine.engine.fetch"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=PREPARE_TIMEOUT_S)
    return done.stdout.strip().splitlines()[-1]


class Report:
    """The result of one run: `rows` are dataclasses, structs or dicts. Knows how busy the host was."""

    def __init__(self, path: Path, benchmark: str, conditions: Mapping[str, object]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[Any] = []
        self.more: dict[str, object] = {}  # what is told beside the rows
        self.conditions = dict(conditions)
        self._path = path
        self._benchmark = benchmark
        self._began = datetime.now(UTC)
        self._load_averages = {"before": os.getloadavg()}

    def say(self, text: str) -> None:
        print(f"[{self._benchmark}] {text}", file=sys.stderr, flush=True)

    def write(self) -> None:
        """Call it after each row: the last row may be minutes away."""
        document = {
            "benchmark": self._benchmark,
            "commit": commit(),
            "date": self._began.isoformat(timespec="seconds"),
            "host": describe_host(),
            # Of the last 1, 5 and 15 minutes, this benchmark's own load included.
            "load_average": {**self._load_averages, "after": os.getloadavg()},
            "conditions": self.conditions,
            **self.more,
            "rows": self.rows,
        }
        self._path.write_text(json.dumps(msgspec.to_builtins(document), indent=1) + "\n")

    def finish(self, text: str) -> int:
        """Write the JSON, print the table; the exit status."""
        self.write()
        print(text)
        print(f"wrote {self._path}")
        return 0


def options_of(parsed: argparse.Namespace) -> dict[str, object]:
    """All options as the conditions of a report."""
    return {name: str(value) for name, value in vars(parsed).items()}


def fail(error: object, status: int = 1) -> int:
    """Say what went wrong; the exit status."""
    print(error, file=sys.stderr)
    return status


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """The first column to the left, the others to the right."""
    cells = [list(head), *(list(map(str, line)) for line in lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


@dataclass(frozen=True)
class Quantiles:
    """Of `num` values, in seconds where nothing else is said; all 0 where there are none."""

    num: int
    p50: float
    p90: float
    p99: float
    max: float

    def __str__(self) -> str:
        return f"{self.p50:.3f} / {self.p90:.3f} / {self.p99:.3f}" if self.num else "none"


def quantiles(values: Iterable[float]) -> Quantiles:
    """By nearest rank: the value that so many of a hundred do not exceed."""
    ordered = sorted(values)
    if not ordered:
        return Quantiles(0, 0.0, 0.0, 0.0, 0.0)
    ranks = (round(ordered[-(-percent * len(ordered) // 100) - 1], 4) for percent in (50, 90, 99, 100))
    return Quantiles(len(ordered), *ranks)


@dataclass(frozen=True)
class Spread:
    """Of a few repeats."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        kept = list(values)
        return cls(*(round(value, 3) for value in (statistics.median(kept), min(kept), max(kept))))


def time_s(work: Callable[[], object]) -> float:
    """Seconds by the wall clock."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def cache_bytes() -> int:
    """The size of the largest cache of the first core."""
    sizes = [int(path.read_text().strip().removesuffix("K")) << 10 for path in CACHES.glob("index*/size")]
    return max(sizes, default=FALLBACK_CACHE_BYTES)


def describe_host() -> dict[str, object]:
    models = [line for line in _read(Path("/proc/cpuinfo")).splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.machine(),
        "num_cores": len(os.sched_getaffinity(0)),
        "cache_bytes": cache_bytes(),
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "huge_pages": {  # the choice in brackets: `always [madvise] never`
            name: _read(HUGE_PAGES / name).partition("[")[2].partition("]")[0]
            for name in ("enabled", "shmem_enabled")
        },
        "tcp_rmem": _read(Path("/proc/sys/net/ipv4/tcp_rmem")),
        "tcp_wmem": _read(Path("/proc/sys/net/ipv4/tcp_wmem")),
    }


def commit() -> str:
    """The commit measured, followed by `+` if the working tree differs; empty outside of a repository."""
    command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    folder = Path(__file__).parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    return done.stdout.strip()


def _read(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""
