"""How much memory this process can still take on Linux, before the kernel kills it.

A container's limit shows in its cgroup (version 1 or 2) and that of each cgroup around it, the host's in
`/proc/meminfo`. File pages that the kernel can drop count as free in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_ROOT = Path("/")


class Free(NamedTuple):
    """Bytes, and what sets the limit, for people."""

    num_bytes: int
    limit: str


class _Names(NamedTuple):
    """Of files in a cgroup's folder, and of the counts in its `memory.stat` that can be dropped."""

    limit: str
    usage: str
    droppable: tuple[str, str]


_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))
_V2 = _Names("memory.max", "memory.current", ("active_file", "inactive_file"))


def free_memory(root: Path = _ROOT) -> Free | None:
    """The least of all limits; None where the kernel tells none. `root` is where `proc` and `sys` lie."""
    return min([*_of_host(root), *_of_cgroups(root)], default=None)


def _of_host(root: Path) -> Iterator[Free]:
    for line in _lines(root / "proc/meminfo"):
        name, _, amount = line.partition(":")
        if name == "MemAvailable":
            yield Free(int(amount.split()[0]) * 1024, "the host's memory")


def _of_cgroups(root: Path) -> Iterator[Free]:
    """Of this process's cgroup and all around it; a container sees its own alone, as the root."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, names = root / "sys/fs/cgroup", _V2
        elif "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", _V1
        else:
            continue
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            yield from _of_cgroup(folder, names)
            if folder == top:
                break


def _of_cgroup(folder: Path, names: _Names) -> Iterator[Free]:
    limit = next(iter(_lines(folder / names.limit)), "max")
    usage = next(iter(_lines(folder / names.usage)), "")
    if not limit.isdigit() or not usage.isdigit():
        return  # no limit, or not a cgroup that we can see
    counts = dict(line.split() for line in _lines(folder / "memory.stat"))
    droppable = sum(int(counts.get(name, 0)) for name in names.droppable)
    yield Free(int(limit) - int(usage) + droppable, f"the limit of {folder}")


def _lines(file: Path) -> list[str]:
    """Empty where there is no such file."""
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
