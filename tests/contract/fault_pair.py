"""A sender and a receiver, each a process that can be killed, frozen and continued, seen from the test."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.contract import fault_node

# For what must come, however busy the machine is.
PATIENCE_S = 20.0
# Beyond its deadline, for a sender to get a processor and to tell.
GRACE_S = 1.0

_seeds = itertools.count(1)
_processes = multiprocessing.get_context("forkserver")


def start_fork_server() -> None:
    """Processes are then forks of one that has imported torch already: milliseconds instead of seconds."""
    _processes.set_forkserver_preload([fault_node.__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the server doesn't get `sys.path` otherwise
        forkserver.ensure_running()


class PeerError(Exception):
    """What was asked of the process was refused there, or it has gone."""


class Peer:
    """One process of `fault_node`."""

    def __init__(self, kind: str) -> None:
        self._pipe, pipe = _processes.Pipe()
        gate, self._gate = _processes.Pipe(duplex=False)
        self._process = _processes.Process(target=fault_node.run, args=(kind, next(_seeds), pipe, gate))
        self._process.start()
        pipe.close()
        gate.close()
        self._events: deque[tuple[str, Any]] = deque()
        self.num_descriptors: int | None = None  # once it had its first transfer
        self.address = str(self.wait("listening"))

    def ask(self, method: str, *arguments: object, timeout_s: float = PATIENCE_S) -> Any:
        """Calls a method of the `FaultNode`. Raises `PeerError`."""
        try:
            self._pipe.send((method, arguments))
        except OSError as error:
            raise PeerError(f"gone: {error}") from error
        name, value = self._first({"reply", "error"}, timeout_s)
        if name == "error":
            raise PeerError(value)
        return value

    def wait(self, name: str, timeout_s: float = PATIENCE_S) -> Any:
        """The detail of the next event of this name. Raises `PeerError` if none comes."""
        return self._first({name}, timeout_s)[1]

    def first(self, *names: str, timeout_s: float = PATIENCE_S) -> tuple[str, Any]:
        """The first event with one of these names, and its detail. Raises `PeerError` if none comes."""
        return self._first(set(names), timeout_s)

    def has_said(self, *names: str, within_s: float) -> bool:
        """Whether one of these events comes; it stays to be waited for."""
        try:
            found = self._first(set(names), within_s)
        except PeerError:
            return False
        self._events.appendleft(found)
        return True

    def open_gate(self) -> None:
        """Lets go on what is held at a point, now or when it runs again."""
        self._gate.send_bytes(b"go")

    def freeze(self) -> None:
        """Returns when the kernel has stopped all threads."""
        os.kill(self._pid, signal.SIGSTOP)
        give_up_at = time.monotonic() + PATIENCE_S
        while not self._is_stopped():
            assert time.monotonic() < give_up_at, "not stopped"
            os.sched_yield()

    def thaw(self) -> None:
        os.kill(self._pid, signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.join(PATIENCE_S)
        assert self._process.exitcode == -signal.SIGKILL

    def leave(self) -> int | None:
        """Ends the process in good order; its exit code."""
        self._pipe.close()
        self._process.join(PATIENCE_S)
        return self._process.exitcode

    def discard(self) -> None:
        """Ends the process, whatever state it is in."""
        self._process.kill()
        self._process.join(PATIENCE_S)
        self._pipe.close()
        self._gate.close()

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    @property
    def _pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def _is_stopped(self) -> bool:
        threads = Path(f"/proc/{self._pid}/task").glob("*/stat")
        return all(thread.read_text().rpartition(")")[2].split()[0] == "T" for thread in threads)

    def _first(self, names: set[str], timeout_s: float) -> tuple[str, Any]:
        for kept in self._events:
            if kept[0] in names:
                self._events.remove(kept)
                return kept
        give_up_at = time.monotonic() + timeout_s
        while self._pipe.poll(max(0.0, give_up_at - time.monotonic())):
            try:
                event: tuple[str, Any] = self._pipe.recv()
            except (EOFError, OSError) as error:
                raise PeerError("gone") from error
            if event[0] in names:
                return event
            self._events.append(event)
        raise PeerError(f"no {' or '.join(sorted(names))} within {timeout_s:.1f} s")

    def forget_events(self) -> None:
        """What came before doesn't count any more."""
        while self._pipe.poll():
            self._pipe.recv()
        self._events.clear()


