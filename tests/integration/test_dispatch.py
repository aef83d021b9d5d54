"""A request's life at the gateway, over a real NATS, with nodes whose every word the test decides."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import pytest
from nats.aio.msg import Msg

from flowkv_common.aio import running
from flowkv_common.bus import client as client_module
from flowkv_common.bus import connection
from flowkv_common.bus.connection import Bus, connect
from flowkv_common.bus.registry import keep_announced
from flowkv_common.bus.service import Endpoint, Service
from flowkv_common.config import NatsSettings
from flowkv_common.errors import (
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    FlowKVError,
    Full,
    Internal,
    NotFound,
    Stale,
    TooLarge,
    TransferFailed,
    Unavailable,
    WrongModel,
)
from flowkv_common.fingerprint import block_hashes
from flowkv_common.timeline import timeline
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import (
    Accepted,
    Assignment,
    Cancel,
    FindFinished,
    FinishedRequests,
    Keepalive,
    KeepaliveReply,
    ModelFiles,
    NodeRef,
    NodeSeen,
    NodesSeen,
    PrefillRun,
    ReadyReply,
    ReadyRequest,
    RequestFinished,
    Resume,
    Resumed,
    SamplingParams,
    ScheduleRequest,
    StepTokens,
    TokenChunk,
    TokenIds,
    Wait,
    decode,
    transfer_id,
)
from flowkv_gateway import dispatch as dispatch_module
from flowkv_gateway import readiness
from flowkv_gateway.cluster import ModelNodes, OwnModel
from flowkv_gateway.dispatch import Dispatch, Load, open_dispatch
from flowkv_gateway.errors import ContextLengthExceeded
from flowkv_gateway.request_state import RequestState
from flowkv_gateway.tenants import Tenant, Tenants
from tests.described_nodes import BLOCK_SIZE, MODEL, descriptor, report
from tests.nats_server import NatsServer
from tests.nats_users import server_with_users

OWN = OwnModel(ModelFiles())
P, D, E, F = (NodeRef(node_id=name, incarnation="1") for name in "pdef")
Behaviour = Callable[["Nodes", PrefillRun], Awaitable[None]]


@pytest.fixture(autouse=True)
def short_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a request's last attempt."""
    monkeypatch.setattr(dispatch_module, "LAST_ATTEMPT_PAUSE_S", 0.02)


class Nodes:
    """Scheduler, prefill and decode in one: does with each attempt what the test says, and takes notes."""

    def __init__(self, bus: Bus, attempts: list[Behaviour]) -> None:
        self.bus = bus
        self.asked: list[ScheduleRequest] = []
        self.runs: list[PrefillRun] = []
        self.cancelled: list[str] = []  # at the prefill node
        self.cancelled_at: list[tuple[str, str]] = []  # subject and attempt, of all cancels there are
        self.left: list[str] = []  # of these the attempts that go on elsewhere
        self.finished: list[RequestFinished] = []
        self.waits: list[Wait] = []
        self.needs_hashes = False
        self.promised_first_token_in_s: float | None = None
        self.doubted: list[NodeRef] = []
        self.num_told = 0  # how often the gateway was told of them
        self.decode = D
        self.resumable: dict[str, list[int]] = {}
        self.max_resumed = 100  # tokens in one answer
        self.num_resumed = 0
        self.resume_hangs = False
        self.news = asyncio.Event()
        self.num_hanging = 0  # of the first schedule requests: not answered until `hung` is set
        self.hung = asyncio.Event()
        self.no_move: Wait | asyncio.Event | None = None  # the answer to what runs, or when it comes
        self._attempts = attempts

    async def schedule(self, request: ScheduleRequest) -> Assignment | Wait:
        self.take_note(self.asked, request)
        if isinstance(self.no_move, asyncio.Event) and request.runs_on:
            await self.no_move.wait()
        elif isinstance(self.no_move, Wait) and request.runs_on:
            return self.no_move
        if len(self.asked) <= self.num_hanging:
            await self.hung.wait()
        if self.needs_hashes and not request.block_hashes:
            return Wait(retry_in_s=0.01, reason="the gateway doesn't know the nodes yet")
        if self.waits:
            return self.waits.pop(0)
        return Assignment(
            request_id=request.request_id,
            attempt=request.attempt,
            epoch=1,
            prefill=P,
            decode=self.decode,
            reason="the only pair",
            prefill_candidates=[],
            decode_candidates=[],
            promised_first_token_in_s=self.promised_first_token_in_s,
        )

    async def ready(self, request: ReadyRequest) -> ReadyReply:
        self.num_told += bool(self.doubted)
        self.news.set()
        return ReadyReply(epoch=1, doubted=self.doubted)

    async def prefill(self, run: PrefillRun) -> Accepted:
        self.runs.append(run)
        await self._attempts[run.attempt](self, run)
        return Accepted(node_id="p")

    async def resume(self, request: Resume) -> Resumed:
        if self.resume_hangs:
            self.num_resumed += 1
            self.news.set()
            await self.hung.wait()
        if request.transfer_id not in self.resumable:
            raise NotFound("not here")
        self.num_resumed += 1
        output = self.resumable[request.transfer_id]
        end = request.from_index + self.max_resumed
        finish_reason = "length" if end >= len(output) else None
        token_ids = output[request.from_index : end]
        return Resumed(chunk=chunk(request.transfer_id, request.from_index, token_ids, finish_reason))

    async def send(self, run: PrefillRun, *chunks: TokenChunk, node_id: str = "d") -> None:
        await self.bus.publish(
            subjects.tokens(run.gateway_id), StepTokens(node_id=node_id, chunks=list(chunks))
        )

    def take_note(self, notes: list[Any], note: Any) -> None:
        notes.append(note)
        self.news.set()

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                self.news.clear()
                await self.news.wait()


def chunk(tid: str, index: int, token_ids: list[int], finish_reason: str | None = None) -> TokenChunk:
    return TokenChunk(transfer_id=tid, index=index, token_ids=token_ids, finish_reason=finish_reason)


def failure(tid: str, error: FlowKVError) -> TokenChunk:
    return TokenChunk(transfer_id=tid, index=0, token_ids=[], error=error.to_wire())


