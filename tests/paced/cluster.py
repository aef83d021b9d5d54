"""A cluster whose nodes are paced: NATS, scheduler and gateway are real processes, all nodes share one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flowkv.local_cluster import Cluster
from flowkv_common.bus.connection import connect
from flowkv_common.config import NodeSettings
from flowkv_common.wire import subjects
from flowkv_common.wire.nodes import LoadReport, StepFit
from tests.paced.engine import Kept
from tests.paced.nodes import paced_layout

ROOT = Path(__file__).resolve().parents[2]
READY_TIMEOUT_S = 60.0
NODES = "nodes"  # the process that has them all
MODEL_NAME = "paced"


def paced_settings(num_blocks: int, **settings: object) -> dict[str, str]:
    """Variables for all services: pools of `num_blocks`, and others by the names of their settings."""
    block_bytes = paced_layout(block_size=16).block_bytes
    return variables(kv_cache_bytes=num_blocks * block_bytes, test_hooks=True, **settings)


def node_settings(cluster: Cluster, model_path: Path | str, num_blocks: int, **settings: Any) -> NodeSettings:
    """Of nodes in the caller's process: pools of `num_blocks`, and others by their names."""
    return NodeSettings(
        nats_url=cluster.nats_url,
        model_path=str(model_path),
        model_name=MODEL_NAME,
        kv_cache_bytes=num_blocks * paced_layout(block_size=16).block_bytes,
        **settings,
    )


def variables(**settings: object) -> dict[str, str]:
    """Settings by their names, as the environment has them."""
    return {f"FLOWKV_{name.upper()}": _text(value) for name, value in settings.items()}


@contextlib.contextmanager
def services(
    run_dir: Path, model_path: Path | str, settings: Mapping[str, str] | None = None, **options: Any
) -> Iterator[Cluster]:
    """NATS, scheduler and gateway, without nodes. `options` are further ones of `Cluster`."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with Cluster(
        run_dir,
        str(model_path),
        nodes={},
        model_name=MODEL_NAME,
        settings={"PYTHONPATH": path, **(settings or {})},
        drain_timeout_s=15,
        **options,
    ) as cluster:
        yield cluster


@contextlib.contextmanager
def paced_cluster(
    run_dir: Path,
    model_path: Path | str,
    counts: Mapping[str, int],
    fit: StepFit,
    *,
    settings: Mapping[str, str] | None = None,
    link_byte_s: float = 0.0,
) -> Iterator[Cluster]:
    """A running cluster with `counts` paced nodes per role, all linked. When it has ended, ask `kept`.

    Raises ClusterError or TimeoutError when it does not get ready.
    """
    further = ["--kept", str(_kept_path(run_dir)), "--link-byte-s", str(link_byte_s)]
    command = nodes_command(counts, fit, *further)
    with services(run_dir, model_path, settings) as cluster:
        cluster.start_process(NODES, command)
        cluster.wait_ready(READY_TIMEOUT_S)
        asyncio.run(wait_linked(cluster.nats_url, sum(counts.values())))
        yield cluster


def nodes_command(counts: Mapping[str, int], fit: StepFit, *further: str) -> list[str]:
    """Of a process with `counts` paced nodes per role, and `further` options of it."""
    command = [sys.executable, "-m", "tests.paced.nodes"]
    for role, count in counts.items():
        command += [f"--{role}", str(count)]
    for name in fit.__struct_fields__:
        command += [f"--{name.replace('_', '-')}", str(getattr(fit, name))]
    return [*command, *further]


async def wait_linked(nats_url: str, num_nodes: int, timeout_s: float = READY_TIMEOUT_S) -> None:
    """Until so many nodes are ready and report a link to each of the others; raises TimeoutError."""
    linked: set[str] = set()
    all_linked = asyncio.Event()

    def look(report: LoadReport) -> None:
        if report.ready and report.num_links == num_nodes - 1:
            linked.add(report.node.node_id)
        if len(linked) == num_nodes:
            all_linked.set()

    async with connect(nats_url, name="paced") as bus, asyncio.timeout(timeout_s):
        async with await bus.subscribe(subjects.LOAD_ALL, LoadReport, look):
            await all_linked.wait()


def kept(run_dir: Path) -> dict[str, Kept]:
    """By node, how well a cluster that has ended kept its stated times."""
    return {node_id: Kept(**each) for node_id, each in json.loads(_kept_path(run_dir).read_text()).items()}


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _kept_path(run_dir: Path) -> Path:
    return run_dir / "kept.json"
