"""The scheduler that leads dies amid streams of the real model; the one that stands by takes over."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx

from flowkv.local_cluster import Cluster
from flowkv.processes import Process
from flowkv_common.wire import subjects
from tests.e2e.conftest import StartCluster
from tests.e2e.load import stream_completion
from tests.e2e.observer import observe
from tests.e2e.test_faults import Load, check_finished

TAKEOVER_S = 4.0
NUM_RUNNING, NUM_NEW = 3, 2
NODES = ("prefill-0", "decode-0")


def leader_of(cluster: Cluster) -> Process:
    schedulers = [process for name, process in cluster.processes.items() if name.startswith("scheduler")]
    assert len(schedulers) == 2
    [leader] = [process for process in schedulers if "leads, epoch" in process.log_tail()]
    return leader


async def test_killed_scheduler_costs_no_stream_and_new_ones_little(
    start_cluster: StartCluster, model_path: Path
) -> None:
    cluster = start_cluster(prefill=1, decode=1, num_schedulers=2)
    async with (
        httpx.AsyncClient(base_url=cluster.url, timeout=120) as http,
        observe(cluster.nats_url) as observer,
    ):
        finished = await observer.events(subjects.event("request_finished", "*"))
        assigned = await observer.events(subjects.assignment("*"))
        async with asyncio.TaskGroup() as tasks:
            running = Load(http, tasks, num=NUM_RUNNING)
            await running.wait_under_way()
            leader_of(cluster).kill()
            new = [
                tasks.create_task(stream_completion(http, [100, 200, 300 + i], max_tokens=32))
                for i in range(NUM_NEW)
            ]
            streams = await running.results()
        check_finished(model_path, streams + [task.result() for task in new])
        events = await finished.wait_for_all(NUM_RUNNING + NUM_NEW)
        assert [event["attempts"] for event in events] == [1] * (NUM_RUNNING + NUM_NEW)
        waits_s = sorted(event["phases_s"]["schedule"] for event in events)
        assert 0.5 < waits_s[-1] < TAKEOVER_S  # they did have to wait for another leader
        epochs = [assignment["epoch"] for assignment in await assigned.wait_for_all(NUM_RUNNING + NUM_NEW)]
        assert epochs == [1] * NUM_RUNNING + [2] * NUM_NEW
        await observer.wait_idle(NODES)