def tid_of(run: PrefillRun) -> str:
    return transfer_id(run.request_id, run.attempt)


@contextlib.asynccontextmanager
async def cluster(nats_server: NatsServer, *attempts: Behaviour) -> AsyncIterator[tuple[Dispatch, Nodes]]:
    async with (
        connect(nats_server.url, name="nodes") as bus,
        open_dispatch(nats_server.url, [ModelNodes(OWN)]) as dispatch,
    ):
        nodes = Nodes(bus, list(attempts))
        endpoints = [
            Endpoint(subjects.SCHEDULE, ScheduleRequest, nodes.schedule),
            Endpoint(subjects.SCHEDULER_READY, ReadyRequest, nodes.ready),
            Endpoint(subjects.at(subjects.PREFILL_RUN, "p"), PrefillRun, nodes.prefill),
            Endpoint(subjects.at(subjects.DECODE_RESUME, "d"), Resume, nodes.resume),
        ]

        async def note_cancel(msg: Msg) -> None:
            cancel = decode(msg.data, Cancel)
            if cancel.goes_on:
                nodes.left.append(cancel.transfer_id)
            nodes.take_note(nodes.cancelled_at, (msg.subject, cancel.transfer_id))

        async with (
            Service(bus, name="nodes", version="0.1.0", service_id="nodes", endpoints=endpoints),
            await bus.subscribe(
                subjects.at(subjects.NODE_CANCEL, "p"),
                Cancel,
                lambda c: nodes.take_note(nodes.cancelled, c.transfer_id),
            ),
            await bus.subscribe_raw("flowkv.v1.*.cancel.>", note_cancel),
            await bus.subscribe(
                subjects.event("request_finished", "*"),
                RequestFinished,
                lambda event: nodes.take_note(nodes.finished, event),
            ),
        ):
            yield dispatch, nodes


def new_request(deadline_s: float = 10.0) -> RequestState:
    return RequestState("r", [1, 2, 3], SamplingParams(max_tokens=4, seed=1), deadline_s, "f")


def of_tenant(name: str, tenant: Tenant) -> RequestState:
    request = new_request()
    request.request_id, request.tenant = name, tenant
    return request


async def collect_rest(chunks: AsyncIterator[TokenChunk]) -> list[int]:
    return tokens([chunk async for chunk in chunks])


async def collect(dispatch: Dispatch, one: RequestState | None = None) -> list[TokenChunk]:
    return [chunk async for chunk in dispatch.generate(one or new_request())]


def tokens(chunks: list[TokenChunk]) -> list[int]:
    return [token_id for chunk in chunks for token_id in chunk.token_ids]


async def answer(nodes: Nodes, run: PrefillRun) -> None:
    """All that is missing of the output 10, 11, 12, 13."""
    first = len(run.output_ids)
    for index in range(first, 4):
        await nodes.send(run, chunk(tid_of(run), index, [10 + index], "length" if index == 3 else None))


async def test_one_attempt(nats_server: NatsServer) -> None:
    async with cluster(nats_server, answer) as (dispatch, nodes):
        chunks = await collect(dispatch)
        assert tokens(chunks) == [10, 11, 12, 13]
        assert chunks[-1].finish_reason == "length"
        await nodes.wait_for(lambda: bool(nodes.finished))
        event = nodes.finished[0]
        assert (event.outcome, event.attempts, event.num_output_tokens) == ("length", 1, 4)
        assert (event.prefill_node, event.decode_node) == ("p", "d")
        assert set(event.phases_s) >= {"schedule", "ttft", "decode", "total"}
        await dispatch._bus.nc.flush()
        assert nodes.cancelled_at == []  # it has ended by itself
        assert dispatch.streams == {}
        assert nodes.asked[0].block_hashes == []  # no node is known


@pytest.mark.parametrize(("decode", "told"), [(D, ["d", "p"]), (P, ["p"])], ids=["pair", "one node"])
async def test_a_cancel_goes_to_the_pair_alone(
    nats_server: NatsServer, decode: NodeRef, told: list[str]
) -> None:
    """The client goes; the same where one node is the pair is one message."""

    async def begin(nodes: Nodes, run: PrefillRun) -> None:
        await nodes.send(run, chunk(tid_of(run), 0, [10]))

    async with cluster(nats_server, begin) as (dispatch, nodes):
        nodes.decode = decode
        chunks = dispatch.generate(new_request())
        await anext(chunks)
        await chunks.aclose()
        await nodes.wait_for(lambda: len(nodes.cancelled_at) >= len(told))
        await nodes.bus.nc.flush()
        expected = [(subjects.at(subjects.NODE_CANCEL, node_id), "r.0") for node_id in told]
        assert sorted(nodes.cancelled_at) == expected


@pytest.mark.usefixtures("told_often")
async def test_a_request_runs_on_the_pair_that_is_named(nats_server: NatsServer) -> None:
    async def answer_when_doubted(nodes: Nodes, run: PrefillRun) -> None:
        await nodes.wait_for(lambda: nodes.num_told >= 3)
        answering.append(asyncio.create_task(answer_late(nodes, run)))

    async def answer_late(nodes: Nodes, run: PrefillRun) -> None:
        num_told = nodes.num_told
        await nodes.wait_for(lambda: nodes.num_told >= num_told + 3)  # it could leave them by now
        await answer(nodes, run)

    answering: list[asyncio.Task[None]] = []

    async def fail(nodes: Nodes, run: PrefillRun) -> None:
        await nodes.send(run, failure(tid_of(run), TransferFailed("d: no link")), node_id="p")

    async with cluster(nats_server, answer_when_doubted) as (dispatch, nodes):
        nodes.doubted = [P, D]
        request = new_request()
        await dispatch.run_on(request, P, D)
        assert (request.output_ids, request.outcome) == ([10, 11, 12, 13], "length")
        assert (nodes.asked, len(nodes.runs), dispatch.load(dispatch.cluster.models[0]).num_waiting) == (
            [],
            1,
            0,
        )
    async with cluster(nats_server, fail, answer) as (dispatch, nodes):
        with pytest.raises(TransferFailed, match="no link"):
            await dispatch.run_on(new_request(), P, D)
        await nodes.wait_for(lambda: len(nodes.cancelled_at) == 2)
        assert (len(nodes.runs), dispatch.streams, dispatch.load(dispatch.cluster.models[0])) == (
            1,
            {},
            Load(0, 0, 0.0),
        )


