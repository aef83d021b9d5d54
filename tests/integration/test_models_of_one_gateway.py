"""One gateway and nodes of several models: it finds them, and each answer is of the model that was asked."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
import pytest
from prometheus_client import CollectorRegistry

from flowkv_common.aio import running
from flowkv_common.bus.connection import Bus, connect
from flowkv_common.bus.registry import keep_announced
from flowkv_common.config import GatewaySettings, SchedulerSettings
from flowkv_common.telemetry import serve_http
from flowkv_engine.engine.model import LoadedModel
from flowkv_gateway import dispatch as dispatch_module
from flowkv_gateway import models as models_module
from flowkv_gateway.app import Api
from flowkv_gateway.dispatch import open_dispatch
from flowkv_gateway.http import ApiConnection
from flowkv_gateway.models import Model, Models
from flowkv_scheduler import admission
from flowkv_scheduler.app import serve as serve_scheduler
from tests.described_nodes import MODEL, descriptor
from tests.drive import load_tiny
from tests.e2e.load import run_all, stream_completion, wait_healthy
from tests.gateway_support import PLAIN, TEMPLATE, write_tokenizer
from tests.live_nodes import TIMEOUT_S, live_node
from tests.nats_server import NatsServer
from tests.oracle import check_identity
from tests.tiny_models import make_tiny_model
from tests.waiting import until

NUM_TOKENS = 6


class Weights(NamedTuple):
    name: str  # of the folder, and so of the model
    folder: Path
    model: LoadedModel


def make_weights(folder: Path, seed: int, template: str) -> Weights:
    write_tokenizer(make_tiny_model(folder, seed=seed))
    (folder / "chat_template.jinja").write_text(template)
    return Weights(folder.name, folder, load_tiny(folder))


@pytest.fixture(scope="module")
def a(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return make_weights(tmp_path_factory.mktemp("models") / "a", 1, TEMPLATE)


@pytest.fixture(scope="module")
def b(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return make_weights(tmp_path_factory.mktemp("models") / "b", 2, PLAIN)


@pytest.fixture
async def bus(nats_server: NatsServer) -> AsyncIterator[Bus]:
    """Beside a scheduler."""
    async with connect(nats_server.url, name="test") as mine:
        settings = SchedulerSettings(nats_url=nats_server.url)
        async with running(serve_scheduler(settings, asyncio.Event())):
            yield mine


@contextlib.asynccontextmanager
async def pair(server: NatsServer, bus: Bus, weights: Weights) -> AsyncIterator[None]:
    name, model = weights.name, weights.model
    async with (
        live_node(server, bus, model, f"prefill-{name}", role="prefill"),
        live_node(server, bus, model, f"decode-{name}", role="decode", peers=1),
    ):
        yield


@contextlib.asynccontextmanager
async def gateway(server: NatsServer, *folders: Path) -> AsyncIterator[httpx.AsyncClient]:
    """As `flowkv_gateway.__main__` puts it together."""
    settings = GatewaySettings(nats_url=server.url, model_path=",".join(map(str, folders)))
    own = [Model.load(folder, settings, is_first=number == 0) for number, folder in enumerate(folders)]
    async with (
        Models(own) as models,
        open_dispatch(server.url, [model.nodes for model in own]) as dispatch,
    ):
        api = Api(settings, models, dispatch, CollectorRegistry(), asyncio.Event())
        async with (
            running(models.follow(dispatch.cluster, settings)),
            serve_http(api.app, "127.0.0.1", 0, connection=ApiConnection) as port,
            httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S, trust_env=False
            ) as http,
        ):
            yield http


async def get(http: httpx.AsyncClient, path: str) -> Any:
    response = await http.get(path)
    assert response.status_code == 200, response.text
    return response.json()


async def until_listed(http: httpx.AsyncClient, *names: str) -> None:
    """And served: the list tells a window as soon as there are nodes."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            entries = (await get(http, "/v1/models"))["data"]
            if [entry["id"] for entry in entries] == list(names) and all(
                entry["max_model_len"] for entry in entries
            ):
                return
            await asyncio.sleep(0.02)


async def check_answers(http: httpx.AsyncClient, weights: Weights, num_requests: int = 4) -> None:
    """All at once; each must be what `transformers` makes of these weights."""
    prompts = [[30 + number] * (9 + number) for number in range(num_requests)]
    for answer in await run_all(http, prompts, NUM_TOKENS, model=weights.name):
        assert answer.error is None, answer.error
        assert len(answer.token_ids) == NUM_TOKENS
        check_identity(weights.folder, answer.prompt_ids, answer.token_ids)


def told_of_models(caplog: pytest.LogCaptureFixture) -> list[str]:
    """By the gateway; the scheduler's log is here, too."""
    return [record.getMessage() for record in caplog.records if record.name == models_module.__name__]


