"""Several schedulers as processes on one server: one leads, whoever dies, stops, hangs or is cut off."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
from nats.aio.msg import Msg

from flowkv_common import errors
from flowkv_common.aio import running
from flowkv_common.bus.connection import Bus, connect
from flowkv_common.bus.service import Endpoint, Service
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Accepted, Assignment, encode
from flowkv_common.wire.nodes import SetPrefillCap
from tests.described_nodes import ReportingNode, is_assigned, reporting, request, schedule, until_answer
from tests.nats_server import NatsServer
from tests.scheduler_process import Process, scheduler_process
from tests.waiting import reconnected

TAKEOVER_S = 4.0
ASK_EVERY_S = 0.02
SILENCE_AFTER_S = 3.0  # of a node, whose reports a busy machine may delay
NODES = {"p0": "prefill", "d0": "decode"}
ORDERING = (str(Path(__file__).parents[1] / "ordering_scheduler.py"),)


async def states(bus: Bus, num_expected: int) -> list[tuple[str, int, int]]:
    """State, epoch and number of endpoints of each scheduler, as `nats micro` sees them; the leader first."""
    found: list[tuple[str, int, int]] = []
    complete = asyncio.Event()

    async def take(msg: Msg) -> None:
        info = json.loads(msg.data)
        metadata = info["metadata"]
        found.append((metadata["state"], int(metadata["epoch"]), len(info["endpoints"])))
        if len(found) == num_expected:
            complete.set()

    inbox = bus.nc.new_inbox()
    async with await bus.subscribe_raw(inbox, take):
        await bus.nc.publish("$SRV.INFO.scheduler", b"", reply=inbox)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await complete.wait()
    return sorted(found)


async def until_states(bus: Bus, *wanted: str, at_least: int = 1, timeout_s: float = 10.0) -> int:
    """Until the schedulers are in these states, and all know an epoch so high; returns the leader's."""
    async with asyncio.timeout(timeout_s):
        while True:
            found = await states(bus, len(wanted))
            epochs = {epoch for _, epoch, _ in found}
            if [state for state, _, _ in found] == sorted(wanted) and len(epochs) == 1:
                [epoch] = epochs
                if epoch >= at_least:
                    return epoch


class Asker:
    """A gateway under load: asks all the time, again when nobody answers; keeps what it got, with times."""

    def __init__(self, bus: Bus) -> None:
        self.answers: list[tuple[float, Assignment]] = []
        self._bus = bus
        self._news = asyncio.Event()

    async def run(self) -> None:
        clock = asyncio.get_running_loop().time
        small = request(num_prompt_tokens=1)  # choices count for a while: no node must be full of them
        while True:
            await asyncio.sleep(ASK_EVERY_S)
            try:
                answer = await schedule(self._bus, small, timeout_s=1.0)
            except (errors.Unavailable, errors.DeadlineExceeded):
                continue
            assert isinstance(answer, Assignment), answer  # a standby is warm: it never has to wait for nodes
            self.answers.append((clock(), answer))
            self._news.set()

    async def until(self, is_met: Callable[[Assignment], bool]) -> None:
        async with asyncio.timeout(10):
            while not (self.answers and is_met(self.answers[-1][1])):
                self._news.clear()
                await self._news.wait()

    def longest_pause_s(self) -> float:
        times = [at for at, _ in self.answers]
        return max(after - before for before, after in zip(times, times[1:], strict=False))

    def epochs(self) -> list[int]:
        return [answer.epoch for _, answer in self.answers]


class Listeners:
    """How many listen on the subject of schedule requests, as the server sees it, again and again."""

    def __init__(self, server: NatsServer) -> None:
        self.most = 0
        self._url = f"{server.monitor_url}/subsz?subs=1&test={subjects.SCHEDULE}"

    async def run(self) -> None:
        async with httpx.AsyncClient() as http:
            while True:
                found = (await http.get(self._url)).json().get("subscriptions_list", [])
                self.most = max(self.most, len(found))
                await asyncio.sleep(0.005)


async def num_replies(bus: Bus) -> int:
    """How many answer one schedule request; all have had the time to when all have said who they are."""
    replies: list[Msg] = []

    async def take(msg: Msg) -> None:
        replies.append(msg)

    inbox = bus.nc.new_inbox()
    async with await bus.subscribe_raw(inbox, take):
        await bus.nc.publish(subjects.SCHEDULE, encode(request()), reply=inbox)
        for _ in range(2):
            await states(bus, 2)
    return len(replies)


@contextlib.asynccontextmanager
async def two_schedulers(
    server: NatsServer, bus: Bus, *command: str
) -> AsyncIterator[tuple[Process, Process]]:
    """The one that leads, with two nodes to lead and all of it known, and the one that stands by."""
    async with (
        scheduler_process(server, *command) as leader,
        # With places for all that are chosen between two reports.
        reporting(
            *(
                ReportingNode(bus, name, role, period_s=SILENCE_AFTER_S / 3, max_num_seqs=1000)
                for name, role in NODES.items()
            )
        ),
    ):
        await until_answer(bus, is_assigned("p0", "d0"))
        async with scheduler_process(server, *command) as standby:
            await until_states(bus, "leader", "standby")
            yield leader, standby