async def test_live_pairs_are_those_of_ready_nodes(nats_server: NatsServer) -> None:
    """Of any model: a node of another one is no pair with these."""
    other = descriptor("x", "mixed", model=msgspec.structs.replace(MODEL, fingerprint="other"))
    async with cluster(nats_server) as (dispatch, nodes):
        dispatch.on_nodes(
            {
                node.node.node_id: node
                for node in (descriptor("p", "prefill"), descriptor("d", "decode"), other)
            }
        )
        assert dispatch.live_pairs() == []
        for load in (report("p", "prefill"), report("d", "decode"), report("x", "mixed")):
            dispatch.on_report(load)
        found = [(prefill.node.node_id, decode.node.node_id) for prefill, decode in dispatch.live_pairs()]
        assert found == [("p", "d"), ("x", "x")]
        dispatch.on_report(report("d", "decode", ready=False, is_cordoned=True))
        assert [decode.node.node_id for _, decode in dispatch.live_pairs()] == ["x"]


async def test_wait_is_obeyed_and_asked_again_with_age(nats_server: NatsServer) -> None:
    async with cluster(nats_server, answer) as (dispatch, nodes):
        nodes.waits = [Wait(retry_in_s=0.05, reason="full"), Wait(retry_in_s=0.05, reason="full")]
        assert tokens(await collect(dispatch)) == [10, 11, 12, 13]
        ages = [request.age_s for request in nodes.asked]
        assert len(ages) == 3
        assert ages == sorted(ages)
        assert ages[2] >= 0.1


async def test_scheduler_that_hangs_is_asked_again_and_its_late_answer_is_dropped(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch_module, "SCHEDULE_TIMEOUT_S", 0.2)
    async with cluster(nats_server, answer) as (dispatch, nodes):
        nodes.num_hanging = 1
        chunks = asyncio.create_task(collect(dispatch))
        await nodes.wait_for(lambda: len(nodes.asked) == 2)
        nodes.hung.set()  # as one that was stopped and goes on
        assert tokens(await chunks) == [10, 11, 12, 13]
        assert [request.attempt for request in nodes.asked] == [0, 0]
        assert [run.attempt for run in nodes.runs] == [0]


async def test_of_two_schedulers_that_answer_the_first_is_believed(nats_server: NatsServer) -> None:
    async with connect(nats_server.url, name="other") as bus:
        other = Nodes(bus, [])
        endpoint = Endpoint(subjects.SCHEDULE, ScheduleRequest, other.schedule)
        async with (
            Service(bus, name="scheduler", version="0.1.0", service_id="other", endpoints=[endpoint]),
            cluster(nats_server, answer) as (dispatch, nodes),
        ):
            assert tokens(await collect(dispatch)) == [10, 11, 12, 13]
            await other.wait_for(lambda: len(other.asked) == 1)
            assert (len(nodes.asked), len(nodes.runs)) == (1, 1)
            assert nodes.cancelled == []


async def test_failed_attempt_goes_on_with_what_it_has(nats_server: NatsServer) -> None:
    async def fail_after_two(nodes: Nodes, run: PrefillRun) -> None:
        await nodes.send(run, chunk(tid_of(run), 0, [10]), node_id="p")
        await nodes.send(run, chunk(tid_of(run), 1, [11]))
        await nodes.send(run, failure(tid_of(run), Unavailable("stuck")), node_id="d")

    async with cluster(nats_server, fail_after_two, answer) as (dispatch, nodes):
        assert tokens(await collect(dispatch)) == [10, 11, 12, 13]
        assert nodes.runs[1].output_ids.unpack() == [10, 11]
        assert (nodes.asked[1].attempt, nodes.asked[1].avoid) == (1, ["d"])
        assert nodes.asked[1].num_prompt_tokens == 5
        assert [request.num_output_tokens for request in nodes.asked] == [0, 2]
        await nodes.wait_for(lambda: nodes.cancelled == ["r.0"])
        await nodes.wait_for(lambda: bool(nodes.finished))
        first, second = nodes.finished[0].attempt_times
        assert (first.why_ended, second.why_ended) == ("stuck", "")
        assert first.last_token_s is not None
        assert second.began_s == first.ended_s >= first.last_token_s
        assert [span.name for span in timeline(nodes.finished[0]) if span.name == "lost"] == ["lost"]


