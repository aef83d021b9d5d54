"""The processes of a cluster on one machine: started, watched and stopped."""

from __future__ import annotations

import contextlib
import ctypes
import json
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, Self

PR_SET_PDEATHSIG = 1


class ClusterError(Exception):
    """Something did not start; the message says what and shows the end of its log."""


class Child(Protocol):
    """A child of this process, as `subprocess.Popen` has it."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """As `poll`, once it has ended. Raises `subprocess.TimeoutExpired`."""

    def send_signal(self, sig: int) -> None:
        """Nothing if it has ended."""


class Process:
    """One service. It gets a session of its own, so that Ctrl-C reaches only the process that started it."""

    def __init__(self, name: str, child: Child, log_path: Path, log_begins_at: int) -> None:
        self.name = name
        self.pid = child.pid
        self.log_path = log_path
        self.log_begins_at = log_begins_at  # before it are those of former lives
        self.poll, self.wait, self.send_signal = child.poll, child.wait, child.send_signal

    @classmethod
    def start(
        cls,
        name: str,
        command: list[str],
        env: Mapping[str, str],
        log_path: Path,
        *,
        fds: tuple[int, ...] = (),
    ) -> Self:
        """Of open files it gets those of `fds` alone."""
        with log_path.open("ab") as log:
            log_begins_at = log.tell()
            child = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=fds,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        return cls(name, child, log_path, log_begins_at)

    @property
    def is_running(self) -> bool:
        return self.poll() is None

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.send_signal(signal.SIGKILL)
        self.wait(10)

    def stop(self, timeout_s: float) -> None:
        """SIGTERM, and SIGKILL if that does not help in time."""
        self.send_signal(signal.SIGTERM)
        try:
            self.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def log_tail(self, num_lines: int = 25) -> str:
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-num_lines:])

    def why_ended(self) -> str:
        """How it ended: the last error in its log, else the log's end; and where the log is."""
        lines = self.log_path.read_text(errors="replace").splitlines()
        reason = next(filter(None, map(_error_in, reversed(lines))), None) or self.log_tail()
        return f"{self.name} ended with {self.poll()}: {reason}\n(all it said is in {self.log_path})"


def _error_in(line: str) -> str | None:
    """The message of a line of a service's log, if it tells of an error."""
    if line.startswith("settings: "):
        return line
    try:
        entry = json.loads(line)
        return str(entry["message"]) if entry["level"] in ("error", "critical") else None
    except (ValueError, TypeError, KeyError):
        return None


def die_with_parent() -> None:
    """Linux: the kernel ends this process when its parent dies, even by SIGKILL."""
    with contextlib.suppress(OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
