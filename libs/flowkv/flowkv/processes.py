"""The processes of a cluster on one machine: started, watched and stopped."""

from __future__ import annotations

import contextlib
import ctypes
import json
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

PR_SET_PDEATHSIG = 1
TRACEBACK = "Traceback (most recent call last):"
# What has most likely sent a signal.
SENT_BY = {
    signal.SIGKILL: "someone killed it, or the kernel did for want of memory, which `dmesg` tells",
    signal.SIGABRT: "compiled code gave up, and its log ends with what it said",
    signal.SIGBUS: "a file that it had mapped became shorter, or its disk is full",
    signal.SIGILL: "compiled code that this CPU can't run",
    signal.SIGSEGV: "a fault in compiled code",
}


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
        """How it ended and why, in a sentence, and where the log of all it said is."""
        status = self.poll()
        if status is not None and status < 0:  # what it said before is not the reason
            sent = signal.Signals(-status)
            how = f"was ended by {sent.name}: {SENT_BY.get(sent, 'someone sent it')}"
        else:
            with self.log_path.open("rb") as log:
                log.seek(self.log_begins_at)
                lines = log.read().decode(errors="replace").splitlines()
            how = f"ended with {status}: {_last_error(lines) or 'its log does not say why'}"
        return f"{self.name} {how}\n(all it said is in {self.log_path})"


def _last_error(lines: Sequence[str]) -> str:
    """The last of a log's lines of errors and of its tracebacks; else the last line of what is no service."""
    plain = ""
    for i, line in reversed(list(enumerate(lines))):
        entry = _log_entry(line)
        if entry is None:
            if line.startswith("settings: "):
                return line
            frame, is_traceback, _ = line.partition(TRACEBACK)  # in a group of exceptions a frame is drawn
            if is_traceback:
                said = (one.removeprefix(frame) for one in lines[i + 1 :] if one.startswith(frame))
                return next((one for one in said if one and not one.startswith(" ")), plain)
            plain = plain or line.strip()
        elif entry.get("level") in ("error", "critical"):
            return str(entry.get("message"))
    return plain


def _log_entry(line: str) -> dict[str, Any] | None:
    """Of a line of a service's log; None for another line."""
    with contextlib.suppress(ValueError):
        entry = json.loads(line)
        if isinstance(entry, dict):
            return entry
    return None


def die_with_parent() -> None:
    """Linux: the kernel ends this process when its parent dies, even by SIGKILL."""
    with contextlib.suppress(OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
