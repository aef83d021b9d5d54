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

FALLBACK_CACHE_BYTES = 64 << 20
PREPARE_TIMEOUT_S = 1800


def make_parser(
    name: str, text: str | None, *, model: bool = False, devices: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """`python -m benchmarks NAME`, with `--json`, and `--model` and `--device` where there is a choice.

    The first of `devices` is the default.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=text)
    parser.set_defaults(benchmark=name)
    parser.add_argument("--json", type=Path, default=Path(f".run/{name}.json"), help="where the results go")
    if model:
        help = "a prepared folder; the default model without"
        parser.add_argument("--model", type=model_folder, default="", help=help)
    if devices:
        parser.add_argument("--device", choices=devices, default=devices[0], help="what computes")
    return parser


def set_missing(options: argparse.Namespace, **defaults: object) -> None:
    """Gives the options that are None these values: defaults that depend on other options."""
    for name, value in defaults.items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)


def model_folder(given: str) -> str:
    """The folder, or that of the default model, prepared as `make up` does it. Raises CalledProcessError."""
    if given:
        return given
    command = [sys.executable, "-m", "flowkv_engine.engine.fetch"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=PREPARE_TIMEOUT_S)
    return done.stdout.strip().splitlines()[-1]


class Report:
    """The results of one run, row by row. Knows when it began and how busy the host was."""

    def __init__(self, options: argparse.Namespace, **conditions: object) -> None:
        """`options` of `make_parser` are conditions too: of files and folders the names."""
        given: dict[str, Any] = {
            name: Path(value).name if isinstance(value, str) and "/" in value else value
            for name, value in vars(options).items()
        }
        self._path: Path = given.pop("json")
        self._benchmark: str = given.pop("benchmark")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = []
        self.conditions: dict[str, object] = {**given, **conditions}
        self.more: dict[str, object] = {}  # what is told beside the rows
        self._ran_on = {
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": describe_host(),
        }
        self._load_before = os.getloadavg()

    def say(self, text: str) -> None:
        print(f"[{self._benchmark}] {text}", file=sys.stderr, flush=True)

    def add_row(self, **row: Any) -> None:
        """Writes the JSON too: the next row may be minutes away."""
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        document = {
            "benchmark": self._benchmark,
            **self._ran_on,
            # Of the last 1, 5 and 15 minutes, this benchmark's own load included.
            "load_average": {"before": self._load_before, "after": os.getloadavg()},
            "conditions": self.conditions,
            **self.more,
            "rows": self.rows,
        }
        builtins = msgspec.to_builtins(document, enc_hook=lambda path: path.name)
        self._path.write_text(json.dumps(builtins, indent=1) + "\n")

    def finish(self, *columns: str, shown: Sequence[Mapping[str, Any]] | None = None) -> int:
        """Write the JSON and print `shown`, or these columns of the rows; the exit status."""
        self.write()
        print(table(shown or [{name: row[name] for name in columns} for row in self.rows]))
        print(f"wrote {self._path}")
        return 0


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The first column to the left, the others to the right. All rows have the same columns."""
    if not rows:
        return "no rows"
    lines = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = (
        [text.rjust(width) if place else text.ljust(width) for place, (text, width) in enumerate(pairs)]
        for pairs in (zip(line, widths, strict=True) for line in lines)
    )
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def transposed(rows: Sequence[Mapping[str, Any]], title: str) -> list[dict[str, Any]]:
    """A line for each figure, a column for each row, called by what the row has as `title`."""
    return [{"": name, **{str(row[title]): row[name] for row in rows}} for name in rows[0]]


def cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {cell(each)}" for name, each in value.items())
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


@dataclass(frozen=True)
class Quantiles:
    """Of `num` values; all 0 where there are none."""

    num: int
    p50: float
    p90: float
    p99: float
    max: float

    def __str__(self) -> str:
        return " / ".join(cell(value) for value in (self.p50, self.p90, self.p99)) if self.num else "none"


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

    def __str__(self) -> str:
        return f"{cell(self.median)} ({cell(self.min)}-{cell(self.max)})"


def spread(values: Iterable[float]) -> Spread:
    kept = list(values)
    return Spread(*(round(value, 3) for value in (statistics.median(kept), min(kept), max(kept))))


def time_s(work: Callable[[], object]) -> float:
    """Seconds by the wall clock."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def times_s(work: Callable[[], object], num_runs: int) -> list[float]:
    """Of each run, after two that are not counted."""
    return [time_s(work) for _ in range(2 + num_runs)][2:]


def cache_bytes() -> int:
    """The size of the largest cache of the first core."""
    caches = Path("/sys/devices/system/cpu/cpu0/cache")
    sizes = [int(path.read_text().strip().removesuffix("K")) << 10 for path in caches.glob("index*/size")]
    return max(sizes, default=FALLBACK_CACHE_BYTES)


def describe_host() -> dict[str, object]:
    def read(path: str) -> str:
        return Path(path).read_text().strip() if Path(path).exists() else ""

    models = [line for line in read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.machine(),
        "num_cores": len(os.sched_getaffinity(0)),
        "cache_bytes": cache_bytes(),
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "huge_pages": {  # the choice in brackets: `always [madvise] never`
            name: read(f"/sys/kernel/mm/transparent_hugepage/{name}").partition("[")[2].partition("]")[0]
            for name in ("enabled", "shmem_enabled")
        },
        "tcp_rmem": read("/proc/sys/net/ipv4/tcp_rmem"),
        "tcp_wmem": read("/proc/sys/net/ipv4/tcp_wmem"),
    }


def commit() -> str:
    """The commit measured, followed by `+` if the working tree differs; empty outside of a repository."""
    command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    folder = Path(__file__).parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    return done.stdout.strip()