async def test_one_gateway_serves_the_models_of_all_nodes(
    nats_server: NatsServer, bus: Bus, a: Weights, b: Weights
) -> None:
    """It was given the folder of one, and reads that of the other where its nodes have it."""
    async with (
        gateway(nats_server, a.folder) as http,
        pair(nats_server, bus, a),
        pair(nats_server, bus, b),
    ):
        await until_listed(http, a.name, b.name)
        await asyncio.gather(check_answers(http, a), check_answers(http, b))
        for weights, template in ((a, TEMPLATE), (b, PLAIN)):
            assert (await get(http, f"/v1/models/{weights.name}"))["root"] == weights.name
            info = await get(http, f"/tokenizer_info?model={weights.name}")
            assert info["chat_template"] == template
        body = {"prompt": "hello", "max_tokens": 2}
        refused = await http.post("/v1/completions", json=body | {"model": "c"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
        unnamed = await http.post("/v1/completions", json=body)
        assert (unnamed.status_code, unnamed.json()["error"]["param"]) == (400, "model")
        assert "say which: a, b" in unnamed.json()["error"]["message"]
        metrics = (await http.get("/metrics")).text
        for weights in (a, b):
            done = f'vllm:request_success_total{{finished_reason="length",model_name="{weights.name}"}} 4.0'
            assert done in metrics


async def test_folders_of_several_models_are_listed_before_their_nodes_come(
    nats_server: NatsServer, bus: Bus, a: Weights, b: Weights
) -> None:
    async with gateway(nats_server, a.folder, b.folder) as http:
        assert [entry["id"] for entry in (await get(http, "/v1/models"))["data"]] == ["a", "b"]
        refused = await http.post("/v1/completions", json={"prompt": "a", "model": "b"})
        assert refused.status_code == 503
        assert (await http.get("/health/ready")).status_code == 503
        async with pair(nats_server, bus, b):
            await wait_healthy(http)
            await check_answers(http, b)


async def test_a_rolling_change_of_model_through_one_gateway(
    nats_server: NatsServer, bus: Bus, a: Weights, b: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in docs/operations.md: new nodes, clients move, old nodes go. None fails while its nodes live."""
    monkeypatch.setattr(models_module, "FORGET_AFTER_S", 0.2)
    monkeypatch.setattr(admission, "NO_NODE_AGE_S", 0.5)
    monkeypatch.setattr(dispatch_module, "SCHEDULER_PATIENCE_S", 0.5)
    is_over = asyncio.Event()

    async def keep_asking(http: httpx.AsyncClient) -> int:
        num_answers = 0
        while not is_over.is_set():
            await check_answers(http, b, 2)
            num_answers += 2
        return num_answers

    async with gateway(nats_server, a.folder) as http, pair(nats_server, bus, a):
        async with pair(nats_server, bus, b):
            await until_listed(http, a.name, b.name)
            asking = asyncio.create_task(keep_asking(http))
            await check_answers(http, a)
            is_over.set()
            assert await asking >= 2
        # Its last node has gone: rather no answer than another model's, and then it is forgotten.
        late = await stream_completion(http, [30] * 9, max_tokens=2, model=b.name)
        assert late.error is not None
        assert late.token_ids == []
        await until_listed(http, a.name)
        await check_answers(http, a)
        gone = await http.post("/v1/completions", json={"prompt": "a", "model": b.name})
        assert gone.status_code == 404


async def test_a_model_whose_folder_is_not_here_is_told_of_once(
    nats_server: NatsServer, bus: Bus, a: Weights, b: Weights, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor is one served that has another content here."""
    nowhere = msgspec.structs.replace(MODEL, name="far", fingerprint="far", folder="/nowhere")
    far = msgspec.structs.replace(nowhere, files=b.model.card.files)
    changed = msgspec.structs.replace(b.model.card, name="changed", folder=str(a.folder))
    caplog.set_level(logging.WARNING, "flowkv_gateway.models")
    nodes = [descriptor("n1", "mixed", model=far), descriptor("n2", "mixed", model=changed)]
    async with (
        gateway(nats_server, a.folder) as http,
        running(*(keep_announced(bus, partial(copy, node), 0.5) for node in nodes)),
    ):
        await until(lambda: len(told_of_models(caplog)) == 2)
        async with pair(nats_server, bus, a):  # the registry changes, and nothing new is told
            await until_listed(http, a.name)
            await check_answers(http, a)
    told = sorted(told_of_models(caplog))
    assert len(told) == 2
    assert told[0].startswith(
        f"changed of nodes is not served here: {a.folder} holds another model here, its w"
    )
    assert told[1].startswith("far of nodes is not served here: its folder, /nowhere, is not here: give this")
    assert told[1].endswith(". Nor is it of the gateway's own folders: its weights differ")
