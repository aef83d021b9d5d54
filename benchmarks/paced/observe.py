"""What a cluster does while it is under load: prefill caps as nodes report them, memory of its processes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

import psutil

from flowkv.local_cluster import Cluster
from flowkv_common.aio import running
from flowkv_common.bus.connection import connect
from flowkv_common.wire import subjects
from flowkv_common.wire.nodes import LoadReport, StepFit

_PERIOD_S = 1.0


@dataclass(frozen=True)
class CapSeen:
    """A node's prefill cap, `at_s` seconds after the watch began: its first one, then each new one."""

    at_s: float
    node_id: str
    cap: int


@dataclass
class Observed:
    """`rss_bytes`: by process, once a second. `fits`: by node, as it reported last."""

    caps: list[CapSeen] = field(default_factory=list)
    rss_bytes: dict[str, list[int]] = field(default_factory=dict)
    fits: dict[str, StepFit] = field(default_factory=dict)

    @property
    def num_cap_moves(self) -> int:
        return len(self.caps) - len({seen.node_id for seen in self.caps})


@contextlib.asynccontextmanager
async def observing(cluster: Cluster) -> AsyncIterator[Observed]:
    """Until the context ends. The times of `Observed` begin with it."""
    observed, began = Observed(), time.monotonic()
    latest: dict[str, int] = {}

    def look(report: LoadReport, _: object) -> None:
        node_id, cap = report.node.node_id, report.max_prefill_tokens_per_step
        if latest.get(node_id) != cap:
            latest[node_id] = cap
            observed.caps.append(CapSeen(round(time.monotonic() - began, 2), node_id, cap))
        if report.step is not None:
            observed.fits[node_id] = report.step

    pids = {name: process.pid for name, process in cluster.processes.items()}
    async with connect(cluster.nats_url, name="bench-observe") as bus:
        async with await bus.subscribe(subjects.LOAD_ALL, LoadReport, look):
            async with running(_sample(pids, observed)):
                yield observed


async def _sample(pids: Mapping[str, int], observed: Observed) -> None:
    processes = {name: psutil.Process(pid) for name, pid in pids.items()}
    while True:
        for name, process in processes.items():
            observed.rss_bytes.setdefault(name, []).append(process.memory_info().rss)
        await asyncio.sleep(_PERIOD_S)
