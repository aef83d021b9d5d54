"""A sender or a receiver dies, freezes, slows down or gives up, in each phase of a transfer of 184 MiB.

Each case leaves the survivor with its books in order, its guards unwritten and able to do the next transfer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from tests.certificates import trial_certificates
from tests.contract.fault_node import IO_TIMEOUT_S, NUM_USED
from tests.contract.fault_pair import (
    GRACE_S,
    PATIENCE_S,
    Pair,
    Peer,
    PeerError,
    SendEnd,
    Transfer,
    start_fork_server,
)
from tests.contract.fault_table import Row, write_table
from tests.contract.kv_nodes import NIXL, STAGED, STAGED_TCP

EXPIRY_S = 0.05
# Blocks of 1 MiB; and those of another transfer that is to be sent next.
NUM_SENT, NUM_FOLLOWING = NUM_USED - 8, 8
# A slow peer runs for the shorter of these, and then stands still for the longer, over and over.
RUNS_S, STANDS_S = 0.01, 0.08

IDLE, RESERVED, COPYING, LANDED, ACKED = PHASES = (
    "link open, nothing reserved",
    "reserved, no byte sent",
    "amid the copy",
    "all bytes landed, ack unseen",
    "ack seen, not committed",
)

Told = tuple[str, SendEnd | None]


class Pairs:
    """One pair of each kind, as it came out of the last case. A failed case takes its pair with it."""

    def __init__(self) -> None:
        self._idle: dict[str, Pair] = {}

    def take(self, kind: str) -> Pair:
        return self._idle.pop(kind, None) or Pair(kind)

    def give(self, pair: Pair) -> None:
        self._idle[pair.kind] = pair

    def leave(self) -> None:
        for pair in self._idle.values():
            pair.leave()


@pytest.fixture(scope="module")
def pairs() -> Iterator[Pairs]:
    trial_certificates()  # for all processes
    start_fork_server()
    made = Pairs()
    yield made
    made.leave()


@pytest.fixture(scope="module")
def rows() -> Iterator[list[Row]]:
    made: list[Row] = []
    yield made
    write_table(made)


@pytest.fixture
def pair(pairs: Pairs, kind: str) -> Iterator[Pair]:
    lent = pairs.take(kind)
    try:
        yield lent
        lent.transfer_works()
    except BaseException:
        lent.discard()
        raise
    pairs.give(lent)


# --- to the phase, and from it on -------------------------------------------------------------------


def bring_to(phase: str, pair: Pair) -> Transfer:
    """A transfer that is held in this phase until `go_on`; in the first phase, one that has nothing yet."""
    if phase == IDLE:
        return Transfer("nobody.1", "no token", list(range(1, 9)))
    transfer = pair.reserve(NUM_SENT)
    transfer.following = pair.reserve(NUM_FOLLOWING)
    if phase in (COPYING, LANDED):
        point = "copying" if phase == COPYING else "landed"
        pair.receiver.ask("hold_at", point)
        pair.send(transfer)
        pair.receiver.wait(point)
    if phase == ACKED:
        pair.send(transfer)
        assert pair.send_ended().event == "sent"
    return transfer


def go_on(phase: str, pair: Pair, transfer: Transfer) -> None:
    """What would have come next: the receiver goes on where it was held, or the sender begins."""
    if phase in (COPYING, LANDED):
        pair.receiver.open_gate()
    elif phase in (IDLE, RESERVED):
        pair.send(transfer)


def expire(pair: Pair, transfer: Transfer) -> None:
    """Returns when the timer has swept the reservation."""
    pair.receiver.ask("let_expire", transfer.transfer_id, EXPIRY_S)
    assert pair.receiver.wait("swept") == [transfer.transfer_id]


def settle(pair: Pair) -> None:
    """Returns when no copy can write into the receiver's pool, which is by its deadline."""
    pair.receiver.ask("settled", timeout_s=IO_TIMEOUT_S + GRACE_S)


def send_failed(pair: Pair) -> SendEnd:
    """The send ended by its deadline, as it has to."""
    end = pair.send_ended(timeout_s=IO_TIMEOUT_S + GRACE_S)
    assert end.event == "failed"
    assert end.took_s < IO_TIMEOUT_S + GRACE_S
    return end


