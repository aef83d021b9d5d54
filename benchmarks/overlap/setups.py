"""The clusters that are compared, and how their nodes are kept on their cores."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from flowkv.local_cluster import Cluster

_READY_TIMEOUT_S = 180.0
_DRAIN_TIMEOUT_S = 40.0
CHUNK_TOKENS = 512


class NotPinned(Exception):
    """A node has threads on cores that are not its own: its times would say nothing."""


@dataclass(frozen=True)
class Setup:
    """`cores` says for each role on how many cores its one node runs; a core belongs to one node."""

    name: str
    title: str
    cores: dict[str, int]
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def hands_over(self) -> bool:
        return "prefill" in self.cores

    @property
    def num_cores(self) -> int:
        return sum(self.cores.values())


_SPLIT = {"prefill": 1, "decode": 1}
# A mixed node's chunk is half of its token budget: with twice the budget all setups cut prompts alike.
_MIXED = {"FLOWKV_TOKEN_BUDGET": str(2 * CHUNK_TOKENS)}

# No chunk keeps such a goal, so no prompt stays on the idle decode node; nor is that lent.
_APART = {"FLOWKV_ITL_GOAL_S": "0.000001", "FLOWKV_LENDING": "false"}

SETUPS = (
    Setup("off", "P + D, overlap off", _SPLIT, {**_APART, "FLOWKV_OVERLAP_TRANSFER": "false"}),
    Setup("on", "P + D, overlap on", _SPLIT, {**_APART, "FLOWKV_OVERLAP_TRANSFER": "true"}),
    Setup("mixed-1", "colocated, 1 core", {"mixed": 1}, _MIXED),
    Setup("mixed-2", "colocated, 2 cores", {"mixed": 2}, _MIXED),
)


@contextlib.contextmanager
def cluster_of(setup: Setup, run_dir: Path, model_path: str, connector: str) -> Iterator[Cluster]:
    """A running cluster. Raises ClusterError when it does not start, NotPinned when a thread has strayed.

    NATS, scheduler, gateway and client run where the kernel puts them.
    """
    free_cores = sorted(os.sched_getaffinity(0))
    settings = {
        "FLOWKV_CONNECTORS": connector,
        "FLOWKV_NUM_THREADS": str(max(setup.cores.values())),
        "FLOWKV_TOKEN_BUDGET": str(CHUNK_TOKENS),
        **setup.settings,
    }
    with Cluster(
        run_dir,
        model_path,
        nodes={},
        model_name="overlap",
        settings=settings,
        drain_timeout_s=_DRAIN_TIMEOUT_S,
    ) as cluster:
        pinned: dict[int, set[int]] = {}
        for role, num_cores in setup.cores.items():
            mine, free_cores = set(free_cores[:num_cores]), free_cores[num_cores:]
            pid = cluster.start_node(role, f"{role}-0").pid
            os.sched_setaffinity(pid, mine)  # before it has threads: they inherit it
            pinned[pid] = mine
        cluster.wait_ready(_READY_TIMEOUT_S)
        for pid, mine in pinned.items():
            check_pinned(pid, mine)
        yield cluster


def check_pinned(pid: int, cores: set[int]) -> None:
    """Raises NotPinned if a thread of the process may run on any other core."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        actual = os.sched_getaffinity(int(thread.name))
        if not actual <= cores:
            raise NotPinned(
                f"a thread of process {pid} may run on {sorted(actual)}, not on {sorted(cores)} alone"
            )
