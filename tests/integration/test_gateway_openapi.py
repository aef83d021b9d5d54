"""The description of the API, held against the API."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import jsonschema
import pytest

from flowkv_gateway.openapi import DOCS_PAGE, OPERATIONS
from flowkv_gateway.tokenizer import Tokenizer
from tests.gateway_support import TEMPLATE, Gateway, serving


@pytest.fixture
async def gateway(tokenizer: Tokenizer) -> AsyncIterator[Gateway]:
    async with serving(tokenizer) as gateway:
        yield gateway


@pytest.fixture
async def document(gateway: Gateway) -> dict[str, Any]:
    found: dict[str, Any] = (await gateway.http.get("/openapi.json")).json()
    return found


async def test_every_path_is_there_with_the_method_and_answer_that_are_told_of(
    gateway: Gateway, document: dict[str, Any]
) -> None:
    assert sum(map(len, document["paths"].values())) == len(OPERATIONS)
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            reply = await gateway.http.request(method, path.replace("{model}", "tiny/model"))
            # Without a body, and nothing is stored.
            status = 404 if "{response_id}" in path else 400 if method == "post" else 200
            assert reply.status_code == status, path
            outcome = "200" if status == 200 else "default"
            media_type = next(iter(operation["responses"][outcome]["content"]))
            assert reply.headers["content-type"].partition(";")[0] == media_type
        other = await gateway.http.request("get" if "post" in methods else "post", path)
        assert other.status_code == 405
    refused = await gateway.http.post("/v1/completions", json={"prompt": 5})
    jsonschema.validate(refused.json(), {**document, "$ref": "#/components/schemas/Error"})
    refused = await gateway.http.post("/v1/messages", json={"messages": 5})
    jsonschema.validate(refused.json(), {**document, "$ref": "#/components/schemas/MessagesError"})


async def test_bodies_are_described_as_they_are_parsed(document: dict[str, Any]) -> None:
    for operation in OPERATIONS:
        if operation.body is not None:
            schema = document["components"]["schemas"][operation.body.__name__]
            assert list(schema["properties"]) == list(operation.body.__struct_fields__)
    references = set(re.findall(r"'\$ref': '#/components/schemas/(\w+)'", str(document)))
    assert references <= set(document["components"]["schemas"])
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    chat = {**document, "$ref": "#/components/schemas/ChatRequest"}
    jsonschema.validate({"messages": [{"role": "user", "content": "hi"}], "temperature": 1}, chat)
    for wrong in ({}, {"messages": [{"role": "user"}], "temperature": 3}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, chat)


async def test_the_page_loads_nothing_but_the_description(gateway: Gateway) -> None:
    reply = await gateway.http.get("/docs")
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    page = DOCS_PAGE.read_text(encoding="utf-8")
    assert reply.text == page
    assert re.findall(r"https?:|//\w|src=|@import|url\(", page) == []
    assert re.findall(r"fetch\((.*?)\)", page) == ['"openapi.json"']
    assert "innerHTML" not in page


async def test_the_description_needs_no_key(tokenizer: Tokenizer, tmp_path: Any) -> None:
    (tmp_path / "keys").write_text("me secret\n")
    keys = str(tmp_path / "keys")
    async with serving(tokenizer, api_keys_file=keys, open_health=False) as gateway:
        for path, status in (("/docs", 200), ("/openapi.json", 200), ("/tokenizer_info", 401)):
            assert (await gateway.http.get(path)).status_code == status


async def test_what_is_known_of_the_tokenizer(gateway: Gateway) -> None:
    info = (await gateway.http.get("/tokenizer_info")).json()
    assert (info["eos_token"], info["bos_token"]) == ("<|end|>", "<|start|>")
    assert info["chat_template"] == TEMPLATE
    assert info["tokenizer_class"] == "PreTrainedTokenizerFast"