@dataclass
class Transfer:
    """One transfer of a pair, from the reservation on."""

    transfer_id: str
    token: str
    target: list[int]
    source: list[int] = field(default_factory=list)
    following: Transfer | None = None  # reserved as well, to be sent next over the same link


class SendEnd(NamedTuple):
    """`event` is `sent`, `failed` or `aborted`."""

    event: str
    took_s: float
    reason: str


class Pair:
    """A linked sender and receiver. Those who survive one fault stay for the next."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.receiver = Peer(kind)
        self.sender = Peer(kind)
        self._numbers = itertools.count(1)
        self.link()

    def link(self) -> None:
        self.sender.ask("connect", self.receiver.address)

    def check_living(self) -> None:
        """Raises `PeerError` unless the books and guards of all that live are as at the start."""
        for peer in (self.receiver, self.sender):
            if peer.is_alive:
                peer.ask("check")

    def replace_dead(self) -> None:
        """New processes for those that were killed, linked with those that were not."""
        if self.receiver.is_alive and self.sender.is_alive:
            return
        self.receiver = self._living(self.receiver)
        self.sender = self._living(self.sender)
        self.link()

    def _living(self, peer: Peer) -> Peer:
        if peer.is_alive:
            return peer
        peer.discard()
        return Peer(self.kind)

    def reserve(self, num_blocks: int) -> Transfer:
        transfer_id = f"r{next(self._numbers)}.1"
        token, target = self.receiver.ask("reserve", transfer_id, num_blocks)
        return Transfer(transfer_id, token, target)

    def send(self, transfer: Transfer) -> None:
        transfer.source = self.sender.ask("send", transfer.transfer_id, transfer.token, transfer.target)

    def send_ended(self, timeout_s: float = PATIENCE_S) -> SendEnd:
        """How the send under way ends. Raises `PeerError` if it doesn't within this time."""
        event, detail = self.sender.first("sent", "failed", "aborted", timeout_s=timeout_s)
        took_s, reason = detail
        return SendEnd(event, took_s, reason)

    def claim(self, transfer: Transfer) -> None:
        """Commits, and gives the blocks back. Raises `PeerError` if it is refused."""
        blocks = self.receiver.ask("claim", transfer.transfer_id, transfer.token)
        self.receiver.ask("release", blocks)

    def assert_arrived(self, transfer: Transfer) -> None:
        sent = self.sender.ask("checksums", transfer.source)
        arrived = self.receiver.ask("checksums", transfer.target)
        assert [sent[block] for block in transfer.source] == [arrived[block] for block in transfer.target]

    def finish(self, transfer: Transfer) -> None:
        """Sends if that has not begun, sees all bytes arrive, commits and gives the blocks back."""
        if not transfer.source:
            self.send(transfer)
        end = self.send_ended()
        assert end.event == "sent", end
        self.assert_arrived(transfer)
        self.claim(transfer)

    def transfer_works(self) -> None:
        """One whole transfer; afterwards both sides' books and guards are as at the start."""
        self.finish(self.reserve(8))
        self.check_living()
        for peer in (self.receiver, self.sender):
            peer.forget_events()
            if peer.num_descriptors is None:
                peer.num_descriptors = peer.ask("num_descriptors")

    def leave(self) -> None:
        """Ends both in good order. They hold as many open files as at first."""
        for peer in (self.receiver, self.sender):
            assert peer.ask("num_descriptors") == peer.num_descriptors
        assert (self.sender.leave(), self.receiver.leave()) == (0, 0)

    def discard(self) -> None:
        self.sender.discard()
        self.receiver.discard()
