"""Many attempts end together, in every phase and in any tick: nothing stays held, the next is served."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from flowkv_common.errors import Stale, Unavailable
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Cancel, PrefillRun, transfer_id
from flowkv_prefill import handoff
from tests.engineless import NUM_BLOCKS, Pair, engineless_pair
from tests.nats_server import NatsServer
from tests.waiting import until

NUM_PROMPTS = 12
NUM_ROUNDS = 60


@pytest.fixture
async def pair(nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pair]:
    """Reservations are renewed all the time, so that renewals are always on their way."""
    monkeypatch.setattr(handoff, "RENEW_S", 0.001)
    async with engineless_pair(nats_server, max_handoffs=3) as pair:
        yield pair


def tid_of(run: PrefillRun) -> str:
    return transfer_id(run.request_id, run.attempt)


class Storm:
    """Prompts that come, are computed, sent and handed over, while `strike` ends some of them at random."""

    def __init__(self, pair: Pair, seed: int) -> None:
        self.pair = pair
        self.random = random.Random(seed)
        self.runs: list[PrefillRun] = []

    async def rage(self) -> None:
        for _ in range(NUM_ROUNDS):
            for _ in range(self.random.randrange(NUM_PROMPTS - min(len(self.living()), NUM_PROMPTS) + 1)):
                await self.add()
            await self.let_run()
            self.act()
        self.pair.link.may_confirm.set()
        self.cancel(self.living())

    def living(self) -> list[PrefillRun]:
        sides = (self.pair.p, self.pair.d)
        return [run for run in self.runs if any(tid_of(run) in side.node.attempts for side in sides)]

    async def add(self) -> None:
        # Some need all blocks of a node, so that others wait for blocks.
        num_tokens = self.random.choice([1, 9, 30, 4 * NUM_BLOCKS - 1])
        run = self.pair.run(self.random.choices(range(100, 900), k=num_tokens), max_tokens=50)
        await self.pair.p.prefill.accept(run)
        self.runs.append(run)

    async def let_run(self) -> None:
        """Anything from one tick to some answers over NATS."""
        if self.random.random() < 0.5:
            for _ in range(self.random.randrange(4)):
                await asyncio.sleep(0)
        else:
            await self.pair.bus.nc.flush()

    def act(self) -> None:
        """What happens in one tick: steps, confirmations and cancels, in any order."""
        deeds = [
            lambda: self.pair.step(self.random.choice([4, 16, 1000])),
            self.pair.link.may_confirm.set,
            self.pair.link.may_confirm.clear,
            self.strike,
        ]
        for deed in self.random.sample(deeds, k=self.random.randrange(1, len(deeds) + 1)):
            deed()

    def strike(self) -> None:
        living = self.living()
        self.cancel(self.random.sample(living, k=self.random.randrange(len(living) + 1)))

    def cancel(self, runs: list[PrefillRun]) -> None:
        """At both nodes, in any order. The tasks learn of it in the same tick."""
        for run in runs:
            for side in self.random.sample([self.pair.p, self.pair.d], k=2):
                side.node.attempts.cancel(tid_of(run))

    async def end(self) -> None:
        """Raises AssertionError if anything is held, or the next prompt is not served."""
        pair = self.pair
        await pair.p.wait_idle()
        await pair.d.wait_idle()
        num_accepted = pair.d.num_sequences_accepted
        run = pair.run([5] * 20)
        await pair.p.prefill.accept(run)
        await pair.compute_all(8)
        await pair.d.wait_accepted(num_accepted + 1)
        self.cancel([run])
        await pair.p.wait_idle()
        await pair.d.wait_idle()


class GatewayLoss(Storm):
    def strike(self) -> None:
        for side in self.random.sample([self.pair.p, self.pair.d], k=2):
            side.node.attempts.cancel_gateway("g")

    async def end(self) -> None:
        """Keepalives find it gone a second time: what was on its way from node to node is dropped then."""
        await self.pair.settle()
        self.strike()
        await super().end()


class Wedge(Storm):
    """Of either node. The gateway, told so, cancels at the other."""

    def strike(self) -> None:
        side, other = self.random.sample([self.pair.p, self.pair.d], k=2)
        mine = [run for run in self.runs if tid_of(run) in side.node.attempts]
        for attempt in side.node.attempts:
            side.node.outbox.add_failure(attempt.gateway_id, attempt.transfer_id, Unavailable("wedged"))
            side.node.attempts.cancel(attempt.transfer_id, is_cut_off=True)
        for run in mine:
            other.node.attempts.cancel(tid_of(run))


@pytest.mark.parametrize("kind", [Storm, GatewayLoss, Wedge], ids=["clients", "gateway", "wedge"])
@pytest.mark.parametrize("seed", range(4))
async def test_nothing_is_held_after_a_storm(pair: Pair, kind: type[Storm], seed: int) -> None:
    storm = kind(pair, seed)
    await storm.rage()
    await storm.end()


@pytest.mark.parametrize("is_for_all", [False, True])
async def test_a_cancel_is_heard_on_both_subjects_and_wins_also_when_it_comes_first(
    pair: Pair, is_for_all: bool
) -> None:
    first, late = pair.run([5] * 20), pair.run([5] * 20)
    await pair.p.prefill.accept(first)
    for run in (first, late):
        tid = tid_of(run)
        subject = subjects.cancel(tid) if is_for_all else subjects.at(subjects.NODE_CANCEL, "p")
        await pair.bus.publish(subject, Cancel(transfer_id=tid, reason="test"))
    await until(lambda: not len(pair.p.node.attempts))
    await pair.bus.nc.flush()
    with pytest.raises(Stale):
        await pair.p.prefill.accept(late)
    await pair.p.wait_idle()
