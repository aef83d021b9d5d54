"""The description of the HTTP API in OpenAPI's JSON, made from the structs that parse requests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

import flowkv_common
from flowkv_gateway.errors import ANTHROPIC_PATH
from flowkv_gateway.messages import CountTokensRequest, MessagesRequest
from flowkv_gateway.schemas import (
    Body,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ResponseRequest,
    TokenizeRequest,
)

Json = dict[str, Any]

# Shows the description, which it fetches from beside itself. It loads nothing else.
DOCS_PAGE = Path(__file__).with_name("docs.html")


class Operation(NamedTuple):
    """What a method of a path does. `body` is what it takes, `answer` the media type of what it gives."""

    path: str
    summary: str
    body: type[Body] | None = None
    answer: str = "application/json"
    deletes: bool = False

    @property
    def method(self) -> str:
        return "delete" if self.deletes else "post" if self.body else "get"


OPERATIONS = (
    Operation("/v1/chat/completions", "Continues a chat, whole or as a stream.", ChatRequest),
    Operation("/v1/completions", "Continues texts or token ids, whole or as a stream.", CompletionRequest),
    Operation(
        "/v1/responses",
        "Continues a chat as OpenAI's Responses do, whole or as a stream of events.",
        ResponseRequest,
    ),
    Operation("/v1/responses/{response_id}", "A response that was stored."),
    Operation("/v1/responses/{response_id}", "Deletes a response that was stored.", deletes=True),
    Operation("/v1/responses/{response_id}/input_items", "The items that such a response answers."),
    Operation(
        "/v1/messages", "Continues a chat as Anthropic's API does, whole or as a stream.", MessagesRequest
    ),
    Operation("/v1/messages/count_tokens", "How many tokens such a chat has.", CountTokensRequest),
    Operation("/v1/models", "The models, each by each of its names."),
    Operation("/v1/models/{model}", "The model with this name."),
    Operation("/tokenize", "A text or messages to token ids.", TokenizeRequest),
    Operation("/detokenize", "Token ids to their text.", DetokenizeRequest),
    Operation("/tokenizer_info", "The tokenizer's configuration and chat template."),
    Operation("/version", "FlowKV's version."),
    Operation("/openapi.json", "This description."),
    Operation("/docs", "This description for people.", answer="text/html"),
    Operation("/health", "Whether requests can be served; 503 with the reason if not.", answer="text/plain"),
    Operation("/health/ready", "The same.", answer="text/plain"),
    Operation("/health/live", "Whether the process answers.", answer="text/plain"),
    Operation("/health/deep", "A request of two tokens through every pair of nodes, at most twice a minute."),
    Operation("/ping", "As `/health`.", answer="text/plain"),
    Operation("/metrics", "Metrics in Prometheus' text form.", answer="text/plain"),
)

_ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "the field that is wrong"},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}


_ANTHROPIC_ERROR: Json = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}


def openapi_document() -> Json:
    """OpenAPI 3.1. It is the same whatever the model: nothing in it is secret."""
    bodies = [operation.body for operation in OPERATIONS if operation.body]
    _, schemas = msgspec.json.schema_components(bodies, ref_template="#/components/schemas/{name}")
    return {
        "openapi": "3.1.0",
        "info": {"title": "FlowKV", "version": flowkv_common.__version__},
        "paths": _paths(),
        "components": {
            "schemas": {**schemas, "Error": _ERROR, "MessagesError": _ANTHROPIC_ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],  # none is needed where the gateway has no keys
    }


def _paths() -> Json:
    paths: Json = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation)
    return paths


def _described(operation: Operation) -> Json:
    is_anthropic = operation.path.startswith(ANTHROPIC_PATH)
    error = {"$ref": f"#/components/schemas/{'MessagesError' if is_anthropic else 'Error'}"}
    described: Json = {
        "summary": operation.summary,
        "responses": {
            "200": {"description": "the answer", "content": {operation.answer: {}}},
            "default": {"description": "an error", "content": {"application/json": {"schema": error}}},
        },
    }
    if names := re.findall(r"{(\w+)}", operation.path):
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if operation.body is not None:
        schema = {"$ref": f"#/components/schemas/{operation.body.__name__}"}
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return described
