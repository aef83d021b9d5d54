"""What the benchmark ran on."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
_FALLBACK_CACHE_BYTES = 64 << 20


def cache_bytes() -> int:
    """The size of the largest cache of the first core."""
    sizes = [int(path.read_text().strip().removesuffix("K")) << 10 for path in _CACHES.glob("index*/size")]
    return max(sizes, default=_FALLBACK_CACHE_BYTES)


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    (available,) = (line for line in lines if line.startswith("MemAvailable:"))
    return int(available.split()[1]) << 10


def describe_host() -> dict[str, object]:
    return {
        "cpu": _cpu_model(),
        "num_cores": len(os.sched_getaffinity(0)),
        "cache_bytes": cache_bytes(),
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "huge_pages": {name: _chosen(_HUGE_PAGES / name) for name in ("enabled", "shmem_enabled")},
        "tcp_rmem": _read(Path("/proc/sys/net/ipv4/tcp_rmem")),
        "tcp_wmem": _read(Path("/proc/sys/net/ipv4/tcp_wmem")),
    }


def commit() -> str:
    """The commit measured, with `+` behind it if the working tree differs; empty outside of a repository."""
    done = subprocess.run(
        ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    return done.stdout.strip()


def _cpu_model() -> str:
    names = [line for line in _read(Path("/proc/cpuinfo")).splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.machine()


def _chosen(path: Path) -> str:
    """The choice in brackets: `always [madvise] never`."""
    return _read(path).partition("[")[2].partition("]")[0]


def _read(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""
