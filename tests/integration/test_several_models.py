"""Nodes of two models on one NATS: each gateway gets the tokens of its own, and nodes refuse other work."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
from nats.aio.msg import Msg

from flowkv_common.aio import running
from flowkv_common.bus.connection import Bus, connect
from flowkv_common.cluster_view import until_complete, viewing
from flowkv_common.config import NatsSettings, SchedulerSettings
from flowkv_common.errors import DeadlineExceeded, WrongModel
from flowkv_common.fingerprint import model_files
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import (
    Accepted,
    Message,
    Reserved,
    SamplingParams,
)
from flowkv_common.wire.nodes import LoadReport
from flowkv_common.wire.subjects import DEFAULT_NAMESPACE
from flowkv_engine.engine.model import LoadedModel
from flowkv_gateway.cluster import ModelNodes, OwnModel
from flowkv_gateway.dispatch import Dispatch, open_dispatch
from flowkv_gateway.request_state import RequestState
from flowkv_scheduler.app import serve as serve_scheduler
from tests.drive import load_tiny
from tests.live_nodes import TIMEOUT_S, live_node
from tests.nats_server import NatsServer
from tests.node_messages import decode_run, prefill_run, reserve
from tests.oracle import check_identity
from tests.quantized_models import FORMATS, make_quantized_model
from tests.tiny_models import make_tiny_model

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
NUMBERS = itertools.count()


class Weights(NamedTuple):
    """One of two models; `floats` is a folder of the same model in float32."""

    folder: Path
    model: LoadedModel
    floats: Path


@pytest.fixture(scope="module")
def a(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """With weights of four bits."""
    folder = tmp_path_factory.mktemp("a") / "m"
    form = next(form for form in FORMATS if form.name == "gptq act-order")
    floats = make_quantized_model(folder, form, hidden_size=128, intermediate_size=128, head_dim=32)
    return Weights(folder, load_tiny(folder), floats)


@pytest.fixture(scope="module")
def b(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    folder = make_tiny_model(tmp_path_factory.mktemp("b"), seed=7)
    return Weights(folder, load_tiny(folder), folder)


@pytest.fixture
async def bus(nats_server: NatsServer) -> AsyncIterator[Bus]:
    """Beside a scheduler."""
    async with beside_scheduler(nats_server) as mine:
        yield mine


@contextlib.asynccontextmanager
async def beside_scheduler(server: NatsServer, namespace: str = DEFAULT_NAMESPACE) -> AsyncIterator[Bus]:
    settings = SchedulerSettings(nats_url=server.url, namespace=namespace)
    async with connect(settings, name="test") as bus:
        async with running(serve_scheduler(settings, asyncio.Event())):
            yield bus


@contextlib.asynccontextmanager
async def pair(
    server: NatsServer, bus: Bus, weights: Weights, name: str, **settings: Any
) -> AsyncIterator[None]:
    """A prefill and a decode node, linked to each other."""
    async with (
        live_node(server, bus, weights.model, f"prefill-{name}", role="prefill", **settings),
        live_node(server, bus, weights.model, f"decode-{name}", role="decode", peers=1, **settings),
    ):
        yield


async def check_topology(
    server: NatsServer, bus: Bus, weights: Weights, topology: Literal["1P1D", "mixed"], **settings: Any
) -> None:
    """Answers of one pair of nodes, or of one mixed node, are those of `weights`."""
    nodes = (
        pair(server, bus, weights, "x", **settings)
        if topology == "1P1D"
        else live_node(server, bus, weights.model, "mixed-x", role="mixed", **settings)
    )
    async with nodes, gateway(server, weights) as dispatch:
        await until_ready(dispatch, bus)
        await check_answers(dispatch, weights)


@contextlib.asynccontextmanager
async def gateway(
    server: NatsServer, weights: Weights, name: str = "", namespace: str = DEFAULT_NAMESPACE
) -> AsyncIterator[Dispatch]:
    nodes = ModelNodes(OwnModel(model_files(weights.folder), name))
    settings = NatsSettings(nats_url=server.url, namespace=namespace)
    async with open_dispatch(settings, [nodes]) as dispatch:
        yield dispatch


async def until_ready(dispatch: Dispatch, bus: Bus) -> None:
    """Asked again with each load report: those are what it hears, too."""
    heard = asyncio.Event()
    async with (
        asyncio.timeout(TIMEOUT_S),
        await bus.subscribe(subjects.LOAD_ALL, LoadReport, lambda *_: heard.set()),
    ):
        while dispatch.readiness.why_not_ready():
            heard.clear()
            await heard.wait()


async def ask(dispatch: Dispatch, prompt_ids: list[int]) -> list[int]:
    card = dispatch.card_of(dispatch.cluster.models[0])
    assert card is not None
    wanted = RequestState(
        f"r{next(NUMBERS)}", prompt_ids, GREEDY, deadline_s=TIMEOUT_S, fingerprint=card.fingerprint
    )
    return [token_id async for piece in dispatch.generate(wanted) for token_id in piece.token_ids]


async def served_by(bus: Bus) -> set[tuple[str, str]]:
    """What `nats micro info gateway` tells of the two gateways: the model and its fingerprint."""
    inbox = bus.nc.new_inbox()
    infos: asyncio.Queue[dict[str, str]] = asyncio.Queue()

    async def take(msg: Msg) -> None:
        infos.put_nowait(json.loads(msg.data)["metadata"])

    async with await bus.subscribe_raw(inbox, take), asyncio.timeout(TIMEOUT_S):
        await bus.nc.publish("$SRV.INFO.gateway", b"", reply=inbox)
        return {(info["model"], info["fingerprint"]) for info in [await infos.get() for _ in range(2)]}


async def check_answers(dispatch: Dispatch, weights: Weights, num_requests: int = 6) -> None:
    """All at once; each must be what `transformers` makes of these weights."""
    prompts = [[30 + number] * (9 + number) for number in range(num_requests)]
    answers = await asyncio.gather(*(ask(dispatch, prompt_ids) for prompt_ids in prompts))
    for prompt_ids, output_ids in zip(prompts, answers, strict=True):
        check_identity(weights.floats, prompt_ids, output_ids)


async def test_each_gateway_gets_the_tokens_of_its_own_model(
    nats_server: NatsServer, bus: Bus, a: Weights, b: Weights, caplog: pytest.LogCaptureFixture
) -> None:
    """Each of them has one folder, and finds no others."""
    async with pair(nats_server, bus, a, "a"), pair(nats_server, bus, b, "b"):
        async with gateway(nats_server, a) as of_a, gateway(nats_server, b, "another name") as of_b:
            await until_ready(of_a, bus)
            await until_ready(of_b, bus)
            await asyncio.gather(check_answers(of_a, a), check_answers(of_b, b))
            assert await served_by(bus) == {
                (weights.model.card.name, weights.model.card.fingerprint) for weights in (a, b)
            }
            for dispatch in (of_a, of_b):
                assert [why for _, why in dispatch.cluster.others.values()] == 2 * ["its weights differ"]
    # Nor do nodes of one try to reach those of the other.
    assert not [record for record in caplog.records if record.message.startswith("no link to")]


async def test_a_rolling_change_of_model_gives_no_wrong_answer(
    nats_server: NatsServer, bus: Bus, a: Weights, b: Weights
) -> None:
    """As in docs/compose.md: the new nodes, then the new gateway, then the old nodes go."""
    is_over = asyncio.Event()

    async def keep_asking(of_a: Dispatch) -> int:
        num_rounds = 0
        while not is_over.is_set():
            await check_answers(of_a, a, 1)
            num_rounds += 1
        return num_rounds

    async with gateway(nats_server, a) as of_a, contextlib.AsyncExitStack() as new:
        async with pair(nats_server, bus, a, "a"):
            await until_ready(of_a, bus)
            asking = asyncio.create_task(keep_asking(of_a))
            for role, peers in (("decode", 0), ("prefill", 1)):
                node = live_node(nats_server, bus, b.model, f"{role}-b", role=role, peers=peers)
                await new.enter_async_context(node)
            of_b = await new.enter_async_context(gateway(nats_server, b))
            await until_ready(of_b, bus)
            await check_answers(of_b, b)
            is_over.set()
            assert await asking > 0
        # Rather no answer than another model's.
        wanted = RequestState("late", [30] * 9, GREEDY, deadline_s=1.0, fingerprint=a.model.card.fingerprint)
        with pytest.raises(DeadlineExceeded) as late:
            await anext(of_a.generate(wanted))
        assert "no node of the model is ready" in str(late.value.__cause__)
        assert of_a.readiness.why_not_ready() == "no node of the model is ready"
        await check_answers(of_b, b)


async def test_two_clusters_at_one_nats_never_hear_each_other(
    nats_server: NatsServer, a: Weights, b: Weights
) -> None:
    """Their nodes even have the same names."""
    roots: Counter[str] = Counter()

    async def count(msg: Msg) -> None:
        roots[msg.subject.partition(".")[0]] += 1

    clusters = [(a, DEFAULT_NAMESPACE), (b, "team-b")]
    async with contextlib.AsyncExitStack() as opened:
        gateways, buses = [], []
        for weights, namespace in clusters:
            bus = await opened.enter_async_context(beside_scheduler(nats_server, namespace))
            await opened.enter_async_context(pair(nats_server, bus, weights, "x", namespace=namespace))
            mine = gateway(nats_server, weights, namespace=namespace)
            gateways.append(await opened.enter_async_context(mine))
            buses.append(bus)
        for dispatch, bus in zip(gateways, buses, strict=True):
            await until_ready(dispatch, bus)
        # Not sooner: a node that asks whether its name is free would wait for whoever listens.
        listener = await opened.enter_async_context(connect(nats_server.url, name="listener"))
        await opened.enter_async_context(await listener.subscribe_raw(">", count))
        await asyncio.gather(
            *(check_answers(each, weights) for each, (weights, _) in zip(gateways, clusters, strict=True))
        )
        for dispatch, bus in zip(gateways, buses, strict=True):
            assert dispatch.cluster.others == {}  # nor does it see their nodes
            view = await opened.enter_async_context(viewing(bus))
            await until_complete(view)
            assert {node.node_id for node in view.nodes()} == {"prefill-x", "decode-x"}
            assert {one.name for one in view.services("scheduler")} == {"scheduler"}
            # Each scheduler leads its own.
            assert (len(view.services("gateway")), len(view.services("scheduler"))) == (1, 1)
            assert view.leader is not None
    assert {root for root in roots if root[0] not in "_$"} == {"flowkv", "team-b"}


async def test_a_node_refuses_work_of_another_model(nats_server: NatsServer, bus: Bus, a: Weights) -> None:
    async with live_node(nats_server, bus, a.model, "n") as node:
        work: list[tuple[str, Message, Any]] = [
            (subjects.PREFILL_RUN, prefill_run([30], node=node, fingerprint="b"), Accepted),
            (subjects.DECODE_RESERVE, reserve(9, node=node, fingerprint="b"), Reserved),
            (subjects.DECODE_RUN, decode_run([30], "t", node=node, fingerprint="b"), Accepted),
        ]
        for subject, message, reply in work:
            with pytest.raises(WrongModel, match=f"serves {a.model.card.name} .*, not b"):
                await bus.request(subjects.at(subject, "n"), message, reply, timeout_s=5)