async def test_the_last_attempt_waits_until_a_scheduler_knows_who_died(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host with several nodes dies: two of them are chosen one after the other before any is missed."""
    monkeypatch.setattr(dispatch_module, "LAST_ATTEMPT_PAUSE_S", 0.3)
    began: list[float] = []

    async def fail(nodes: Nodes, run: PrefillRun) -> None:
        began.append(asyncio.get_running_loop().time())
        await nodes.send(run, failure(tid_of(run), Unavailable("it has died")))

    async def answer_later(nodes: Nodes, run: PrefillRun) -> None:
        began.append(asyncio.get_running_loop().time())
        await answer(nodes, run)

    async with cluster(nats_server, fail, fail, answer_later) as (dispatch, nodes):
        assert tokens(await collect(dispatch)) == [10, 11, 12, 13]
        assert [request.attempt for request in nodes.asked] == [0, 1, 2]
    assert began[2] - began[1] >= 0.3


async def test_what_has_ended_can_be_asked_for(nats_server: NatsServer) -> None:
    async def ask(bus: Bus, wanted: FindFinished) -> list[str]:
        found = await bus.request(subjects.FINISHED, wanted, FinishedRequests, timeout_s=5)
        return [event.request_id for event in found.requests]

    async with cluster(nats_server, answer) as (dispatch, nodes):
        assert await ask(nodes.bus, FindFinished()) == []
        for name in ("one", "two", "three"):
            request = new_request()
            request.request_id = name
            await collect(dispatch, request)
        assert await ask(nodes.bus, FindFinished(last=2)) == ["three", "two"]
        assert await ask(nodes.bus, FindFinished(request_id="one")) == ["one"]
        assert await ask(nodes.bus, FindFinished(request_id="four")) == []
        await nodes.wait_for(lambda: len(nodes.finished) == 3)
        found = await nodes.bus.request(subjects.FINISHED, FindFinished(), FinishedRequests, timeout_s=5)
        assert found.requests == nodes.finished[2:]


@pytest.fixture
def told_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gateways hear of doubted nodes, and ask, every few milliseconds."""
    for module in (dispatch_module, readiness):
        monkeypatch.setattr(module, "READY_PERIOD_S", 0.005)


def slowly(next_decode: NodeRef) -> Behaviour:
    """One token comes when the gateway knows which nodes are doubted, then none. `next_decode`: the node that
    the next attempt gets."""

    async def run_slowly(nodes: Nodes, run: PrefillRun) -> None:
        num_told = nodes.num_told
        await nodes.wait_for(lambda: nodes.num_told >= num_told + 3)
        nodes.decode = next_decode
        await nodes.send(run, chunk(tid_of(run), len(run.output_ids), [10 + len(run.output_ids)]))

    return run_slowly


@pytest.mark.usefixtures("told_often")
async def test_a_sequence_leaves_a_doubted_node_and_goes_on_with_what_it_has(nats_server: NatsServer) -> None:
    async with cluster(nats_server, slowly(E), answer) as (dispatch, nodes):
        nodes.doubted = [D]
        assert tokens(await collect(dispatch)) == [10, 11, 12, 13]
        asked = [(one.attempt, one.runs_on, one.avoid, one.num_output_tokens) for one in nodes.asked]
        assert asked == [(0, "", [], 0), (1, "d", ["d"], 1)]
        assert nodes.asked[1].age_s == 0.0
        assert nodes.asked[1].overdue_s > 0.0
        await nodes.wait_for(lambda: len(nodes.cancelled_at) == 2 and bool(nodes.finished))
        assert {tid for _, tid in nodes.cancelled_at} == {"r.0"}
        assert nodes.left == ["r.0", "r.0"]
        assert (nodes.finished[0].attempts, nodes.finished[0].decode_node) == (2, "e")


@pytest.mark.usefixtures("told_often")
@pytest.mark.parametrize("answers", [True, False])
async def test_a_sequence_goes_on_where_it_is_until_the_scheduler_knows_better(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    monkeypatch.setattr(dispatch_module, "MOVE_TIMEOUT_S", 0.02)

    async def run_on(nodes: Nodes, run: PrefillRun) -> None:
        await slowly(E)(nodes, run)
        answering.append(asyncio.create_task(answer_when_asked(nodes, run)))

    async def answer_when_asked(nodes: Nodes, run: PrefillRun) -> None:
        await nodes.wait_for(lambda: len(nodes.asked) == 2)
        nodes.doubted = []
        await answer(nodes, msgspec.structs.replace(run, output_ids=TokenIds.of([10])))
        nodes.hung.set()

    answering: list[asyncio.Task[None]] = []
    async with cluster(nats_server, run_on) as (dispatch, nodes):
        nodes.doubted = [D]
        nodes.no_move = (
            Wait(retry_in_s=0.5, reason="it would take longer elsewhere") if answers else nodes.hung
        )
        assert tokens(await collect(dispatch)) == [10, 11, 12, 13]
        assert [one.runs_on for one in nodes.asked] == ["", "d"]
        assert (len(nodes.runs), nodes.left) == (1, [])


@pytest.mark.usefixtures("told_often")
async def test_a_request_moves_twice_and_its_failures_count_apart(nats_server: NatsServer) -> None:
    async def fail(nodes: Nodes, run: PrefillRun) -> None:
        raise Unavailable("draining")

    async def fail_later(nodes: Nodes, run: PrefillRun) -> None:
        await slowly(D)(nodes, run)
        await nodes.send(run, failure(tid_of(run), Unavailable("stuck")))

    async with cluster(nats_server, slowly(E), slowly(F), fail_later, fail, answer) as (dispatch, nodes):
        nodes.doubted = [D, E, F]
        assert tokens(await collect(dispatch)) == [10, 11, 12, 13]
        assert [one.runs_on for one in nodes.asked] == ["", "d", "e", "", ""]
        assert [one.avoid for one in nodes.asked[:3]] == [[], ["d"], ["d", "e"]]


@pytest.mark.usefixtures("told_often")
async def test_a_prompt_without_a_token_leaves_a_doubted_prefill_node(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch_module, "SILENCE_S", 0.4)  # it is looked for four times as often
    async with cluster(nats_server, accept, answer) as (dispatch, nodes):
        nodes.doubted = [P]
        assert tokens(await collect(dispatch)) == [10, 11, 12, 13]
        moves = [(one.attempt, one.runs_on, one.avoid, one.gap_s) for one in nodes.asked if one.runs_on]
        assert moves == [(1, "d", ["p"], 0.0)]


async def test_the_scheduler_is_told_the_hashes_of_all_that_an_attempt_computes(
    nats_server: NatsServer,
) -> None:
    async def fail_after_two(nodes: Nodes, run: PrefillRun) -> None:
        await nodes.send(run, chunk(tid_of(run), 0, [10, 11]), node_id="p")
        await nodes.send(run, failure(tid_of(run), Unavailable("stuck")), node_id="p")

    prompt_ids = list(range(31))
    async with cluster(nats_server, fail_after_two, answer) as (dispatch, nodes):
        nodes.needs_hashes = True
        known = keep_announced(nodes.bus, lambda: descriptor("p", "prefill"))
        async with asyncio.timeout(10), running(known):
            await collect(dispatch, RequestState("r", prompt_ids, SamplingParams(max_tokens=4), 10.0, "f"))
        told = [request.block_hashes for request in nodes.asked if request.block_hashes]
        assert told == [
            block_hashes("f", prompt_ids, BLOCK_SIZE),
            block_hashes("f", [*prompt_ids, 10, 11], BLOCK_SIZE),
        ]
        assert [len(hashes) for hashes in told] == [1, 2]


async def test_prefill_that_could_not_hand_over_blames_decode(nats_server: NatsServer) -> None:
    async def cant_reach_decode(nodes: Nodes, run: PrefillRun) -> None:
        await nodes.send(run, failure(tid_of(run), TransferFailed("d: gone")), node_id="p")

    async with cluster(nats_server, cant_reach_decode, answer) as (dispatch, nodes):
        assert tokens(await collect(dispatch)) == [10, 11, 12, 13]
        assert nodes.asked[1].avoid == ["d"]


async def test_three_attempts_are_all(nats_server: NatsServer) -> None:
    async def fail(nodes: Nodes, run: PrefillRun) -> None:
        raise Unavailable("draining")

    async with cluster(nats_server, fail, fail, fail) as (dispatch, nodes):
        with pytest.raises(Unavailable):
            await collect(dispatch)
        assert [request.attempt for request in nodes.asked] == [0, 1, 2]
        assert nodes.asked[2].avoid == ["p"]
        await nodes.wait_for(lambda: bool(nodes.finished))
        assert (nodes.finished[0].outcome, nodes.finished[0].error) == ("error", "draining")


async def test_who_gets_no_pair_is_not_tried_again(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch_module, "SCHEDULER_PATIENCE_S", 0.5)
    async with (
        connect(nats_server.url, name="test") as bus,
        open_dispatch(nats_server.url, [ModelNodes(OWN)]) as dispatch,
    ):
        told: asyncio.Queue[RequestFinished] = asyncio.Queue()
        finished = subjects.event("request_finished", "*")
        async with await bus.subscribe(finished, RequestFinished, told.put):
            with pytest.raises(Unavailable):  # nobody schedules
                await collect(dispatch)
            async with asyncio.timeout(5):
                event = await told.get()
        assert event.attempts == 1
        assert event.phases_s["schedule"] >= 0.5


async def test_what_was_foreseen_first_is_told_at_the_end(nats_server: NatsServer) -> None:
    async with cluster(nats_server, answer) as (dispatch, nodes):
        nodes.waits = [
            Wait(retry_in_s=0.05, reason="full", first_token_in_s=seconds) for seconds in (7.0, 5.0)
        ]
        assert tokens(await collect(dispatch)) == [10, 11, 12, 13]
        async with asyncio.timeout(5):
            while not nodes.finished:
                nodes.news.clear()
                await nodes.news.wait()
        assert 7.0 <= nodes.finished[0].predicted_ttft_s < 8.0


async def test_schedulers_are_told_how_nodes_kept_their_promise(nats_server: NatsServer) -> None:
    async def keep_silent_for_a_while(nodes: Nodes, run: PrefillRun) -> None:
        answering.append(asyncio.create_task(answer_when_seen(nodes, run)))

    async def answer_when_seen(nodes: Nodes, run: PrefillRun) -> None:
        await nodes.wait_for(lambda: any(one.prompt_stall_s > 0.0 for one in seen))
        await nodes.send(run, chunk(tid_of(run), 0, [10]), node_id="p")
        await answer(nodes, msgspec.structs.replace(run, output_ids=TokenIds.of([10])))

    seen: list[NodeSeen] = []
    answering: list[asyncio.Task[None]] = []
    async with cluster(nats_server, keep_silent_for_a_while) as (dispatch, nodes):
        nodes.promised_first_token_in_s = 0.01

        def note(message: NodesSeen) -> None:
            for one in message.nodes:
                nodes.take_note(seen, one)

        async with await nodes.bus.subscribe(subjects.SEEN_ALL, NodesSeen, note):
            assert tokens(await collect(dispatch)) == [10, 11, 12, 13]
            await nodes.wait_for(lambda: sum(one.num_gaps for one in seen) == 2)
    came = [one for one in seen if one.num_prompts]
    assert [(one.node, one.promised_s) for one in came] == [(P, 0.01)]
    assert came[0].taken_s > 0.01
    assert {one.node for one in seen if one.num_gaps} == {D}


async def test_patience_does_not_begin_anew_with_each_pair_that_fails(nats_server: NatsServer) -> None:
    async def dawdle_and_fail(nodes: Nodes, run: PrefillRun) -> None:
        await asyncio.sleep(1.0)  # the time that a prompt may wait at a node is no time of asking
        nodes.waits = [Wait(retry_in_s=0.1, reason="full")]
        raise Unavailable("draining")

    async with cluster(nats_server, dawdle_and_fail, answer) as (dispatch, nodes):
        nodes.waits = [Wait(retry_in_s=0.1, reason="full")]
        assert tokens(await collect(dispatch)) == [10, 11, 12, 13]
        ages = [(request.attempt, request.age_s) for request in nodes.asked]
        assert [attempt for attempt, _ in ages] == [0, 0, 1, 1]
        assert ages[2][1] >= ages[1][1] >= 0.1
        assert ages[2][1] < 1.0
        assert ages[3][1] >= 0.2


async def test_all_attempts_name_the_model_they_began_with(nats_server: NatsServer) -> None:
    async def refuse(nodes: Nodes, run: PrefillRun) -> None:
        raise WrongModel("p serves another model")

    async with cluster(nats_server, refuse, refuse, refuse) as (dispatch, nodes):
        with pytest.raises(Unavailable):
            await collect(dispatch)
        asked = [(request.fingerprint, request.avoid) for request in nodes.asked]
        assert asked == [("f", []), ("f", ["p"]), ("f", ["p"])]
        assert [run.fingerprint for run in nodes.runs] == ["f"] * 3


async def test_what_another_attempt_cannot_mend_is_not_tried_again(nats_server: NatsServer) -> None:
    async def refuse(nodes: Nodes, run: PrefillRun) -> None:
        await nodes.send(run, failure(tid_of(run), BadRequest("never fits", field="prompt")), node_id="p")

    async with cluster(nats_server, refuse) as (dispatch, nodes):
        with pytest.raises(BadRequest) as caught:
            await collect(dispatch)
        assert caught.value.field == "prompt"
        assert len(nodes.runs) == 1


INNER_WORDS = "p-7 does not listen on flowkv.v1.decode.run.d-7: NATS takes 1048576 bytes"


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (BadRequest(INNER_WORDS, field="prompt"), ContextLengthExceeded),
        (BadRequest(INNER_WORDS, field="max_tokens"), ContextLengthExceeded),
        (TooLarge(INNER_WORDS), ContextLengthExceeded),
        (BadRequest(INNER_WORDS, field="output_ids"), Internal),
        (NotFound(INNER_WORDS), Internal),
        (Internal(INNER_WORDS), Internal),
        (Full(INNER_WORDS, retry_after_s=2.5), Full),
        (DeadlineExceeded(INNER_WORDS), DeadlineExceeded),
        (Unavailable(INNER_WORDS), Unavailable),
        (TransferFailed(INNER_WORDS), Unavailable),
        (Stale(INNER_WORDS), Unavailable),
        (WrongModel(INNER_WORDS), Unavailable),
        (Cancelled(INNER_WORDS), Unavailable),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, FlowKVError) else value.__name__,
)
async def test_a_client_is_not_told_how_the_cluster_is_made(
    nats_server: NatsServer,
    caplog: pytest.LogCaptureFixture,
    error: FlowKVError,
    shown: type[FlowKVError],
) -> None:
    async def fail(nodes: Nodes, run: PrefillRun) -> None:
        await nodes.send(run, failure(tid_of(run), error), node_id="p")

    async with cluster(nats_server, fail, fail, fail) as (dispatch, nodes):
        with pytest.raises(FlowKVError) as caught:
            await collect(dispatch)
        assert type(caught.value) is shown
        assert not {"flowkv", "NATS", "p-7", "d-7"} & set(re.split(r"[\s.:]", caught.value.message))
        assert caught.value.retry_after_s == error.retry_after_s
        await nodes.wait_for(lambda: bool(nodes.finished))
        assert nodes.finished[0].error == INNER_WORDS
    # A refusal is told by the event alone: it is no fault.
    assert any(INNER_WORDS in line for line in caplog.messages) == (shown is not Full)


