"""`flowkv status` says what the bus says."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from flowkv_common.bus.connection import Bus
from tests.described_nodes import NUM_BLOCKS, ReportingNode
from tests.nats_server import NatsServer
from tests.played_cluster import played_cluster, run


async def test_what_runs(bus: Bus, nats_server: NatsServer, capsys: pytest.CaptureFixture[str]) -> None:
    p0 = ReportingNode(bus, "p0", "prefill", num_links=1, usual_connector="shm")
    d0 = ReportingNode(bus, "d0", "decode", num_links=1, usual_connector="tcp", num_running=3, free=64)
    async with played_cluster(bus, p0, d0):
        assert await run("status", "--nats", nats_server.url, "--json") == 0
        status = json.loads(capsys.readouterr().out)
        assert await run("status", "--nats", nats_server.url) == 0
        shown = capsys.readouterr().out
    assert status["pairs"] == [["p0", "d0"]]
    assert (status["leader"], status["regime"]) == ("scheduler-1", "normal")
    assert [node["links"] for node in status["nodes"]] == [{"d0": "shm"}, {"p0": "tcp"}]
    for said in ("p0", "d0", "3/16", f"75% of {NUM_BLOCKS}", "scheduler-1 leads", "http://127.0.0.1:8000"):
        assert said in shown


async def test_without_a_pair_it_ends_with_1(bus: Bus, nats_server: NatsServer) -> None:
    async with played_cluster(bus, ReportingNode(bus, "p0", "prefill")):
        assert await run("status", "--nats", nats_server.url) == 1


def test_a_url_that_is_none_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flowkv", "status"],
        env={**os.environ, "FLOWKV_NATS_URL_FILE": "/no/such/file"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "/no/such/file" in done.stderr
