"""Whole clusters of real processes, as `make up` starts them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flowkv.fork_server import ForkServer
from flowkv.local_cluster import Cluster

READY_TIMEOUT_S = 120.0
# A slow host takes long, and still refuses nobody.
SETTINGS = {"FLOWKV_TEST_HOOKS": "1", "FLOWKV_MAX_WAIT_S": "3600"}

StartCluster = Callable[..., Cluster]


@contextlib.contextmanager
def clusters(folder: Path, model_path: Path, fork_server: ForkServer) -> Iterator[StartCluster]:
    """Gives a function that starts clusters; they end with the context."""
    with contextlib.ExitStack() as started:
        numbers = itertools.count()

        def start(
            *,
            model: Path | None = None,
            settings: dict[str, str] | None = None,
            num_schedulers: int = 1,
            other_models: dict[str, str] | None = None,
            **nodes: int,
        ) -> Cluster:
            cluster = Cluster(
                folder / str(next(numbers)),
                str(model or model_path),
                nodes=nodes,
                num_schedulers=num_schedulers,
                model_name="test-model",
                other_models=other_models,
                settings={**SETTINGS, **(settings or {})},
                drain_timeout_s=15,
                fork_server=fork_server,
            )
            started.enter_context(cluster)
            cluster.wait_ready(READY_TIMEOUT_S)
            return cluster

        yield start


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """All nodes are forked from it: libraries are imported once."""
    with ForkServer(tmp_path_factory.mktemp("fork-server") / "log") as server:
        yield server


@pytest.fixture(scope="module")
def start_cluster(
    tmp_path_factory: pytest.TempPathFactory, model_path: Path, fork_server: ForkServer
) -> Iterator[StartCluster]:
    """Starts clusters that end with the module. Shows their logs when one does not get ready."""
    with clusters(tmp_path_factory.mktemp("clusters"), model_path, fork_server) as start:
        yield start


@pytest.fixture(scope="session")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, model_path: Path, fork_server: ForkServer
) -> Iterator[Cluster]:
    """One prefill and one decode node, handing over through shared memory: shared, so leave it as it was."""
    with clusters(tmp_path_factory.mktemp("shared"), model_path, fork_server) as start:
        yield start(prefill=1, decode=1)