async def test_lost_message_is_asked_for_again(nats_server: NatsServer) -> None:
    async def lose_one(nodes: Nodes, run: PrefillRun) -> None:
        nodes.resumable[tid_of(run)] = [10, 11, 12, 13]
        await nodes.send(run, chunk(tid_of(run), 0, [10]))
        await nodes.send(run, chunk(tid_of(run), 2, [12]))

    async with cluster(nats_server, lose_one) as (dispatch, nodes):
        assert tokens(await collect(dispatch)) == [10, 11, 12, 13]
        assert len(nodes.runs) == 1


async def test_a_long_hole_is_filled_part_by_part_at_once(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch_module, "GAP_S", 0.5)

    async def lose_all_but_the_first(nodes: Nodes, run: PrefillRun) -> None:
        nodes.resumable[tid_of(run)] = [10, 11, 12, 13]
        nodes.max_resumed = 1
        await nodes.send(run, chunk(tid_of(run), 0, [10]))
        await nodes.send(run, chunk(tid_of(run), 3, [13]))

    async with cluster(nats_server, lose_all_but_the_first) as (dispatch, nodes):
        began = asyncio.get_running_loop().time()
        assert tokens(await collect(dispatch)) == [10, 11, 12, 13]
        # Else each part would have to be missed anew.
        assert asyncio.get_running_loop().time() - began < 3 * 0.5
        assert nodes.num_resumed == 3


