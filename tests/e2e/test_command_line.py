"""What a person does: start a cluster, look at it, measure it, drain a node, find a frozen one, stop it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flowkv.local_cluster import free_port
from flowkv_node.cores import busy_cores
from tests.e2e.conftest import READY_TIMEOUT_S

COMMAND = (sys.executable, "-m", "flowkv")
TIMEOUT_S = 120.0
# Roles stay as they are told: a request is to be prefilled on one node and decoded on the other.
ENV = {**os.environ, "FLOWKV_LENDING": "false"}

pytestmark = pytest.mark.full


@contextlib.contextmanager
def up(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """`flowkv up` in this folder, from when it says that it is up. Killed at the end if it still runs."""
    command = [*COMMAND, "up", "--port", str(free_port())]
    process = subprocess.Popen(
        command, cwd=folder, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    watchdog = threading.Timer(READY_TIMEOUT_S + TIMEOUT_S, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("Stop it:"):
                break
        yield process
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


def test_a_persons_steps(tmp_path: Path) -> None:
    def flowkv(*arguments: str, status: int = 0) -> str:
        """In the folder of the cluster: it needs no URL."""
        done = subprocess.run(
            [*COMMAND, *arguments], cwd=tmp_path, env=ENV, text=True, capture_output=True, timeout=TIMEOUT_S
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout

    def found(*arguments: str, status: int = 0) -> list[dict[str, Any]]:
        report: dict[str, Any] = json.loads(flowkv("doctor", "--json", *arguments, status=status))
        return list(report["findings"])

    with up(tmp_path) as process:
        seen = json.loads(flowkv("status", "--json"))
        assert seen["pairs"] == [["prefill-0", "decode-0"]]
        assert [node["links"] for node in seen["nodes"]] == [{"decode-0": "shm"}, {"prefill-0": "shm"}]

        num_cores = os.cpu_count() or 1
        told = [
            (one["descriptor"]["num_cores"], one["descriptor"]["num_host_cores"]) for one in seen["nodes"]
        ]
        assert told == [(busy_cores(max(1, num_cores // 2)), num_cores)] * 2

        [proof] = [one for one in found() if one["about"] == "a request"]
        assert proof["level"] == "good"
        assert "prefill on prefill-0, decode on decode-0" in proof["said"]
        assert "of KV by shm" in proof["said"]

        short = ("--prompt-tokens", "32", "--max-tokens", "4", "--spread", "0")
        flowkv("bench", "--clients", "2", "--requests", "4", *short, "--json", "run.json")
        figures = json.loads((tmp_path / "run.json").read_text())["figures"]
        assert (figures["num_complete"], figures["itl_ms"]["num"]) == (4, 12)
        traced = json.loads(flowkv("trace", "--json", "--last", "4"))
        assert len(traced) == 4
        assert flowkv("chat", "Say hello.", "--max-tokens", "4").strip()

        flowkv("lend", "decode-0", "both")
        flowkv("drain", "decode-0")
        flowkv("resume", "decode-0")

        pid = seen["nodes"][0]["descriptor"]["pid"]
        os.kill(pid, signal.SIGSTOP)
        try:
            mends = [one["mend"] for one in found("--no-request", status=1) if one["level"] == "bad"]
            assert f"`kill -CONT {pid}`" in " ".join(mends)  # by the process, or by the silence of the node
        finally:
            os.kill(pid, signal.SIGCONT)

        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    assert said.count("200 length") >= 5  # a line per request
    assert said.index("draining gateway") < said.index("draining prefill-0") < said.index("stopped")