async def test_killed_leader_is_replaced_under_load(nats_server: NatsServer) -> None:
    listeners = Listeners(nats_server)
    async with connect(nats_server.url, name="test") as bus, two_schedulers(nats_server, bus) as (leader, _):
        asker = Asker(bus)
        async with running(asker.run(), listeners.run()):
            await asker.until(lambda answer: answer.epoch == 1)
            leader.kill()
            await asker.until(lambda answer: answer.epoch == 2)
        assert asker.longest_pause_s() < TAKEOVER_S
        assert asker.epochs() == sorted(asker.epochs())
        assert await states(bus, 1) == [("leader", 2, 2)]
    assert listeners.most == 1


async def test_a_cordoned_node_gets_nothing_of_the_next_leader_either(nats_server: NatsServer) -> None:
    async with connect(nats_server.url, name="test") as bus, two_schedulers(nats_server, bus) as (leader, _):
        async with reporting(ReportingNode(bus, "p1", "prefill", ready=False, is_cordoned=True)):
            asker = Asker(bus)
            async with running(asker.run()):
                await asker.until(lambda answer: answer.epoch == 1)
                leader.kill()
                await asker.until(lambda answer: answer.epoch == 2)
                num_before = len(asker.answers)
                await asker.until(lambda _: len(asker.answers) >= num_before + 20)
        assert {answer.prefill.node_id for _, answer in asker.answers} == {"p0"}


async def test_leader_that_is_told_to_stop_hands_over_at_once(nats_server: NatsServer) -> None:
    listeners = Listeners(nats_server)
    async with connect(nats_server.url, name="test") as bus, two_schedulers(nats_server, bus) as (leader, _):
        asker = Asker(bus)
        async with running(asker.run(), listeners.run()):
            await asker.until(lambda answer: answer.epoch == 1)
            leader.send_signal(signal.SIGTERM)
            await asker.until(lambda answer: answer.epoch == 2)
        assert asker.longest_pause_s() < 1.0
        async with asyncio.timeout(10):
            assert await leader.wait() == 0
    assert listeners.most == 1


async def test_server_that_restarts_is_left_with_one_leader_of_a_higher_epoch(
    nats_server: NatsServer,
) -> None:
    async with connect(nats_server.url, name="test") as bus, two_schedulers(nats_server, bus):
        back = reconnected(bus)
        nats_server.kill()
        nats_server.start()
        async with asyncio.timeout(5):
            await back.wait()
        assert await until_states(bus, "leader", "standby", at_least=2) == 2
        assert await num_replies(bus) == 1
        await until_answer(bus, lambda answer: isinstance(answer, Assignment) and answer.epoch == 2)


async def test_of_two_that_start_together_one_listens(nats_server: NatsServer) -> None:
    listeners = Listeners(nats_server)
    async with connect(nats_server.url, name="test") as bus, running(listeners.run()):
        async with scheduler_process(nats_server), scheduler_process(nats_server):
            assert await until_states(bus, "leader", "standby") == 1
            assert [endpoints for _, _, endpoints in await states(bus, 2)] == [2, 0]
            assert await num_replies(bus) == 1
    assert listeners.most == 1


class FencedNode:
    """The cap endpoint of `d0`, as a node has it: an epoch older than the highest heard is refused."""

    def __init__(self) -> None:
        self.accepted: list[int] = []
        self.refused: list[int] = []
        self._news = asyncio.Event()

    async def set_cap(self, request: SetPrefillCap) -> Accepted:
        self._news.set()
        if self.accepted and request.epoch < max(self.accepted):
            self.refused.append(request.epoch)
            raise errors.Stale(f"epoch {request.epoch} is over")
        self.accepted.append(request.epoch)
        return Accepted(node_id="d0")

    async def until_accepted(self, epoch: int, num: int = 1) -> None:
        async with asyncio.timeout(10):
            while self.accepted.count(epoch) < num:
                self._news.clear()
                await self._news.wait()


async def test_leader_that_hangs_and_comes_back_gives_no_more_orders(nats_server: NatsServer) -> None:
    node = FencedNode()
    told: list[int] = []
    async with connect(nats_server.url, name="test") as bus:
        cap = Endpoint(subjects.at(subjects.NODE_CAP, "d0"), SetPrefillCap, node.set_cap)
        async with (
            Service(bus, name="node", version="0.1.0", service_id="d0", endpoints=[cap]),
            await bus.subscribe(subjects.assignment("*"), Assignment, lambda m: told.append(m.epoch)),
            two_schedulers(nats_server, bus, *ORDERING) as (leader, _),
        ):
            await node.until_accepted(1)
            leader.send_signal(signal.SIGSTOP)
            asker = Asker(bus)
            async with running(asker.run()):  # some of it waits in the socket of the one that hangs
                await node.until_accepted(2)
                await asker.until(lambda answer: answer.epoch == 2)
                leader.send_signal(signal.SIGCONT)
                assert await until_states(bus, "leader", "standby", at_least=2) == 2
                await node.until_accepted(2, node.accepted.count(2) + 2)  # two more ticks
            assert await num_replies(bus) == 1
    assert node.refused == []  # it has stepped down before it could send what is refused
    assert node.accepted == sorted(node.accepted)
    assert told == sorted(told)
    assert {1, 2} == set(told)