async def test_lost_last_message_is_noticed_by_silence(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch_module, "SILENCE_S", 0.4)
    monkeypatch.setattr(connection, "SETTLE_S", 0.0)

    async def lose_the_end(nodes: Nodes, run: PrefillRun) -> None:
        nodes.resumable[tid_of(run)] = [10, 11, 12, 13]
        await nodes.send(run, chunk(tid_of(run), 0, [10]))

    async with cluster(nats_server, lose_the_end) as (dispatch, nodes):
        assert tokens(await collect(dispatch)) == [10, 11, 12, 13]
        assert len(nodes.runs) == 1


async def test_silent_node_is_given_up(nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch_module, "SILENCE_S", 0.4)
    monkeypatch.setattr(connection, "SETTLE_S", 0.0)

    async def fall_silent(nodes: Nodes, run: PrefillRun) -> None:
        await nodes.send(run, chunk(tid_of(run), 0, [10]))

    async with cluster(nats_server, fall_silent, answer) as (dispatch, nodes):
        assert tokens(await collect(dispatch)) == [10, 11, 12, 13]
        assert nodes.asked[1].avoid == ["d"]


async def test_late_words_of_a_former_attempt_are_dropped(nats_server: NatsServer) -> None:
    async def fail(nodes: Nodes, run: PrefillRun) -> None:
        await nodes.send(run, failure(tid_of(run), Unavailable("leaves")))

    async def answer_amid_echoes(nodes: Nodes, run: PrefillRun) -> None:
        await nodes.send(run, chunk("r.0", 0, [66]))
        await answer(nodes, run)

    async with cluster(nats_server, fail, answer_amid_echoes) as (dispatch, _):
        assert tokens(await collect(dispatch)) == [10, 11, 12, 13]


async def test_client_that_leaves_cancels(nats_server: NatsServer) -> None:
    async def begin(nodes: Nodes, run: PrefillRun) -> None:
        await nodes.send(run, chunk(tid_of(run), 0, [10]))

    async with cluster(nats_server, begin) as (dispatch, nodes):
        async with contextlib.aclosing(dispatch.generate(new_request())) as chunks:
            assert (await anext(chunks)).token_ids == [10]
        await nodes.wait_for(lambda: nodes.cancelled == ["r.0"] and bool(nodes.finished))
        assert nodes.finished[0].outcome == "closed"
        assert dispatch.streams == {}


async def hang(nodes: Nodes, run: PrefillRun) -> None:
    """Never accepts the prompt."""
    nodes.news.set()
    await nodes.hung.wait()


async def accept(nodes: Nodes, run: PrefillRun) -> None:
    nodes.news.set()


