"""`flowkv cordon`, `drain`, `resume` and `lend` end when the node has done what it was told."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from flowkv_common.bus.connection import Bus
from flowkv_common.bus.service import Endpoint, Service
from flowkv_common.errors import BadRequest, DeadlineExceeded, NotFound
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Accepted
from flowkv_common.wire.nodes import Check, Checked, Cordon, Drain, ResumeNode, SetPrefillCap
from tests.described_nodes import BLOCK_SIZE, TOKEN_BUDGET, ReportingNode, report
from tests.nats_server import NatsServer
from tests.played_cluster import LEADER, played_cluster, run

ACCEPTED = Accepted(node_id="d0")


class ToldNode(ReportingNode):
    """Does what it is told, and reports it."""

    def __init__(self, bus: Bus) -> None:
        super().__init__(bus, "d0", "decode", num_running=2)
        self.told: list[Cordon | Drain | ResumeNode | SetPrefillCap] = []
        self.never_empties = False
        self.num_to_come = 0

    async def cordon(self, message: Cordon) -> Accepted:
        self.told.append(message)
        self.changes |= {"is_cordoned": True, "ready": False}
        return ACCEPTED

    async def drain(self, message: Drain) -> Accepted:
        self.told.append(message)
        left = {} if self.never_empties else {"num_running": 0}
        self.changes |= {"draining": True, "ready": False, **left}
        return ACCEPTED

    async def resume(self, message: ResumeNode) -> Accepted:
        self.told.append(message)
        self.changes |= {"draining": False, "is_cordoned": False, "ready": True}
        return ACCEPTED

    async def move(self, message: SetPrefillCap) -> Accepted:
        self.told.append(message)
        self.changes |= {"max_prefill_tokens_per_step": message.max_prefill_tokens_per_step}
        return ACCEPTED

    async def check(self, _: Check) -> Checked:
        """With each look one less is to come."""
        left, self.num_to_come = self.num_to_come, max(0, self.num_to_come - 1)
        described = report("d0", "decode")
        return Checked(node=described.node, blocks=described.blocks, num_requests=left, num_reservations=left)

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint(subjects.at(subjects.NODE_CHECK, "d0"), Check, self.check),
            Endpoint(subjects.at(subjects.NODE_CORDON, "d0"), Cordon, self.cordon),
            Endpoint(subjects.at(subjects.NODE_DRAIN, "d0"), Drain, self.drain),
            Endpoint(subjects.at(subjects.NODE_RESUME, "d0"), ResumeNode, self.resume),
            Endpoint(subjects.at(subjects.NODE_CAP, "d0"), SetPrefillCap, self.move),
        ]


@pytest.fixture
async def node(bus: Bus) -> AsyncIterator[ToldNode]:
    node = ToldNode(bus)
    service = Service(bus, name="told", version="1.0.0", service_id="d0", endpoints=node.endpoints())
    async with service, played_cluster(bus, node):
        yield node


async def test_drain_ends_when_the_node_is_empty_and_resume_takes_it_back(
    node: ToldNode, nats_server: NatsServer, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ("d0", "--nats", nats_server.url)
    assert await run("drain", *at, "--reason", "new fan") == 0
    assert node.told == [Drain(reason="new fan")]
    said = capsys.readouterr().out
    assert "d0 is empty" in said
    assert "flowkv resume d0" in said
    assert await run("resume", *at) == 0
    assert "takes new work" in capsys.readouterr().out
    node.never_empties = True
    node.changes["num_running"] = 2
    with pytest.raises(DeadlineExceeded, match="draining with 2 in hand"):
        await run("drain", *at, "--timeout", "0.3")


async def test_cordon_ends_while_the_node_still_works(
    node: ToldNode, nats_server: NatsServer, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ("d0", "--nats", nats_server.url)
    assert await run("cordon", *at, "--reason", "odd noise") == 0
    assert node.told == [Cordon(reason="odd noise")]
    assert "goes on with the 2 that it has" in capsys.readouterr().out
    await run("status", "--nats", nats_server.url)
    assert "cordoned" in capsys.readouterr().out
    assert await run("resume", *at) == 0
    assert node.changes["ready"]


async def test_drain_ends_when_nothing_comes_any_more(
    node: ToldNode, nats_server: NatsServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """It keeps room for prompts that other nodes compute: in no report, and lost if the node were stopped."""
    at = ("d0", "--nats", nats_server.url)
    node.num_to_come = 2
    assert await run("drain", *at) == 0
    assert node.num_to_come == 0
    assert "d0 is still needed by 2: their KV is yet to come" in capsys.readouterr().out
    node.num_to_come = 1_000_000
    with pytest.raises(DeadlineExceeded, match=r"not done within 0.3 s: d0 is still needed by \d+"):
        await run("drain", *at, "--timeout", "0.3")


@pytest.mark.parametrize(
    ("to", "budget", "serves"),
    [
        ("prefill", TOKEN_BUDGET, "serves prefill"),
        ("both", TOKEN_BUDGET // 2, "serves prefill and decode"),
        ("100", 100, "serves prefill and decode"),
    ],
)
async def test_lend(
    to: str,
    budget: int,
    serves: str,
    node: ToldNode,
    nats_server: NatsServer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert await run("lend", "d0", to, "--nats", nats_server.url) == 0
    [order] = node.told
    assert isinstance(order, SetPrefillCap)
    assert (order.max_prefill_tokens_per_step, order.epoch) == (budget, int(LEADER["epoch"]))
    said = capsys.readouterr().out
    assert serves in said
    assert f"it was {BLOCK_SIZE}" in said


async def test_who_is_not_there_and_what_is_no_side(node: ToldNode, nats_server: NatsServer) -> None:
    with pytest.raises(NotFound, match=r"no node 'd9': d0"):
        await run("drain", "d9", "--nats", nats_server.url)
    with pytest.raises(BadRequest, match=f"{BLOCK_SIZE} to {TOKEN_BUDGET}"):
        await run("lend", "d0", "sideways", "--nats", nats_server.url)
    assert node.told == []