# --- faults ----------------------------------------------------------------------------------------


def kill_sender(phase: str, pair: Pair, transfer: Transfer) -> Told:
    pair.sender.kill()
    if phase in (COPYING, LANDED):
        pair.receiver.open_gate()
    if phase != IDLE:
        assert transfer.following is not None
        expire(pair, transfer)
        expire(pair, transfer.following)
    settle(pair)
    return ("nothing to undo" if phase == IDLE else "reservation expired"), None


def kill_receiver(phase: str, pair: Pair, transfer: Transfer) -> Told:
    pair.receiver.kill()
    if phase in (IDLE, RESERVED):
        pair.send(transfer)
    end = None if phase == ACKED else send_failed(pair)
    return ("nobody to commit to" if phase == ACKED else "`TransferFailed`"), end


def freeze_sender(phase: str, pair: Pair, transfer: Transfer) -> Told:
    """Continued as soon as its reservation has expired; a copy under way has stood still meanwhile."""
    pair.sender.freeze()
    if phase == IDLE:
        assert not pair.receiver.has_said("landed", within_s=1.1 * IO_TIMEOUT_S)
        pair.sender.thaw()
        return "the link stands", None
    if phase == LANDED:
        pair.receiver.open_gate()
    expire(pair, transfer)
    if phase == COPYING:
        stop_the_copy(pair, transfer)
    return give_to_another(phase, pair, transfer)


def stop_the_copy(pair: Pair, transfer: Transfer) -> None:
    """Nobody gets the blocks before the copy has stopped, and it writes no byte after the expiry."""
    with pytest.raises(PeerError, match="OutOfBlocks"):
        pair.reserve(NUM_SENT)
    half_written = pair.receiver.ask("checksums", transfer.target)
    pair.sender.thaw()
    pair.receiver.open_gate()
    settle(pair)
    assert pair.receiver.ask("checksums", transfer.target) == half_written


def freeze_sender_for_long(phase: str, pair: Pair, transfer: Transfer) -> Told:
    """The receiver gives up the copy on its own."""
    pair.sender.freeze()
    pair.receiver.open_gate()
    expire(pair, transfer)
    settle(pair)
    return give_to_another(phase, pair, transfer)


def give_to_another(phase: str, pair: Pair, transfer: Transfer) -> Told:
    """Another request gets the blocks and writes them; only then the sender goes on."""
    other = pair.reserve(NUM_SENT)
    assert set(other.target) == set(transfer.target)
    written = pair.receiver.ask("overwrite", other.target)
    pair.sender.thaw()
    if phase == RESERVED:
        pair.send(transfer)
    end = None if phase == ACKED else pair.send_ended(timeout_s=IO_TIMEOUT_S + GRACE_S)
    assert phase != RESERVED or (end and end.event == "failed")
    with pytest.raises(PeerError, match="Stale"):
        pair.claim(transfer)
    settle(pair)
    assert pair.receiver.ask("checksums", other.target) == written
    pair.receiver.ask("cancel", other.transfer_id)
    confirmed = end is None or end.event == "sent"
    return ("commit refused" if confirmed else "`TransferFailed`, commit refused"), end


def freeze_receiver(phase: str, pair: Pair, transfer: Transfer) -> Told:
    """Continued after the sender has given up."""
    pair.receiver.freeze()
    if phase in (IDLE, ACKED):
        return freeze_receiver_before_control(phase, pair, transfer)
    go_on(phase, pair, transfer)
    end = send_failed(pair)
    assert end.took_s >= 0.9 * IO_TIMEOUT_S
    assert transfer.following is not None
    pair.send(transfer.following)  # it must not take late answers to the first for its own
    pair.receiver.thaw()
    pair.receiver.ask("cancel", transfer.transfer_id)
    settle(pair)
    return "`TransferFailed` at the deadline", end


