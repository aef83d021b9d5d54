"""The cores that a node computes on. Where nodes share too few of them, none has anything to lend."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flowkv_node.cgroups import cgroups, first_line


def busy_cores(num_threads: int, root: Path = Path("/")) -> float:
    """That so many threads keep busy: as many, or what the least of a container's limits lets them have."""
    return min([float(num_threads), *_limits(root)])


def _limits(root: Path) -> Iterator[float]:
    for folder, version in cgroups("cpu", root):
        if version == 2:
            quota, _, period = first_line(folder / "cpu.max").partition(" ")
        else:
            quota, period = (first_line(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota.isdigit() and period.isdigit():  # else no limit ("max", -1), or not a cgroup that we can see
            yield int(quota) / int(period)
