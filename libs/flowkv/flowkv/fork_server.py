"""Forks nodes from one process that has imported what they need: torch, `transformers`, numba.

The imports take 4 s of a core and 500 MB. Nodes that are forked share the memory and import nothing.
`ForkServer` is the side of the process that starts them; `python -m flowkv.fork_server` is the other side.

A node is forked twice, so that the kernel makes it a child of the starter, its nearest subreaper. The starter
waits for it and signals it as it does its other children, and the end of the fork server ends no node. Before
the fork no thread runs and no device is in use: threads and CUDA contexts begin in the node.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from flowkv.processes import ClusterError, Process, die_with_parent

PR_SET_CHILD_SUBREAPER = 36
IMPORT_TIMEOUT_S = 300.0  # as long as a cluster may take to be ready: a starved host imports for minutes
FORK_TIMEOUT_S = 5.0  # it takes some 10 ms
ROOM_FOR_ARGUMENTS = 512  # bytes: a node's command line is written over the fork server's


class ForkServer:
    """A context manager. Nodes may outlive it."""

    def __init__(self, log_path: Path, env: Mapping[str, str] = os.environ) -> None:
        self._log_path = log_path
        self._env = dict(env)

    def __enter__(self) -> Self:
        self._connection, theirs = socket.socketpair()
        self._answers = self._connection.makefile("rb")
        self._has_imported = False
        fd = theirs.fileno()
        command = [sys.executable, "-m", "flowkv.fork_server", str(fd), " " * ROOM_FOR_ARGUMENTS]
        with theirs:
            self._process = Process.start("fork-server", command, self._env, self._log_path, fds=(fd,))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._answers.close()
        self._connection.close()
        self._process.kill()

    def suits(self, env: Mapping[str, str]) -> bool:
        """Whether a node with these variables can be forked: libraries have read theirs at import."""
        return _read_at_import(env) == _read_at_import(self._env)

    def fork(self, name: str, arguments: list[str], env: Mapping[str, str], log_path: Path) -> Process:
        """Starts `flowkv ARGUMENTS...`, which `ps` and `top` call `name`. Waits for the imports.

        Raises `ClusterError` if the fork server has ended or is silent, or the fork is no child of ours.
        """
        with log_path.open("ab") as log:
            log_begins_at = log.tell()
        order = {
            "name": name,
            "arguments": arguments,
            "env": dict(env),
            "log": str(log_path.resolve()),
            "folder": str(Path.cwd()),
            "parent": os.getpid(),
        }
        try:
            if not self._has_imported:
                self._next_answer(IMPORT_TIMEOUT_S)
                self._has_imported = True
            with _adopts_orphans():
                self._connection.sendall(_line(order))
                answer = self._next_answer(FORK_TIMEOUT_S)
        except (OSError, EOFError) as error:
            self._process.kill()
            raise ClusterError(
                f"{name} can't be forked ({error}): start the cluster again\n{self._process.why_ended()}"
            ) from None
        if "error" in answer:
            raise ClusterError(f"{name} can't be forked: {answer['error']}")
        return Process(name, Forked(answer["pid"]), log_path, log_begins_at)

    def _next_answer(self, timeout_s: float) -> dict[str, Any]:
        """Raises OSError, EOFError if the fork server has ended."""
        self._connection.settimeout(timeout_s)
        line = self._answers.readline()
        if not line:
            raise EOFError("it has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _read_at_import(env: Mapping[str, str]) -> dict[str, str]:
    """FLOWKV_CACHE says where numba keeps its code."""
    return {key: env[key] for key in env if not key.startswith("FLOWKV_") or key == "FLOWKV_CACHE"}


@contextlib.contextmanager
def _adopts_orphans() -> Iterator[None]:
    """Descendants of this process whose parents end become its children."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0)


class Forked:
    """A child that `subprocess` did not start."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._returncode: int | None = None

    def poll(self) -> int | None:
        if self._returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._returncode = os.waitstatus_to_exitcode(status)
        return self._returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.poll() is None:  # so the process id is still its own
            ended = os.pidfd_open(self.pid)
            try:
                poll = select.poll()
                poll.register(ended, select.POLLIN)
                poll.poll(None if timeout is None else timeout * 1000)
            finally:
                os.close(ended)
        returncode = self.poll()
        if returncode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return returncode

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)


# --- the process ---------------------------------------------------------------------------------


def main() -> int:
    """Forks a node for each order, until the starter has closed the connection."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    from flowkv import node

    node.set_variables()
    with contextlib.suppress(Exception):  # what is missing the nodes say, in their logs
        node.import_libraries()
    connection.sendall(_line({}))
    with connection, connection.makefile("rb") as orders:
        for line in orders:
            order = json.loads(line)
            if _is_fork(order["parent"], connection):
                break
        else:
            return 0
        try:
            _become(**order)
        finally:  # the starter sees the exit code
            connection.sendall(_line({"pid": os.getpid()}))
    from flowkv.__main__ import main as flowkv

    return flowkv()


def _is_fork(parent: int, connection: socket.socket) -> bool:
    """True in the fork, whose parent is `parent`. False in the fork server, which then waits for nothing.

    A fork that the kernel has given to another parent says so to the starter, and ends.
    """
    assert threading.active_count() == 1, threading.enumerate()  # they and their locks would be lost
    go_on, may_go_on = os.pipe()
    between = os.fork()
    if between == 0:
        if os.fork():
            os._exit(0)
        os.close(may_go_on)
        os.read(go_on, 1)  # until the process between has ended: from then on `parent` is the parent
        os.close(go_on)
        die_with_parent()
        if os.getppid() != parent:
            error = (
                f"the kernel gave it to process {os.getppid()}, not to {parent}, which starts it; "
                "start the services one by one: flowkv scheduler, gateway, prefill, decode"
            )
            connection.sendall(_line({"error": error}))
            os._exit(1)
        os.setsid()
        return True
    os.close(go_on)
    os.waitpid(between, 0)
    os.close(may_go_on)
    return False


def _become(name: str, arguments: list[str], env: dict[str, str], log: str, folder: str, **_: Any) -> None:
    """From here on this process is as if it had been started so."""
    for stream in (1, 2):
        opened = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.dup2(opened, stream)
        os.close(opened)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["flowkv", *arguments]
    Path("/proc/self/comm").write_text(name)
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin, end = int(fields[45]), int(fields[46])  # where the command line lies
    title = " ".join([sys.executable, "-m", *sys.argv]).encode()[: end - begin - 2]
    # A last byte other than NUL tells the kernel that the rest is one text.
    ctypes.memmove(begin, title.ljust(end - begin - 1, b"\0") + b".", end - begin)


if __name__ == "__main__":
    sys.exit(main())
