"""A process with a share of a core takes no more of it, and nothing is left of the limit."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import BenchmarkFailed
from benchmarks.clusters import cpu_s
from benchmarks.core_shares import CGROUPS, core_shares

SHARE = 0.25
# Its two threads have one share.
SPIN = """
import threading
spin = lambda: [None for _ in iter(int, 1)]
threading.Thread(target=spin).start()
spin()
"""


def limits() -> set[Path]:
    return {*CGROUPS.glob("flowkv-*"), *CGROUPS.glob("cpu/flowkv-*")}


def test_a_process_takes_its_share_of_a_core_and_no_more() -> None:
    before = limits()
    try:
        with core_shares(SHARE) as limit, subprocess.Popen([sys.executable, "-c", SPIN]) as process:
            try:
                limit(process.pid)
                began, took = time.monotonic(), cpu_s(process.pid)
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(1.0)
                share = (cpu_s(process.pid) - took) / (time.monotonic() - began)
            finally:
                process.kill()
    except BenchmarkFailed as error:
        pytest.skip(str(error))
    assert share < 1.5 * SHARE
    assert limits() == before
