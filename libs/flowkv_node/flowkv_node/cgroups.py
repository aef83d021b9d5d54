"""Where the kernel tells what a container may take: the folders of its cgroups, of version 1 or 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Cgroup(NamedTuple):
    folder: Path
    version: int


def cgroups(controller: str, root: Path) -> Iterator[Cgroup]:
    """This process's cgroup for `controller` ("memory", "cpu"), and all around it.

    A container sees its own alone, as the root. `root` is where `proc` and `sys` lie.
    """
    for line in lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, version = root / "sys/fs/cgroup", 2
        elif controller in controllers.split(","):
            top, version = root / "sys/fs/cgroup" / controller, 1
        else:
            continue
        own = top / path.lstrip("/")
        for folder in (own, *own.parents[: len(own.parts) - len(top.parts)]):
            yield Cgroup(folder, version)


def lines(file: Path) -> list[str]:
    """Empty where there is no such file."""
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def first_line(file: Path) -> str:
    return next(iter(lines(file)), "")
