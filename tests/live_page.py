"""A gateway with its live page in the test's own process, on a real NATS."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
from prometheus_client import CollectorRegistry

from flowkv_common.aio import running
from flowkv_common.config import GatewaySettings
from flowkv_common.telemetry import serve_http
from flowkv_common.wire.messages import ModelFiles
from flowkv_gateway.app import Api
from flowkv_gateway.cluster import ModelNodes, OwnModel
from flowkv_gateway.dispatch import Dispatch, open_dispatch
from flowkv_gateway.http import ApiConnection
from flowkv_gateway.live import LivePage, is_wanted
from flowkv_gateway.models import Models
from flowkv_gateway.tokenizer import Tokenizer
from tests.gateway_support import model_in_memory
from tests.nats_server import NatsServer


@dataclass(frozen=True)
class Served:
    url: str
    dispatch: Dispatch
    http: httpx.AsyncClient
    stop: asyncio.Event


@contextlib.asynccontextmanager
async def serving_page(server: NatsServer, tokenizer: Tokenizer, **settings: Any) -> AsyncIterator[Served]:
    """As `flowkv_gateway.__main__` puts it together."""
    wanted = GatewaySettings(**{"model_path": "unused", "nats_url": server.url, **settings})
    stop = asyncio.Event()
    model = model_in_memory(wanted, tokenizer, ModelNodes(OwnModel(ModelFiles())))
    async with (
        Models([model]) as models,
        open_dispatch(server.url, [model.nodes]) as dispatch,
    ):
        live = LivePage(dispatch.view_cluster, dispatch.finished, stop) if is_wanted(wanted) else None
        registry = CollectorRegistry()
        api = Api(wanted, models, dispatch, registry, stop, live, dispatch.tracing)
        async with (
            running(*([live.run()] if live else [])),
            serve_http(api.app, "127.0.0.1", 0, connection=ApiConnection) as port,
        ):
            url = f"http://127.0.0.1:{port}"
            dispatch.url = url
            async with httpx.AsyncClient(base_url=url, timeout=10, trust_env=False) as http:
                yield Served(url, dispatch, http, stop)
            stop.set()
