"""Whatever JSON comes to the endpoints, the answer is 200 or says what is wrong with it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp

from flowkv_common.config import GatewaySettings
from flowkv_gateway.app import Api
from flowkv_gateway.models import Models
from flowkv_gateway.openapi import OPERATIONS
from flowkv_gateway.tokenizer import Tokenizer
from tests.gateway_support import (
    MODEL,
    ScriptedDispatch,
    ScriptedNodes,
    model_in_memory,
    text_chunks,
    write_tokenizer,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PART = st.fixed_dictionaries({"type": st.just("text"), "text": JSON})
CALL = st.fixed_dictionaries(
    {"function": st.fixed_dictionaries({"name": st.text(max_size=3), "arguments": JSON | st.just("{}")})}
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "function", "nobody"])},
    optional={
        "content": st.text(max_size=5) | st.lists(PART, max_size=2),
        "tool_calls": st.lists(CALL, max_size=2),
        "name": JSON,
    },
)
FUNCTION = st.fixed_dictionaries({"name": st.text(max_size=3)}, optional={"parameters": JSON})
TOOL = st.fixed_dictionaries({"type": st.just("function"), "function": FUNCTION})
BLOCK = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "thinking", "tool_use", "tool_result", "image"])},
    optional={
        "text": st.text(max_size=5),
        "thinking": JSON,
        "name": st.text(max_size=3),
        "input": JSON,
        "tool_use_id": st.text(max_size=3),
        "content": st.lists(PART, max_size=2) | JSON,
        "is_error": JSON,
    },
)
BLOCKS = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system"]),
        "content": st.text(max_size=5) | st.lists(BLOCK, max_size=3),
    }
)
ITEM = st.fixed_dictionaries(
    {"type": st.sampled_from(["message", "function_call", "function_call_output", "reasoning", "file"])},
    optional={
        "role": st.sampled_from(["user", "assistant", "developer"]),
        "content": st.text(max_size=5) | st.lists(PART, max_size=2),
        "summary": JSON,
        "name": st.text(max_size=3),
        "arguments": JSON | st.just("{}"),
        "call_id": st.text(max_size=3),
        "output": st.text(max_size=5) | JSON,
    },
)
BODY = st.fixed_dictionaries(
    {},
    optional={
        "messages": st.lists(MESSAGE | BLOCKS, max_size=3) | st.lists(BLOCKS, max_size=3) | JSON,
        "max_tokens": st.integers(0, 9),
        "system": st.lists(BLOCK, max_size=2) | JSON,
        "thinking": st.fixed_dictionaries({"type": st.sampled_from(["enabled", "disabled"])}) | JSON,
        "input": st.lists(ITEM, max_size=4) | JSON,
        "text": st.fixed_dictionaries({"format": JSON | st.fixed_dictionaries({"type": JSON})}) | JSON,
        "prompt": JSON | st.lists(st.integers(0, 600), max_size=4),
        "tokens": st.lists(st.integers(-1, 600), max_size=4),
        "tools": st.lists(JSON | TOOL, max_size=2),
        "tool_choice": JSON,
        "parallel_tool_calls": st.booleans(),
        "include_reasoning": st.booleans(),
        "reasoning_effort": st.sampled_from(["none", "low"]) | JSON,
        "chat_template_kwargs": st.dictionaries(st.text(max_size=3), JSON, max_size=2),
        "stream": st.booleans(),
        "logit_bias": st.dictionaries(st.text(max_size=3), JSON, max_size=2),
        "stop": st.lists(st.text(max_size=3), max_size=3),
    },
)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> ASGIApp:
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    dispatch = ScriptedDispatch(text_chunks(tokenizer, "hello"))
    gateway_settings = GatewaySettings(model_path="unused", model_name=MODEL, tool_parser="hermes")
    models = Models([model_in_memory(gateway_settings, tokenizer, ScriptedNodes(dispatch))])
    api = Api(gateway_settings, models, dispatch, CollectorRegistry(), asyncio.Event())
    return api.app


PATHS = [operation.path for operation in OPERATIONS if operation.body is not None]


@settings(deadline=None, max_examples=60)
@given(body=BODY)
@pytest.mark.parametrize("path", PATHS)
def test_any_json_is_answered_or_refused(app: ASGIApp, path: str, body: dict[str, Any]) -> None:
    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(app)  # raises what the app raises
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(path, content=json.dumps(body))

    response = asyncio.run(post())
    assert response.status_code in (200, 400)
    if response.status_code == 400:
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_every_route_is_described(app: ASGIApp) -> None:
    assert isinstance(app, Starlette)
    routes = [route.path.replace(":path}", "}") for route in app.routes if isinstance(route, Route)]
    assert sorted(routes) == sorted(operation.path for operation in OPERATIONS)
