"""Runs all choices of a request and hands their deltas on, in order per choice. Knows no HTTP."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from dataclasses import dataclass
from itertools import chain, count
from typing import Protocol

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from flowkv_common.aio import running
from flowkv_common.errors import Cancelled, FlowKVError, Internal, Unavailable
from flowkv_gateway.dispatch import Generation, Generator
from flowkv_gateway.http import ABORT, STOPPED, ClientTooSlow, error_body, error_response, status_of
from flowkv_gateway.metrics import GatewayMetrics
from flowkv_gateway.output import Choice, Delta, Display
from flowkv_gateway.schemas import PromptTokensDetails, StreamOptions, Usage, WholeChoice, Writer
from flowkv_gateway.tokenizer import Vocabulary

Emit = Callable[[Delta], Awaitable[None]]


@dataclass(frozen=True)
class Answer:
    """The choices of a request, one group per prompt."""

    groups: Sequence[Sequence[Choice]]

    @classmethod
    def of(cls, groups: Sequence[Sequence[Generation]], vocabulary: Vocabulary, display: Display) -> Answer:
        """Choices numbered through all groups."""
        numbers = count()
        return cls([[Choice(next(numbers), one, vocabulary, display) for one in group] for group in groups])

    def usage(self) -> Usage:
        """Tokens so far. A prompt counts once, however many choices it has."""
        firsts = [group[0] for group in self.groups]
        num_prompt_tokens = sum(len(first.generation.prompt_ids) for first in firsts)
        num_tokens = sum(choice.num_tokens for group in self.groups for choice in group)
        num_cached = sum(first.num_cached_tokens for first in firsts)
        return Usage(
            prompt_tokens=num_prompt_tokens,
            completion_tokens=num_tokens,
            total_tokens=num_prompt_tokens + num_tokens,
            prompt_tokens_details=PromptTokensDetails(num_cached),
        )

    async def run(self, generator: Generator, metrics: GatewayMetrics, emit: Emit) -> None:
        """Runs until every choice has ended; a slow `emit` slows the request, nothing piles up here.

        Raises the error of the choice that failed first; the others are cancelled then.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                for group in self.groups:
                    tasks.create_task(_run_group(group, tasks, generator, metrics, emit))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None


async def _run_group(
    group: Sequence[Choice],
    tasks: asyncio.TaskGroup,
    generator: Generator,
    metrics: GatewayMetrics,
    emit: Emit,
) -> None:
    """The first choice goes ahead, so that the others find its prompt in the prefix cache."""
    metrics.num_choices.observe(len(group))
    first, *others = group
    is_computed = asyncio.Event()
    tasks.create_task(_run_choice(first, is_computed, generator, metrics, emit))
    if others:
        await is_computed.wait()
    for choice in others:
        tasks.create_task(_run_choice(choice, is_computed, generator, metrics, emit))


async def _run_choice(
    choice: Choice, is_computed: asyncio.Event, generator: Generator, metrics: GatewayMetrics, emit: Emit
) -> None:
    with metrics.observe(choice) as times:
        async with aclosing(generator.generate(choice.generation)) as pieces:
            async for piece in pieces:
                is_computed.set()
                times.tokens(len(piece.token_ids), piece.num_cached_tokens)
                for delta in choice.push(piece):
                    await emit(delta)
                if choice.finish_reason is not None:
                    return
        raise Internal("The answer broke off.")


log = logging.getLogger(__name__)

_PATHS = frozenset(("/v1/chat/completions", "/v1/completions"))
# The text of these errors is ours; that of others may repeat what the client has sent.
_OURS = frozenset((429, 500, 503, 504))