def freeze_receiver_before_control(phase: str, pair: Pair, transfer: Transfer) -> Told:
    """Nothing flows: the next thing is a control message, which comes late, and then its cancel."""
    if phase == IDLE:
        with pytest.raises(PeerError, match="within"):
            pair.receiver.ask("reserve", "late.1", NUM_SENT, timeout_s=IO_TIMEOUT_S)
        pair.receiver.thaw()
        pair.receiver.wait("reply")
        pair.receiver.ask("cancel", "late.1")
        return "late reservation cancelled, the link stands", None
    arguments = (transfer.transfer_id, transfer.token)
    with pytest.raises(PeerError, match="within"):
        pair.receiver.ask("claim", *arguments, timeout_s=IO_TIMEOUT_S)
    pair.receiver.thaw()
    pair.receiver.ask("release", pair.receiver.wait("reply"))
    return "late commit cancelled", None


def abort(phase: str, pair: Pair, transfer: Transfer) -> Told:
    """The sender doesn't want it any more."""
    if phase == IDLE:
        pair.link()
        return "link closed and opened anew", None
    if phase in (RESERVED, ACKED):
        pair.claim(transfer)
        return "released", None
    pair.sender.ask("abort")
    end = pair.send_ended(timeout_s=GRACE_S)
    assert end.event == "aborted"
    assert transfer.following is not None
    pair.send(transfer.following)  # before the receiver has answered, or knows
    pair.receiver.open_gate()
    pair.receiver.ask("cancel", transfer.transfer_id)
    settle(pair)
    return "cancelled", end


def slow_sender(phase: str, pair: Pair, transfer: Transfer) -> Told:
    return slowly(pair.sender, phase, pair, transfer)


def slow_receiver(phase: str, pair: Pair, transfer: Transfer) -> Told:
    return slowly(pair.receiver, phase, pair, transfer)


def slowly(slow: Peer, phase: str, pair: Pair, transfer: Transfer) -> Told:
    go_on(phase, pair, transfer)
    give_up_at = time.monotonic() + PATIENCE_S
    has_ended = False
    while not has_ended:
        assert time.monotonic() < give_up_at
        slow.freeze()
        pair.sender.has_said("sent", "failed", within_s=STANDS_S)
        slow.thaw()
        has_ended = pair.sender.has_said("sent", "failed", within_s=RUNS_S)
    end = pair.send_ended()
    assert end.event == "sent", end
    pair.assert_arrived(transfer)
    pair.claim(transfer)
    return "arrived whole, committed", end


FAULTS: dict[str, Callable[[str, Pair, Transfer], Told]] = {
    "sender killed": kill_sender,
    "receiver killed": kill_receiver,
    "sender frozen past the expiry": freeze_sender,
    "sender frozen until the copy ends": freeze_sender_for_long,
    "receiver frozen past the deadline": freeze_receiver,
    "sender aborts": abort,
    "slow sender": slow_sender,
    "slow receiver": slow_receiver,
}
# Who is slow is slow in all phases, and in the others a receiver waits for nothing: once is enough.
ONLY_COPYING = ("slow sender", "slow receiver", "sender frozen until the copy ends")
# Those that take long, or show little that others don't.
LONG = [
    *((phase, fault) for phase in (IDLE, ACKED) for fault in FAULTS if "frozen" in fault),
    *((IDLE, fault) for fault in FAULTS),
    *((COPYING, fault) for fault in FAULTS if "slow" in fault),
]
LATER = [
    *(pytest.param(kind, marks=pytest.mark.full) for kind in ("tls", *STAGED_TCP)),
    *(pytest.param(kind, marks=[*NIXL.marks, pytest.mark.full]) for kind in ("nixl", *STAGED)),
]
CASES = [
    pytest.param(
        phase, fault, id=f"{fault}, {phase}", marks=[pytest.mark.full] if (phase, fault) in LONG else []
    )
    for phase in PHASES
    for fault in FAULTS
    if phase == COPYING or fault not in ONLY_COPYING
]


@pytest.mark.parametrize("kind", ["shm", "tcp", *LATER])
@pytest.mark.parametrize(("phase", "fault"), CASES)
def test_the_survivor_loses_no_block(pair: Pair, rows: list[Row], kind: str, phase: str, fault: str) -> None:
    transfer = bring_to(phase, pair)
    began = time.monotonic()
    outcome, end = FAULTS[fault](phase, pair, transfer)
    if transfer.following and "killed" not in fault:
        pair.finish(transfer.following)
    pair.check_living()
    rows.append(Row(phase, fault, kind, outcome, end.took_s if end else None, time.monotonic() - began))
    pair.replace_dead()