async def begin_and_skip(nodes: Nodes, run: PrefillRun) -> None:
    """The second token is lost, and the node that has it does not answer."""
    nodes.resume_hangs = True
    await nodes.send(run, chunk(tid_of(run), 0, [10]), chunk(tid_of(run), 2, [12]))


async def fail(nodes: Nodes, run: PrefillRun) -> None:
    await nodes.send(run, failure(tid_of(run), Unavailable("stuck")))


@pytest.mark.parametrize(
    ("attempts", "until"),
    [
        ([hang], lambda nodes: len(nodes.runs) == 1),
        ([accept], lambda nodes: len(nodes.runs) == 1),
        ([begin_and_skip], lambda nodes: nodes.num_resumed == 1),
        ([fail, hang], lambda nodes: len(nodes.runs) == 2),
        ([fail, accept], lambda nodes: len(nodes.runs) == 2),
    ],
    ids=["start", "wait for a token", "resume", "start again", "wait for a token again"],
)
async def test_a_cancel_reaches_the_pair_whatever_the_request_waits_for(
    nats_server: NatsServer, attempts: list[Behaviour], until: Callable[[Nodes], bool]
) -> None:
    async with cluster(nats_server, *attempts) as (dispatch, nodes):
        answering = asyncio.create_task(collect(dispatch))
        await nodes.wait_for(lambda: until(nodes))
        answering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answering
        attempt = f"r.{len(attempts) - 1}"
        pair = [(subjects.at(subjects.NODE_CANCEL, node_id), attempt) for node_id in ("d", "p")]
        await nodes.wait_for(lambda: set(pair) <= set(nodes.cancelled_at) and bool(nodes.finished))
        await nodes.bus.nc.flush()
        assert len(nodes.cancelled_at) == 2 * len(attempts), "each attempt is cancelled once at each node"
        assert [(event.outcome, event.attempts) for event in nodes.finished] == [("closed", len(attempts))]
        assert dispatch.streams == {}
        assert dispatch.load(dispatch.cluster.models[0]) == Load(0, 0, 0.0)
        nodes.hung.set()


async def test_deadline_ends_the_request_cleanly(nats_server: NatsServer) -> None:
    async def dawdle(nodes: Nodes, run: PrefillRun) -> None:
        await nodes.send(run, chunk(tid_of(run), 0, [10]))

    async with cluster(nats_server, dawdle) as (dispatch, nodes):
        with pytest.raises(DeadlineExceeded):
            await collect(dispatch, new_request(deadline_s=0.3))
        await nodes.wait_for(lambda: nodes.cancelled == ["r.0"])


async def test_keepalive_tells_what_nobody_wants(nats_server: NatsServer) -> None:
    replies: list[KeepaliveReply] = []

    async def ask(nodes: Nodes, run: PrefillRun) -> None:
        states = {tid_of(run): "decode", "stranger.0": "decode"}
        keepalive = Keepalive(node=D, states=states)
        subject = subjects.keepalive(run.gateway_id)
        replies.append(await nodes.bus.request(subject, keepalive, KeepaliveReply, timeout_s=2))
        await answer(nodes, run)

    async with cluster(nats_server, ask) as (dispatch, _):
        await collect(dispatch)
        assert [reply.unknown for reply in replies] == [["stranger.0"]]


async def test_what_is_open_is_waiting_or_running(nats_server: NatsServer) -> None:
    """By the scheduler's answer, then by the nodes' keepalives, then by the tokens."""
    seen: list[tuple[str, Load]] = []
    dispatches: list[Dispatch] = []

    def look(where: str) -> None:
        [nodes] = dispatches[0].cluster.models
        seen.append((where, dispatches[0].load(nodes)))

    async def live(nodes: Nodes, run: PrefillRun) -> None:
        look("accepted")
        for node, state in ((P, "queued"), (D, "reserved"), (P, "prefill"), (D, "preempted")):
            keepalive = Keepalive(node=node, states={tid_of(run): state})
            await nodes.bus.request(
                subjects.keepalive(run.gateway_id), keepalive, KeepaliveReply, timeout_s=2
            )
            look(state)
        await answer(nodes, run)

    async with cluster(nats_server, live) as (dispatch, _):
        dispatches.append(dispatch)
        look("before")
        chunks = dispatch.generate(new_request())
        await anext(chunks)
        look("first token")
        await collect_rest(chunks)
        look("after")
    waiting, running_ = Load(0, 1, 0.0), Load(1, 0, 0.0)
    assert seen == [
        ("before", Load(0, 0, 0.0)),
        ("accepted", waiting),
        ("queued", waiting),
        ("reserved", waiting),
        ("prefill", running_),
        ("preempted", waiting),
        ("first token", running_),
        ("after", Load(0, 0, 0.0)),
    ]


async def test_the_record_tells_where_a_request_was_and_how_long_it_waited(nats_server: NatsServer) -> None:
    async def compute(nodes: Nodes, run: PrefillRun) -> None:
        first = msgspec.structs.replace(
            chunk(tid_of(run), 0, [10]), phases_s={"queue": 2.0, "reserve": 1.0, "prefill": 4.0}
        )
        await nodes.send(run, first)
        await nodes.send(
            run, *(chunk(tid_of(run), i, [10 + i], "length" if i == 3 else None) for i in (1, 2, 3))
        )

    one = new_request()
    async with cluster(nats_server, compute) as (dispatch, nodes):
        await collect(dispatch, one)
        await nodes.wait_for(lambda: nodes.finished != [])
    [event] = nodes.finished
    assert (one.num_attempts, one.prefill_node, one.decode_node) == (1, "p", "d")
    assert one.ttft_s == event.phases_s["ttft"]
    assert one.queue_s == pytest.approx(3.0 + event.phases_s["schedule"])


