"""Parties as processes on the same cores, of which only the one that is measured runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.engine.jobs import Job, line_of

_ROOT = Path(__file__).parents[2]


class PartyFailed(Exception):
    """An engine ended before it had answered."""


class PartyProcess:
    """Stopped by signal while others are measured, so that no thread of it spins."""

    def __init__(self, popen: subprocess.Popen[str], name: str) -> None:
        self.name = name
        self._popen = popen

    def wait_ready(self) -> None:
        self._answer()
        self._send(signal.SIGSTOP)

    def seconds(self, job: Job) -> float:
        """Raises PartyFailed."""
        self._send(signal.SIGCONT)
        assert self._popen.stdin is not None
        self._popen.stdin.write(line_of(job))
        self._popen.stdin.flush()
        answer = float(self._answer())
        self._send(signal.SIGSTOP)
        return answer

    def peak_bytes(self) -> int:
        """The largest resident memory so far of the process and of those it has started."""
        return sum(_peak_bytes(pid) for pid in _family(self._popen.pid))

    def _answer(self) -> Any:
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        if not line:
            raise PartyFailed(f"{self.name} ended with {self._popen.wait(60)}")
        return json.loads(line)

    def _send(self, number: signal.Signals) -> None:
        for pid in _family(self._popen.pid):
            os.kill(pid, number)


@contextmanager
def party(
    name: str, python: Path, model: str, num_threads: int, cores: list[int], log: Path, more: Sequence[str]
) -> Iterator[PartyProcess]:
    """The program `parties/<name>.py` on `cores`, with the interpreter `python`; it has begun to load.

    It gets `more` behind the arguments that all get.
    """
    module = f"benchmarks.engine.parties.{name}"
    own = python == Path(sys.executable)
    path = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "") if own else ""])
    with (
        log.open("ab") as errors,
        subprocess.Popen(
            [str(python), "-m", module, model, str(num_threads), *more],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=_ROOT,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(num_threads)},
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        ) as popen,
    ):
        try:
            yield PartyProcess(popen, name)
        finally:
            for pid in reversed(_family(popen.pid)):
                os.kill(pid, signal.SIGKILL)


def _family(pid: int) -> list[int]:
    """The process, its children, theirs, and so on."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    threads = list(Path(f"/proc/{pid}/task").glob("*/children")) if children.exists() else []
    found = [int(child) for thread in threads for child in thread.read_text().split()]
    return [pid, *(each for child in found for each in _family(child))]


def _peak_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    peaks = [line for line in lines if line.startswith("VmHWM:")]
    return int(peaks[0].split()[1]) << 10 if peaks else 0