class RequestLog:
    """Says nothing where it is not `enabled`."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled

    def answered(self, request_id: str, answer: Answer, began: float, error: FlowKVError | None) -> None:
        """One that nodes were asked for, `began` by the monotonic clock; `error` is what it ended with."""
        if not self._enabled:
            return
        choices = [choice for group in answer.groups for choice in group]
        records = [choice.generation.record for choice in choices]
        usage = answer.usage()
        ttfts_s = [record.ttft_s for record in records if record.ttft_s is not None]
        fields = {
            "request_id": request_id,
            "status": 200 if error is None else status_of(error),
            "finish_reason": _each(choice.finish_reason or "" for choice in choices),
            "num_prompt_tokens": usage.prompt_tokens,
            "num_output_tokens": usage.completion_tokens,
            "num_cached_tokens": usage.prompt_tokens_details.cached_tokens,
            "ttft_s": round(min(ttfts_s), 4) if ttfts_s else None,
            "total_s": round(time.monotonic() - began, 4),
            "num_attempts": max(record.num_attempts for record in records),
            "prefill_node": _each(record.prefill_node for record in records),
            "decode_node": _each(record.decode_node for record in records),
        }
        log.info("request ended", extra={"fields": {**fields, **_reason(error)}})

    def refused(self, request: Request, error: FlowKVError) -> None:
        """One that was refused before anybody was asked for an answer."""
        if self._enabled and request.url.path in _PATHS:
            fields = {"path": request.url.path, "status": status_of(error)}
            log.info("request refused", extra={"fields": {**fields, **_reason(error)}})


def _reason(error: FlowKVError | None) -> dict[str, str]:
    if error is None:
        return {}
    told = {"error": type(error).__name__}
    if error.field:
        told["field"] = error.field
    if status_of(error) in _OURS:
        told["reason"] = error.message
    return told


def _each(words: Iterable[str]) -> str:
    """Those that there are, each once."""
    return ",".join(sorted({word for word in words if word}))


_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # or nginx would collect the tokens
]
# An error that comes sooner still gets its own status.
HEADERS_AFTER_S = 1.0
_PING = b": ping\n\n"
# What some clients take for the end of a line, though the standard has only CR and LF. As JSON has them.
_LINE_BREAKS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))


class EventStream:
    """Sends events one after another; waits for the client to read, but never longer than the time-out.

    Nothing is buffered here: the server's own bounded write buffer is all that a client can fill.
    """

    def __init__(self, send: Send, send_timeout_s: float) -> None:
        self.is_started = False
        self._send = send
        self._send_timeout_s = send_timeout_s
        self._turn = asyncio.Lock()
        self._sent_at = time.monotonic()

    async def event(self, payload: bytes) -> None:
        """The first one goes out with status and headers. `payload` is JSON. Raises ClientTooSlow."""
        if 0xE2 in payload or 0xC2 in payload:  # their first bytes
            for line_break, escaped in _LINE_BREAKS:
                payload = payload.replace(line_break, escaped)
        async with self._turn:
            if not self.is_started:
                await self._start()
            await self._body(b"data: " + payload + b"\n\n")

    async def end(self) -> None:
        """Raises ClientTooSlow."""
        await self._within_time({"type": "http.response.body", "body": b"", "more_body": False})

    async def keep_open(self, ping_s: float) -> None:
        """Until cancelled: headers after a second, then a comment after each `ping_s` of silence (0: none).

        Else a proxy would cut off a client that waits long for its first token. Raises ClientTooSlow.
        """
        await asyncio.sleep(HEADERS_AFTER_S)
        async with self._turn:
            if not self.is_started:
                await self._start()
        while ping_s:
            await asyncio.sleep(self._sent_at + ping_s - time.monotonic())
            async with self._turn:
                if time.monotonic() - self._sent_at >= ping_s:
                    await self._body(_PING)

    async def _start(self) -> None:
        await self._within_time({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        self.is_started = True

    async def _body(self, body: bytes) -> None:
        await self._within_time({"type": "http.response.body", "body": body, "more_body": True})
        self._sent_at = time.monotonic()

    async def _within_time(self, message: Message) -> None:
        try:
            async with asyncio.timeout(self._send_timeout_s):
                await self._send(message)
        except TimeoutError:
            raise ClientTooSlow(f"Nothing was read for {self._send_timeout_s:g} s.") from None


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


Reply = Callable[[Response], Awaitable[None]]
Abort = Callable[[], None]
OnEnd = Callable[[FlowKVError | None], None]


class Sink(Protocol):
    """Where an answer goes."""

    def held_open(self) -> AbstractAsyncContextManager[None]:
        """While the answer is made, its connection shall not look dead. Raises ClientTooSlow."""
        ...

    async def emit(self, delta: Delta) -> None: ...

    async def finish(self) -> None: ...

    async def fail(self, error: FlowKVError) -> None: ...


class WholeSink:
    """Collects the answer and sends it as one JSON body."""

    def __init__(self, answer: Answer, writer: Writer, reply: Reply) -> None:
        self._answer = answer
        self._writer = writer
        self._reply = reply
        num_choices = sum(len(group) for group in answer.groups)
        self._choices = [WholeChoice(index) for index in range(num_choices)]

    def held_open(self) -> AbstractAsyncContextManager[None]:
        return nullcontext()  # nothing can be sent before all of it

    async def emit(self, delta: Delta) -> None:
        self._choices[delta.choice].add(delta)

    async def finish(self) -> None:
        body = self._writer.whole(self._choices, self._answer.usage())
        await self._reply(Response(body, media_type="application/json"))

    async def fail(self, error: FlowKVError) -> None:
        await self._reply(error_response(error))


class StreamSink:
    """Sends one event per token. An error before the headers is a plain error response, later an event.

    Headers go out with the first token, or after a second. A silence of `ping_s` is filled by a comment.
    """

    def __init__(
        self,
        answer: Answer,
        writer: Writer,
        reply: Reply,
        stream: EventStream,
        options: StreamOptions,
        ping_s: float,
    ) -> None:
        self._answer = answer
        self._writer = writer
        self._reply = reply
        self._stream = stream
        self._options = options
        self._ping_s = ping_s

    def held_open(self) -> AbstractAsyncContextManager[None]:
        return running(self._stream.keep_open(self._ping_s))

    async def emit(self, delta: Delta) -> None:
        await self._stream.event(self._writer.chunk(delta, self._usage()))

    async def finish(self) -> None:
        if self._options.include_usage:
            await self._stream.event(self._writer.usage_chunk(self._answer.usage()))
        await self._stream.event(b"[DONE]")
        await self._stream.end()

    async def fail(self, error: FlowKVError) -> None:
        if not self._stream.is_started:
            await self._reply(error_response(error))
            return
        await self._stream.event(error_body(error))
        await self._stream.end()

    def _usage(self) -> Usage | None | UnsetType:
        if self._options.continuous_usage_stats:
            return self._answer.usage()
        return None if self._options.include_usage else UNSET


class AnswerResponse:
    """An ASGI response that makes the answer while it is sent.

    When the client goes away, everything that works for it is cancelled at once.
    """

    def __init__(
        self,
        answer: Answer,
        writer: Writer,
        generator: Generator,
        metrics: GatewayMetrics,
        *,
        stream_options: StreamOptions | None,
        send_timeout_s: float,
        ping_s: float,
        on_end: OnEnd,
    ) -> None:
        """`stream_options` None: the whole answer in one body. `on_end` gets the error at its end, if any."""
        self._answer = answer
        self._writer = writer
        self._generator = generator
        self._metrics = metrics
        self._stream_options = stream_options
        self._send_timeout_s = send_timeout_s
        self._ping_s = ping_s
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sink = self._sink(scope, receive, send)
        abort = scope.get("extensions", {}).get(ABORT)
        error: FlowKVError | None = Cancelled("The client has gone.")
        try:
            async with asyncio.TaskGroup() as tasks:
                working = tasks.create_task(self._work(sink, abort))
                watching = tasks.create_task(disconnected(receive))
                await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
                working.cancel()
                watching.cancel()
            if not working.cancelled():
                error = working.result()
        except asyncio.CancelledError:  # the server's time to stop is over
            if not working.cancelled():
                error = working.result()
            else:
                error = Unavailable(STOPPED)  # also if the client does not hear of it
                await self._tell(sink, abort, error)
        finally:
            self._metrics.count_unfinished(chain.from_iterable(self._answer.groups), error)
            self._on_end(error)

    def _sink(self, scope: Scope, receive: Receive, send: Send) -> Sink:
        async def reply(response: Response) -> None:
            await response(scope, receive, send)

        if self._stream_options is None:
            return WholeSink(self._answer, self._writer, reply)
        stream = EventStream(send, self._send_timeout_s)
        return StreamSink(self._answer, self._writer, reply, stream, self._stream_options, self._ping_s)

    async def _work(self, sink: Sink, abort: Abort | None) -> FlowKVError | None:
        try:
            error = await self._run(sink)
        except ClientTooSlow as slow:
            return self._let_go(slow, abort)
        return error and await self._tell(sink, abort, error)

    async def _tell(self, sink: Sink, abort: Abort | None, error: FlowKVError) -> FlowKVError:
        self._metrics.count_error(status_of(error))
        try:
            await sink.fail(error)
        except ClientTooSlow as slow:
            return self._let_go(slow, abort)
        return error

    def _let_go(self, slow: ClientTooSlow, abort: Abort | None) -> FlowKVError:
        self._metrics.slow_clients.inc()
        log.warning("cut off a client: %s", slow)
        if abort is not None:  # closing would wait for the client to read what is left
            abort()
        return slow

    async def _run(self, sink: Sink) -> FlowKVError | None:
        """What the client must be told, if anything. Raises ClientTooSlow."""
        try:
            async with sink.held_open():
                await self._answer.run(self._generator, self._metrics, sink.emit)
            await sink.finish()
        except ClientTooSlow:
            raise
        except FlowKVError as error:
            return error
        except Exception:
            log.exception("answering failed")
            return Internal("Internal error.")
        return None
