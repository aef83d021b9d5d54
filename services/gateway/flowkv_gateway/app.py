"""The gateway's HTTP side: its routes, and what each of them does with a request."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import msgspec
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

import flowkv_common
from flowkv_common.config import GatewaySettings, listed
from flowkv_common.errors import BadRequest, FlowKVError, Internal, Unavailable
from flowkv_common.telemetry import service_routes
from flowkv_common.tracing import NO_TRACING, Tracing
from flowkv_common.wire.messages import Grammar, ModelCard
from flowkv_gateway.access import KEY_NAME, Guard
from flowkv_gateway.answer import AnswerResponse, BestResponse, StreamResponse, log_refusal
from flowkv_gateway.canary import Canary
from flowkv_gateway.chat import ChatFormat, MakeReader
from flowkv_gateway.dispatch import Dispatch, Load
from flowkv_gateway.echo import told_prompt
from flowkv_gateway.errors import error_response, json_error, naming_fields, status_of
from flowkv_gateway.grammar import Wanted, wanted_grammar
from flowkv_gateway.http import CloseWhileStopping, read_body
from flowkv_gateway.live import LivePage
from flowkv_gateway.message_writer import MessageWriter
from flowkv_gateway.messages import FIELD_NAMES as MESSAGE_FIELDS
from flowkv_gateway.messages import CountTokensRequest, MessagesRequest
from flowkv_gateway.messages import as_chat as messages_as_chat
from flowkv_gateway.metrics import GatewayMetrics
from flowkv_gateway.models import Model, Models
from flowkv_gateway.openapi import DOCS_PAGE, openapi_document
from flowkv_gateway.output import (
    ChatWriter,
    Choice,
    Display,
    ReplyWriter,
    TextWriter,
    prepare_stops,
    system_fingerprint,
)
from flowkv_gateway.prompts import (
    bad_word_ids,
    completion_prompts,
    plan,
    service_goals,
)
from flowkv_gateway.request_state import ServiceGoals
from flowkv_gateway.response_store import ResponseStore, page_of_items
from flowkv_gateway.response_writer import ResponseWriter
from flowkv_gateway.responses import FIELD_NAMES as RESPONSE_FIELDS
from flowkv_gateway.responses import as_chat as response_as_chat
from flowkv_gateway.responses import input_items
from flowkv_gateway.schemas import (
    Body,
    ChatRequest,
    ChoicesRequest,
    CompletionRequest,
    DetokenizeRequest,
    ResponseRequest,
    TokenizeRequest,
    parse_request,
)
from flowkv_gateway.tenants import Tenants
from flowkv_gateway.tokenizer import ChatPrompt, Vocabulary
from flowkv_gateway.traces import TraceRequests, begin_answer

# Of a vocabulary, the model's name, the request and the fingerprint of the system.
MakeWriter = Callable[[Vocabulary, str, ChoicesRequest, str], ReplyWriter]
B = TypeVar("B", bound=Body)
# Of a truncated prompt's window, for its answer: few are longer, and many clients ask for far more.
_RESERVED_SHARE = 8


class Api:
    """The endpoints, and the ASGI application `app` that serves them. While `stop` is set it is not ready.

    Errors leave the endpoints as FlowKVError. Nothing here must be closed. Making it raises CannotStart
    if the file of keys can't be used.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        models: Models,
        dispatch: Dispatch,
        registry: CollectorRegistry,
        stop: asyncio.Event,
        live: LivePage | None = None,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        self._settings = settings
        self._models = models
        self._tracing = tracing
        self._dispatch = dispatch
        self._canary = Canary(dispatch)
        self._stop = stop
        self._metrics = GatewayMetrics(registry, self._loads)
        self._tenants = Tenants(settings.key_max_requests, settings.key_tokens_per_minute)
        self._stored_responses = ResponseStore(settings.response_store)
        self._created = int(time.time())
        self._description = msgspec.json.encode(openapi_document())  # takes 3 ms to make
        app = Starlette(
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/responses", self.responses, methods=["POST"]),
                Route("/v1/responses/{response_id}", self.stored_response),
                Route("/v1/responses/{response_id}", self.delete_response, methods=["DELETE"]),
                Route("/v1/responses/{response_id}/input_items", self.response_input),
                Route("/v1/messages", self.messages, methods=["POST"]),
                Route("/v1/messages/count_tokens", self.count_tokens, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{model:path}", self.model),
                Route("/tokenize", self.tokenize, methods=["POST"]),
                Route("/detokenize", self.detokenize, methods=["POST"]),
                Route("/tokenizer_info", self.tokenizer_info),
                Route("/version", self.version),
                Route("/openapi.json", self.openapi),
                Route("/docs", self.docs),
                Route("/health/deep", self.deep_health),
                *service_routes(registry, self.why_not_ready, "/ping"),
                *(live.routes() if live else ()),
            ],
            middleware=[
                *([Middleware(TraceRequests, tracing)] if tracing.is_on else ()),
                Middleware(CloseWhileStopping, stop),
                Middleware(Guard, settings, self.on_error),
            ],
            exception_handlers={
                FlowKVError: self.on_error,
                HTTPException: self.on_http_exception,
                Exception: self.on_unexpected,
            },
        )
        app.router.redirect_slashes = False  # a path that is not ours gets its 404
        app.middleware_stack = app.build_middleware_stack()  # or it is made with the first request
        self.app: ASGIApp = app
        if origins := listed(settings.allowed_origins):
            # Around all else: a page may read errors too.
            self.app = CORSMiddleware(
                app,
                allow_origins=origins,
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "request-id", "retry-after"],
            )

    async def chat(self, request: Request) -> ASGIApp:
        model, body = await self._parse(request, ChatRequest)
        return await self._chat(request, model, body, ChatWriter)

    async def responses(self, request: Request) -> ASGIApp:
        model, body = await self._parse(request, ResponseRequest)
        stored, key_name = self._stored_responses, request.scope[KEY_NAME]
        history = stored.history(key_name, body.previous_response_id)
        items = [*history, *stored.resolved(key_name, input_items(body))]
        is_stored = stored.max_responses > 0 and body.store is not False

        def make_writer(vocabulary: Vocabulary, model_name: str, *_: object) -> ResponseWriter:
            store = partial(stored.add, key_name, items) if is_stored else None
            return ResponseWriter(body, vocabulary, model_name, store)

        with naming_fields(RESPONSE_FIELDS):
            chat = response_as_chat(body, items, len(history))
            prompt = None
            if body.truncation == "auto":
                window = self._card(model).max_model_len
                num_reserved = min(body.max_output_tokens or window, window // _RESERVED_SHARE)
                prompt = await model.format.drop_oldest(chat, window - num_reserved)
            return await self._chat(request, model, chat, make_writer, prompt)

    async def stored_response(self, request: Request) -> Response:
        if request.query_params.get("stream") == "true":
            raise BadRequest("A stored response can't be streamed.", field="stream")
        stored = self._stored_responses.get(request.scope[KEY_NAME], request.path_params["response_id"])
        return Response(stored.response, media_type="application/json")

    async def delete_response(self, request: Request) -> Response:
        response_id = request.path_params["response_id"]
        self._stored_responses.delete(request.scope[KEY_NAME], response_id)
        return _json({"id": response_id, "object": "response", "deleted": True})

    async def response_input(self, request: Request) -> Response:
        stored = self._stored_responses.get(request.scope[KEY_NAME], request.path_params["response_id"])
        return _json(page_of_items(stored, request.query_params))

    async def messages(self, request: Request) -> ASGIApp:
        model, body = await self._parse(request, MessagesRequest)

        def make_writer(_: Vocabulary, model_name: str, *others: object) -> MessageWriter:
            return MessageWriter(model_name, body.max_tokens)

        with naming_fields(MESSAGE_FIELDS):
            return await self._chat(request, model, messages_as_chat(body), make_writer)

    async def count_tokens(self, request: Request) -> Response:
        model, body = await self._parse(request, CountTokensRequest)
        with naming_fields(MESSAGE_FIELDS):
            prompt = await model.format.prompt(messages_as_chat(body))
        return _json({"input_tokens": len(prompt.token_ids)})

    async def _chat(
        self,
        request: Request,
        model: Model,
        body: ChatRequest,
        make_writer: MakeWriter,
        prompt: ChatPrompt | None = None,
    ) -> ASGIApp:
        """`prompt` is that of the body, if it has been rendered."""
        goals = service_goals(request.headers)
        chat_format = self._chat_format(model, body)
        prompt = prompt or await chat_format.prompt(body)
        wanted, make_reader = chat_format.answer_format(body, prompt.text)
        grammar = await checked_grammar(model, wanted)
        prompts = [prompt.token_ids]
        return await self._answer(request, model, body, prompts, grammar, goals, make_writer, make_reader)

    async def completions(self, request: Request) -> ASGIApp:
        model, body = await self._parse(request, CompletionRequest)
        goals = service_goals(request.headers)
        grammar = await checked_grammar(model, wanted_grammar(body, model.tokenizer.vocabulary))
        prompts = await completion_prompts(body, model.tokenizer)
        return await self._answer(request, model, body, prompts, grammar, goals, TextWriter)

    async def models(self, _: Request) -> Response:
        entries = [self._model_entry(model, name) for name, model in self._models.by_name().items()]
        return _json({"object": "list", "data": entries})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        model = self._models.find(name)
        return _json(self._model_entry(model, name if name in model.names else model.name))

    async def tokenize(self, request: Request) -> Response:
        model, body = await self._parse(request, TokenizeRequest)
        if body.prompt is None:
            tokens = (await self._chat_format(model, body).prompt(body)).token_ids
        else:
            adds_special = body.add_special_tokens is not False
            [tokens] = await model.tokenizer.encode([body.prompt], add_special_tokens=adds_special)
        max_model_len = self._model_entry(model, model.name)["max_model_len"]
        return _json({"count": len(tokens), "max_model_len": max_model_len, "tokens": tokens})

    async def detokenize(self, request: Request) -> Response:
        model, body = await self._parse(request, DetokenizeRequest)
        return _json({"prompt": await model.tokenizer.decode(body.tokens)})

    async def tokenizer_info(self, request: Request) -> Response:
        return _json(self._models.find(request.query_params.get("model")).tokenizer.info)

    async def openapi(self, _: Request) -> Response:
        return Response(self._description, media_type="application/json")

    async def docs(self, _: Request) -> Response:
        return FileResponse(DOCS_PAGE)

    async def version(self, _: Request) -> Response:
        return _json({"version": flowkv_common.__version__})

    async def deep_health(self, _: Request) -> Response:
        health = await self._canary.health()
        return _json(health, 200 if health.ok else 503)

    def why_not_ready(self) -> str | None:
        return "about to stop" if self._stop.is_set() else self._dispatch.readiness.why_not_ready()

    async def on_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, FlowKVError)
        self._metrics.count_error(status_of(error))
        if self._settings.log_requests:
            log_refusal(request, error)
        return error_response(error, request.url.path)

    async def on_http_exception(self, request: Request, error: Exception) -> Response:
        """No such path, or not with this method."""
        assert isinstance(error, HTTPException)
        self._metrics.count_error(error.status_code)
        path = request.url.path
        body = json_error(error.status_code, f"{error.detail}: {request.method} {path}", path=path)
        return Response(body, error.status_code, error.headers, media_type="application/json")

    async def on_unexpected(self, request: Request, _: Exception) -> Response:
        """Our own fault. What exactly is for the log: starlette raises the error again."""
        return await self.on_error(request, Internal("Internal error."))

    async def _parse(self, request: Request, kind: type[B]) -> tuple[Model, B]:
        """The model that is asked, and the checked body. Raises BadRequest, TooLarge or ModelNotFound."""
        body = parse_request(await read_body(request, self._settings.max_body_bytes), kind)
        return self._models.find(body.model), body

    def _chat_format(self, model: Model, body: ChatRequest | TokenizeRequest) -> ChatFormat:
        """That of the model, or of the request's own template. Raises BadRequest."""
        if body.chat_template is None:
            return model.format
        if not self._settings.trust_request_chat_template:
            raise BadRequest(
                "chat_template is not supported: the operator has not allowed requests to have their own.",
                field="chat_template",
            )
        return ChatFormat(model.tokenizer.with_template(body.chat_template), model.parser_name)

    def _loads(self) -> dict[str, Load]:
        """By name, of each model whose name is known."""
        loads: dict[str, Load] = {}
        for model in self._models.all:
            if name := model.known_name:
                load = self._dispatch.load(model.nodes)
                before = loads.get(name)
                loads[name] = load.plus(before) if before else load
        return loads

    def _card(self, model: Model, *further: object) -> ModelCard:
        """The card, for a request that carries `further` things beside its tokens. Raises Unavailable."""
        carried = [one for one in further if one]
        card = self._dispatch.card_of(model.nodes, len(msgspec.json.encode(carried)) if carried else 0)
        if card is None:
            raise Unavailable("No node that serves this model has joined yet.", retry_after_s=1.0)
        return msgspec.structs.replace(card, name=model.name)

    def _model_entry(self, model: Model, name: str) -> dict[str, Any]:
        """As OpenAI lists it, and `max_model_len`, which is null while no node is known."""
        card = self._dispatch.card_of(model.nodes)
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "flowkv",
            "root": model.name,
            "parent": None,
            "max_model_len": card.max_model_len if card else None,
        }

    async def _answer(
        self,
        request: Request,
        model: Model,
        body: ChatRequest | CompletionRequest,
        prompts: list[list[int]],
        grammar: Grammar | None,
        goals: ServiceGoals,
        make_writer: MakeWriter,
        make_reader: MakeReader | None = None,
    ) -> ASGIApp:
        vocabulary = model.tokenizer.vocabulary
        bad_words = await bad_word_ids(body.bad_words or (), model.tokenizer)
        card = self._card(model, grammar, bad_words, body.allowed_token_ids)
        fingerprint = system_fingerprint(card.fingerprint, flowkv_common.__version__)
        writer = make_writer(vocabulary, card.name, body, fingerprint)
        groups = plan(
            body,
            prompts,
            card,
            model.defaults,
            grammar,
            bad_words=bad_words,
            request_id=writer.reply_id,
            seed=random.getrandbits(63),
            deadline_s=self._settings.request_timeout_s,
            goals=goals,
            tenant=self._tenants.find(key_name) if (key_name := request.scope[KEY_NAME]) else None,
        )
        stops = (body.stop,) if isinstance(body.stop, str) else body.stop or ()
        display = Display(
            stops=prepare_stops(stops, vocabulary.special_texts),
            stop_ids=frozenset((*card.eos_token_ids, *(body.stop_token_ids or ()))),
            shows_stop=body.include_stop_str_in_output or False,
            shows_special=body.skip_special_tokens is False,
            shows_output=body.max_tokens != 0,
        )
        numbers = itertools.count()
        choices = []
        for place, group in enumerate(groups):
            told = told_prompt(body, place, prompts[place], group[0], vocabulary)
            readers = [make_reader() if make_reader else None for _ in group]
            choices.append(
                [
                    Choice(next(numbers), one, vocabulary, display, reader, told)
                    for one, reader in zip(group, readers, strict=True)
                ]
            )
        user = body.safety_identifier or body.user or ""
        span = begin_answer(
            self._tracing,
            is_chat=not isinstance(body, CompletionRequest),
            model=card.name,
            reply_id=writer.reply_id,
            is_stream=bool(body.stream),
            num_choices=body.n or 1,
            sampling=groups[0][0].sampling,
        )
        if isinstance(body, CompletionRequest) and body.has_spare_samples:
            shows_logprobs = body.logprobs is not None
            return BestResponse(
                choices,
                writer,
                self._dispatch,
                self._metrics,
                self._settings,
                user,
                span,
                num_best=body.n or 1,
                shows_logprobs=shows_logprobs,
            )
        kind = StreamResponse if body.stream else AnswerResponse
        return kind(choices, writer, self._dispatch, self._metrics, self._settings, user, span)


async def checked_grammar(model: Model, wanted: Wanted | None) -> Grammar | None:
    """What the answer must look like, checked. Raises BadRequest, or Full and Unavailable."""
    if wanted is None:
        return None
    await model.checker.check(wanted)
    return wanted.grammar


def _json(content: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")