async def test_a_stream_lives_through_a_nats_that_stands_still(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch_module, "SILENCE_S", 0.4)
    monkeypatch.setattr(dispatch_module, "SCHEDULER_PATIENCE_S", 0.4)
    monkeypatch.setattr(client_module, "PING_EVERY_S", 0.025)
    monkeypatch.setattr(dispatch_module, "RESUME_TIMEOUT_S", 0.3)
    monkeypatch.setattr(connection, "SETTLE_S", 0.5)

    async def go_on_later(nodes: Nodes, run: PrefillRun) -> None:
        await nodes.send(run, chunk(tid_of(run), 0, [10]))
        await nodes.send(run, chunk(tid_of(run), 2, [12]))  # one is missing: a reason to ask
        nodes.resumable[tid_of(run)] = [10, 11, 12, 13]

    async with cluster(nats_server, go_on_later) as (dispatch, nodes):
        chunks = dispatch.generate(new_request())
        assert (await anext(chunks)).token_ids == [10]
        with nats_server.frozen():
            rest = asyncio.create_task(collect_rest(chunks))
            await asyncio.sleep(1.5)  # longer than silence, a hole or a missing scheduler is borne
            assert not rest.done()
        async with asyncio.timeout(5):
            assert await rest == [11, 12, 13]
        assert len(nodes.runs) == 1
        assert nodes.cancelled == []


async def test_a_stream_that_needs_another_pair_waits_for_nats(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch_module, "SCHEDULER_PATIENCE_S", 0.4)
    monkeypatch.setattr(client_module, "PING_EVERY_S", 0.025)
    monkeypatch.setattr(dispatch_module, "UNSETTLED_PAUSE_S", 0.3)
    refused_at = 0.0

    async def refuse(nodes: Nodes, run: PrefillRun) -> None:
        nonlocal refused_at
        refused_at = asyncio.get_running_loop().time()
        raise Unavailable("not connected to NATS")

    async def answer_later(nodes: Nodes, run: PrefillRun) -> None:
        assert asyncio.get_running_loop().time() - refused_at >= 0.3  # a node may be back after us
        await answer(nodes, run)

    async def fail_after_one(nodes: Nodes, run: PrefillRun) -> None:
        await nodes.send(run, chunk(tid_of(run), 0, [10]))
        await nodes.send(run, failure(tid_of(run), Unavailable("stuck")))

    async with cluster(nats_server, fail_after_one, refuse, answer_later) as (dispatch, nodes):
        chunks = dispatch.generate(new_request())
        assert (await anext(chunks)).token_ids == [10]
        with nats_server.frozen():
            rest = asyncio.create_task(collect_rest(chunks))
            new = asyncio.create_task(collect(dispatch, new_request()))
            async with asyncio.timeout(5):
                with pytest.raises(Unavailable):  # who has not begun may as well ask another gateway
                    await new
            assert not rest.done()
        async with asyncio.timeout(5):
            assert await rest == [11, 12, 13]
        assert [run.attempt for run in nodes.runs] == [0, 1, 2]


async def test_when_nats_refuses_the_gateway_for_good_the_answers_end() -> None:
    async def begin(nodes: Nodes, run: PrefillRun) -> None:
        await nodes.send(run, chunk(tid_of(run), 0, [10]))

    closed = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        users = stack.enter_context(server_with_users("nodes", "gateway"))
        bus = await stack.enter_async_context(connect(users.url("nodes"), name="nodes"))
        nodes = Nodes(bus, [begin])
        endpoints = [
            Endpoint(subjects.SCHEDULE, ScheduleRequest, nodes.schedule),
            Endpoint(subjects.at(subjects.PREFILL_RUN, "p"), PrefillRun, nodes.prefill),
        ]
        service = Service(bus, name="nodes", version="0.1.0", service_id="n", endpoints=endpoints)
        await stack.enter_async_context(service)
        settings = NatsSettings(nats_url=users.url("gateway"), nats_give_up_s=0.1)
        gateway = open_dispatch(settings, [ModelNodes(OWN)], closed.set)
        dispatch = await gateway.__aenter__()
        chunks = dispatch.generate(new_request())
        assert (await anext(chunks)).token_ids == [10]
        users.refuse("gateway")
        async with asyncio.timeout(5):
            await closed.wait()
            with pytest.raises(Unavailable):
                await anext(chunks)
            with pytest.raises(Unavailable, match="for good"):
                await gateway.__aexit__(None, None, None)


async def test_another_keys_request_asks_before_the_backlog_of_the_first(nats_server: NatsServer) -> None:
    async def answer(nodes: Nodes, run: PrefillRun) -> None:
        await nodes.send(run, chunk(tid_of(run), 0, [5, 6], "stop"))

    tenants = Tenants(0, 0)
    busy, other = tenants.find("busy"), tenants.find("other")
    async with cluster(nats_server, answer) as (dispatch, nodes):
        nodes.waits = [Wait(retry_in_s=0.02, reason="full")] * 4
        async with asyncio.TaskGroup() as tasks:
            for place in range(3):
                tasks.create_task(collect(dispatch, of_tenant(f"busy-{place}", busy)))
            await nodes.wait_for(lambda: len(nodes.asked) == 2)
            tasks.create_task(collect(dispatch, of_tenant("other-0", other)))
    asked = [request.request_id for request in nodes.asked]
    assert asked[:2] == ["busy-0"] * 2, "its others must wait: they would be asked for before a newcomer"
    assert asked.index("other-0") < asked.index("busy-1") < asked.index("busy-2")
    assert (busy.served, other.served) == (3 * 3 + 3 * 2, 3 + 2)


async def test_waiting_for_a_turn_ends_with_the_time_of_the_request(nats_server: NatsServer) -> None:
    tenants = Tenants(0, 0)
    busy, _ = tenants.find("busy"), tenants.find("other")
    async with cluster(nats_server) as (dispatch, nodes):
        nodes.waits = [Wait(retry_in_s=0.02, reason="full")] * 1000
        first = asyncio.create_task(collect(dispatch, of_tenant("busy-0", busy)))
        await nodes.wait_for(lambda: len(nodes.asked) == 1)
        second = of_tenant("busy-1", busy)
        second.deadline_s = 0.05
        with pytest.raises(DeadlineExceeded):
            await collect(dispatch, second)
        first.cancel()
        await asyncio.wait([first])
    assert {request.request_id for request in nodes.asked} == {"busy-0"}
    assert busy.served == 0.0
