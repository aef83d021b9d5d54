"""Processes that may take a share of a core each, so that those of many nodes don't slow each other.

By cgroups, as a container's CPU limit does it; so only root may.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import BenchmarkFailed

CGROUPS = Path("/sys/fs/cgroup")
# A process that has had its share waits for the next period: that must be short beside a step.
PERIOD_US = 10_000


@contextlib.contextmanager
def core_shares(share: float) -> Iterator[Callable[[int], None]]:
    """Call the result with the id of a process to limit it, with all its threads, until it ends.

    The processes must have ended before the context does. Raises BenchmarkFailed where this user may not.
    """
    quota = str(int(share * PERIOD_US))
    has_v2 = (CGROUPS / "cgroup.controllers").exists()
    top = CGROUPS if has_v2 else CGROUPS / "cpu"
    made: list[Path] = []

    def limit(pid: int) -> None:
        folder = top / f"flowkv-{secrets.token_hex(4)}"
        with _told_if_forbidden():
            folder.mkdir()
            made.append(folder)
            if has_v2:
                (folder / "cpu.max").write_text(f"{quota} {PERIOD_US}")
            else:
                (folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (folder / "cpu.cfs_quota_us").write_text(quota)
            (folder / "cgroup.procs").write_text(str(pid))

    if has_v2:
        with _told_if_forbidden():
            (CGROUPS / "cgroup.subtree_control").write_text("+cpu")
    try:
        yield limit
    finally:
        for folder in made:
            folder.rmdir()


@contextlib.contextmanager
def _told_if_forbidden() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BenchmarkFailed(f"a share of a core takes root and the `cpu` cgroups: {error}") from None
