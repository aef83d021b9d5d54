"""Reservations under any order of opening, copying, claiming, cancelling and time passing."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flowkv_common.errors import BadRequest, Stale
from flowkv_common.wire.messages import NodeRef
from flowkv_engine.kv.blocks import Blocks, OutOfBlocks
from flowkv_engine.kv.reservations import Reservation, Reservations

NUM_BLOCKS = 12
NODE = NodeRef(node_id="prefill-1", incarnation="a")
transfer_ids = st.sampled_from(["r.1", "r.2", "r.3"])


class ReservationsMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.blocks = Blocks(NUM_BLOCKS)
        self.reservations = Reservations(self.blocks, lambda: self.now)
        self.open: dict[str, Reservation] = {}
        self.copies: list[tuple[Reservation, ExitStack]] = []
        self.claimed: list[Reservation] = []

    @rule(transfer_id=transfer_ids, num_blocks=st.integers(1, 5), depth=st.integers(0, 4))
    def reserve(self, transfer_id: str, num_blocks: int, depth: int) -> None:
        hashes = [f"h{i}" for i in range(depth)]
        try:
            kept = self.reservations.reserve(transfer_id, num_blocks, hashes, [2, 3], 5.0)
        except Stale:
            assert transfer_id in self.open
        except OutOfBlocks:
            assert transfer_id not in self.open
        else:
            assert transfer_id not in self.open
            assert len(set(kept.block_ids)) == num_blocks
            assert kept.num_cached_blocks <= min(depth, num_blocks)
            self.open[transfer_id] = kept

    @rule(transfer_id=transfer_ids)
    def begin_copy(self, transfer_id: str) -> None:
        kept = self.open.get(transfer_id)
        if kept is None:
            with pytest.raises(Stale), self.reservations.copying(transfer_id, "", []):
                pass
            return
        stack = ExitStack()
        landing = self.reservations.copying(transfer_id, kept.token, kept.empty_block_ids)
        assert stack.enter_context(landing) is kept
        self.copies.append((kept, stack))

    @rule(transfer_id=transfer_ids, block=st.integers(0, NUM_BLOCKS - 1))
    def copy_elsewhere(self, transfer_id: str, block: int) -> None:
        kept = self.open.get(transfer_id)
        if kept and block not in kept.empty_block_ids:
            with pytest.raises(BadRequest), self.reservations.copying(transfer_id, kept.token, [block]):
                pass

    @precondition(lambda self: self.copies)
    @rule(data=st.data())
    def end_copy(self, data: st.DataObject) -> None:
        _, stack = self.copies.pop(data.draw(st.integers(0, len(self.copies) - 1)))
        stack.close()

    @rule(transfer_id=transfer_ids)
    def claim(self, transfer_id: str) -> None:
        kept = self.open.get(transfer_id)
        is_copying = any(copying is kept for copying, _ in self.copies)
        if kept is None or is_copying:
            with pytest.raises(Stale):
                self.reservations.claim(transfer_id, kept.token if kept else "")
            return
        assert self.reservations.claim(transfer_id, kept.token) is kept
        self.claimed.append(self.open.pop(transfer_id))

    @precondition(lambda self: self.claimed)
    @rule()
    def finish(self) -> None:
        done = self.claimed.pop()
        for i, block in enumerate(done.block_ids):
            self.blocks.commit(block, f"h{i}", f"h{i - 1}" if i else None)
        self.blocks.release(done.block_ids)

    @rule(transfer_id=transfer_ids)
    def cancel(self, transfer_id: str) -> None:
        self.reservations.cancel(transfer_id)
        self.open.pop(transfer_id, None)

    @rule(passed_s=st.sampled_from([1.0, 3.0]))
    def time_passes(self, passed_s: float) -> None:
        self.now += passed_s

    @rule(transfer_id=transfer_ids)
    def extend(self, transfer_id: str) -> None:
        kept = self.open.get(transfer_id)
        if kept is None:
            with pytest.raises(Stale):
                self.reservations.extend(transfer_id, "", 5.0)
            return
        assert self.reservations.extend(transfer_id, kept.token, 5.0) is kept
        assert kept.expires_at == self.now + 5.0

    @rule()
    def sweep(self) -> None:
        expired = {name for name, kept in self.open.items() if kept.expires_at <= self.now}
        assert set(self.reservations.sweep()) == expired
        for transfer_id in expired:
            del self.open[transfer_id]

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        self.blocks.check_integrity()
        assert self.reservations.num_open == len(self.open)
        holders = [*self.open.values(), *self.claimed]
        held = {block for kept in holders for block in kept.block_ids}
        under_copy = {block for kept, _ in self.copies if kept.revoked for block in kept.empty_block_ids}
        counts = self.blocks.counts()
        assert counts.leased == len(held)
        assert counts.quarantined == len(under_copy)
        assert not held & under_copy

    def teardown(self) -> None:
        for _, stack in self.copies:
            stack.close()
        assert self.blocks.counts().quarantined == 0
        self.blocks.check_integrity()


TestReservations = ReservationsMachine.TestCase
TestReservations.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
