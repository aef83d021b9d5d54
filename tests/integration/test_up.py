"""`flowkv up` watches its processes: one that others can stand in for may end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flowkv.processes import ClusterError, Process
from flowkv.up import watch

FOREVER = ["sleep", "60"]


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[dict[str, Process]]:
    started: dict[str, Process] = {}
    names = ["nats", "scheduler-0", "scheduler-1", "prefill-0", "decode-0", "gateway"]
    for name in names:
        started[name] = Process.start(name, FOREVER, os.environ, tmp_path / f"{name}.log")
    alive = list(started.values())
    yield started
    for process in alive:
        process.kill()


@pytest.mark.parametrize(
    ("ended", "last"),
    [
        (["gateway"], "gateway"),
        (["nats"], "nats"),
        (["decode-0", "prefill-0"], "decode-0|prefill-0"),
        (["scheduler-1", "scheduler-0"], "scheduler-0|scheduler-1"),
        (["prefill-0", "scheduler-0", "gateway"], "gateway"),
    ],
)
def test_a_cluster_ends_with_what_nothing_stands_in_for(
    ended: list[str], last: str, processes: dict[str, Process]
) -> None:
    for name in ended:
        processes[name].kill()
    with pytest.raises(ClusterError, match=f"^({last}) was ended by SIGKILL"):
        watch(cast(Any, SimpleNamespace(processes=processes)))


def test_a_node_and_a_scheduler_may_end(
    processes: dict[str, Process], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("prefill-0", "scheduler-1"):
        processes[name].kill()
    looks = 0

    def look(_: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", look)
    with pytest.raises(KeyboardInterrupt):
        watch(cast(Any, SimpleNamespace(processes=processes)))
    said = capsys.readouterr().err
    assert said.count("the others go on") == 2
    assert "prefill-0 was ended by SIGKILL" in said
    assert sorted(processes) == ["decode-0", "gateway", "nats", "scheduler-0"]
