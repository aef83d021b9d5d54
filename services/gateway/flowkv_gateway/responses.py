"""Answers a generation request over ASGI, whole or as a stream, while its client is there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from itertools import chain
from typing import Protocol

from msgspec import UNSET, UnsetType
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from flowkv_common.errors import Cancelled, FlowKVError, Internal, Unavailable
from flowkv_common.tasks import running
from flowkv_gateway.answering import Answer
from flowkv_gateway.choice import Delta
from flowkv_gateway.connection import ABORT, STOPPED
from flowkv_gateway.errors import ClientTooSlow
from flowkv_gateway.errors_http import error_body, error_response, status_of
from flowkv_gateway.generation import Generator
from flowkv_gateway.metrics import GatewayMetrics
from flowkv_gateway.openai import Usage, WholeChoice, Writer
from flowkv_gateway.params import StreamOptions
from flowkv_gateway.sse import EventStream, disconnected

log = logging.getLogger(__name__)

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
