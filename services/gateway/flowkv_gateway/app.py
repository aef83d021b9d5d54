"""The gateway's HTTP side: its routes, and what each of them does with a request."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

import flowkv_common
from flowkv_common.config import GatewaySettings
from flowkv_common.errors import FlowKVError, Internal, Unavailable
from flowkv_common.telemetry import health_routes, metrics_routes
from flowkv_common.wire.messages import ModelCard
from flowkv_gateway.answer import Answer, AnswerResponse, RequestLog
from flowkv_gateway.dispatch import Generator
from flowkv_gateway.fields import parse_request
from flowkv_gateway.http import (
    CloseWhileStopping,
    ModelNotFound,
    error_response,
    http_exception_response,
    read_body,
    status_of,
)
from flowkv_gateway.metrics import GatewayMetrics
from flowkv_gateway.output import Display, prepare_stops
from flowkv_gateway.prompts import Prompt, chat_prompt, completion_prompts, plan, tokenize_prompt
from flowkv_gateway.schemas import (
    ChatRequest,
    ChatShape,
    CompletionRequest,
    DetokenizeRequest,
    Model,
    ModelList,
    SamplingDefaults,
    Shape,
    StreamOptions,
    TextShape,
    TokenizeRequest,
    Writer,
)
from flowkv_gateway.tokenizer import Tokenizer, Vocabulary

B = TypeVar("B", ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)


def build_app(
    settings: GatewaySettings,
    tokenizer: Tokenizer,
    generator: Generator,
    registry: CollectorRegistry,
    defaults: SamplingDefaults,
    stop: asyncio.Event,
) -> Starlette:
    """The ASGI application. It owns nothing that must be closed. While `stop` is set it is not ready."""
    api = Api(settings, tokenizer, generator, registry, defaults, stop)
    routes = [
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/models", api.models),
        Route("/v1/models/{model:path}", api.model),
        Route("/tokenize", api.tokenize, methods=["POST"]),
        Route("/detokenize", api.detokenize, methods=["POST"]),
        Route("/version", api.version),
        *health_routes(api.why_not_ready, "/ping"),
        *metrics_routes(registry),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(CloseWhileStopping, stop)],
        exception_handlers={
            FlowKVError: api.on_error,
            HTTPException: api.on_http_exception,
            Exception: api.on_unexpected,
        },
    )
    app.router.redirect_slashes = False  # a path that is not ours gets its 404
    return app


class Api:
    """The endpoints. Errors leave them as FlowKVError."""

    def __init__(
        self,
        settings: GatewaySettings,
        tokenizer: Tokenizer,
        generator: Generator,
        registry: CollectorRegistry,
        defaults: SamplingDefaults,
        stop: asyncio.Event,
    ) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._generator = generator
        self._defaults = defaults
        self._stop = stop
        folder = Path(settings.model_path)
        self._folder_names = (folder.name, folder.resolve().name)
        self._metrics = GatewayMetrics(
            registry,
            self._model_name,
            is_known=lambda: bool(settings.model_name) or generator.model() is not None,
            load=generator.load,
        )
        self._log = RequestLog(settings.log_requests)
        self._created = int(time.time())

    async def chat(self, request: Request) -> ASGIApp:
        body = await self._parse(request, ChatRequest)
        card = self._card()
        prompt = await chat_prompt(body, self._tokenizer)
        return self._answer(body, [prompt], card, ChatShape(self._tokenizer.vocabulary, _with_ids(body)))

    async def completions(self, request: Request) -> ASGIApp:
        body = await self._parse(request, CompletionRequest)
        card = self._card()
        prompts = await completion_prompts(body, self._tokenizer)
        return self._answer(body, prompts, card, TextShape(self._tokenizer.vocabulary, _with_ids(body)))

    async def models(self, _: Request) -> Response:
        return _json(ModelList([self._model_entry()]))

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return _json(self._model_entry())

    async def tokenize(self, request: Request) -> Response:
        body = await self._parse(request, TokenizeRequest)
        token_ids = await tokenize_prompt(body, self._tokenizer)
        max_model_len = self._model_entry().max_model_len
        return _json({"count": len(token_ids), "max_model_len": max_model_len, "tokens": token_ids})

    async def detokenize(self, request: Request) -> Response:
        body = await self._parse(request, DetokenizeRequest)
        return _json({"prompt": await self._tokenizer.decode(body.tokens)})

    async def version(self, _: Request) -> Response:
        return _json({"version": flowkv_common.__version__})

    def why_not_ready(self) -> str | None:
        return "about to stop" if self._stop.is_set() else self._generator.why_not_ready()

    async def on_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, FlowKVError)
        self._metrics.count_error(status_of(error))
        self._log.refused(request, error)
        return error_response(error)

    async def on_http_exception(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        self._metrics.count_error(error.status_code)
        return http_exception_response(request, error)

    async def on_unexpected(self, request: Request, _: Exception) -> Response:
        """Our own fault. What exactly is for the log: starlette raises the error again."""
        return await self.on_error(request, Internal("Internal error."))

    async def _parse(self, request: Request, kind: type[B]) -> B:
        """The checked body. Raises BadRequest, TooLarge or ModelNotFound."""
        content = await read_body(request, self._settings.max_body_bytes)
        body = parse_request(content, kind)
        body.check()
        if body.model is not None:
            self._check_model(body.model)
        return body

    def _model_name(self) -> str:
        """As it was set, else as the nodes call it; before any has joined the folder's name."""
        card = self._generator.model()
        return self._settings.model_name or (card.name if card else self._folder_names[0])

    def _check_model(self, name: str) -> None:
        # Who names the folder means the same model, whatever the nodes call it.
        if name != self._model_name() and name not in self._folder_names:
            raise ModelNotFound(f"The model {name!r} does not exist.", field="model")

    def _card(self) -> ModelCard:
        card = self._generator.model()
        if card is None:
            raise Unavailable("No node that serves this model has joined yet.", retry_after_s=1.0)
        return card

    def _model_entry(self) -> Model:
        card, name = self._generator.model(), self._model_name()
        return Model(name, self._created, name, card.max_model_len if card else None)

    def _answer(
        self, body: ChatRequest | CompletionRequest, prompts: list[Prompt], card: ModelCard, shape: Shape
    ) -> ASGIApp:
        request_id = f"{shape.id_prefix}-{secrets.token_hex(12)}"
        groups = plan(
            body,
            prompts,
            card,
            self._defaults,
            request_id=request_id,
            seed=random.getrandbits(63),
            deadline_s=self._settings.request_timeout_s,
        )
        answer = Answer.of(
            groups, self._tokenizer.vocabulary, _display(body, card, self._tokenizer.vocabulary)
        )
        return AnswerResponse(
            answer,
            Writer(shape, reply_id=request_id, created=int(time.time()), model=self._model_name()),
            self._generator,
            self._metrics,
            stream_options=(body.stream_options or StreamOptions()) if body.stream else None,
            send_timeout_s=self._settings.send_timeout_s,
            ping_s=self._settings.ping_s,
            on_end=partial(self._log.answered, request_id, answer, time.monotonic()),
        )


def _display(body: ChatRequest | CompletionRequest, card: ModelCard, vocabulary: Vocabulary) -> Display:
    return Display(
        stops=prepare_stops(body.stops, vocabulary.special_texts),
        stop_ids=frozenset((*card.eos_token_ids, *(body.stop_token_ids or ()))),
        shows_stop=body.include_stop_str_in_output or False,
        shows_special=body.skip_special_tokens is False,
    )


def _with_ids(body: ChatRequest | CompletionRequest) -> bool:
    return body.return_token_ids or False


def _json(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
